"""Batches of images in memory or on disk, of which each process has its share."""

from collections.abc import Iterator, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from zoo.randomness import generator_of, key_of

# A set that takes more of an accelerator's free memory than this stays in the main memory.
LARGEST_SHARE = 0.25


class DistributedBatchSampler:
    """The batches of one process: which images, and in what order; a pure function of the settings and the epoch.

    Batch ``b`` of all processes together is batch ``b`` of a single process whose batches are as large as theirs
    together. In evaluation no image has two processes, and all have equally many batches, which strategies that shard a
    network need, and none is empty: of several processes, batches are evened out, and where single images do not come
    out even, a batch has two.

    Args:
        images: how many there are.
        batch_size: images a batch and process.
        shuffle: whether each epoch has an order of its own; where the processes do not divide the images, some are then
            taken twice, so that all batches are equally large.
        drop_last: whether a last, smaller batch is left out.
        processes, rank: how many processes share the images, and which of them this is.
        seed: of the order.

    Raises:
        ValueError: fewer images than processes, in evaluation.
    """

    def __init__(
        self, images: int, batch_size: int, *, shuffle: bool, drop_last: bool, processes: int, rank: int, seed: int
    ) -> None:
        if images < processes and not shuffle:
            raise ValueError(
                f"{images} images are too few for {processes} processes, each of which measures some: add images, or "
                "use fewer processes (--trainer.devices)"
            )
        self.images = images
        self.batch_size = batch_size
        self.shuffle = shuffle
        self.drop_last = drop_last
        self.processes = processes
        self.rank = rank
        self.seed = seed
        self.epoch = 0
        # The first batch that is wanted of the epoch.
        self.start = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        largest = -(-self.images // self.processes)
        whole, rest = divmod(largest, self.batch_size)
        batches = whole + (rest > 0 and not self.drop_last)
        return batches if self.shuffle else min(batches, self.images // self.processes)

    def __iter__(self) -> Iterator[list[int]]:
        return iter([batch.tolist() for batch in self._batches()[self.start : len(self)]])

    def _batches(self) -> Sequence[Tensor]:
        if not self.shuffle:
            mine = torch.arange(self.images)[self.rank :: self.processes]
            # One of several processes may have an image more than another.
            return mine.split(self.batch_size) if self.processes == 1 else mine.tensor_split(len(self))
        order = torch.randperm(self.images, generator=generator_of(self.seed, self.epoch))
        missing = torch.arange(-self.images % self.processes) % self.images
        return torch.cat([order, order[missing]])[self.rank :: self.processes].split(self.batch_size)


class Loader:
    """Batches (images, labels), uint8 and int64, of images in memory or on disk.

    Those in memory are gathered on the device that computes, so that nothing is copied to it; those on disk are read by
    worker processes. It has what Lightning wants of torch's ``DataLoader``: a length, and a sampler whose ``set_epoch``
    it calls.

    Args:
        images: the whole set; if in memory, it is moved to ``device`` if it takes at most a quarter of what is free
            there.
        sampler: which of them this process has, in which batches.
        device: where batches are wanted.
        workers: processes that read images from disk; 0 for this process.
    """

    batch_sampler = None

    def __init__(
        self, images: Dataset, sampler: DistributedBatchSampler, *, device: torch.device | str = "cpu", workers: int = 0
    ) -> None:
        device = torch.device(device)
        self.dataset = images.to(device) if images.in_memory and _fits(images.images, device) else images
        self.sampler = sampler
        self.batch_size = sampler.batch_size
        self.drop_last = sampler.drop_last
        self.reader = None
        if not images.in_memory:
            self.reader = DataLoader(
                images,
                batch_sampler=sampler,
                num_workers=workers,
                persistent_workers=workers > 0,
                collate_fn=collate_unchanged,
            )

    def __len__(self) -> int:
        return len(self.sampler)

    def __iter__(self) -> Iterator[tuple[Tensor, ...]]:
        yield from self._read(list(self.sampler))

    def _read(self, batches: list[list[int]]) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the images and labels of these batches, which are those that ``sampler`` gives."""
        if self.reader is not None:
            yield from self.reader
            return
        # The whole order at once, for a device has to be waited for at each copy.
        order = torch.tensor(list(chain(*batches)), dtype=torch.int64, device=self.dataset.images.device)
        for indices in order.split(list(map(len, batches))):
            yield self.dataset.choose(indices)


class TrainingLoader(Loader):
    """Batches (images, labels, keys) of training images, in an order of its own for each epoch.

    From its key, int64 on the CPU, follows how an image is changed: it is that of seed, epoch and image, so neither of
    the batch nor of the process. A state of the loader is an epoch and how many of its batches are done.
    """

    def __init__(self, *arguments: Any, **settings: Any) -> None:
        super().__init__(*arguments, **settings)
        self.done = 0
        self.resumed: dict[int, int] = {}

    @property
    def _images_a_batch(self) -> int:
        return self.batch_size * self.sampler.processes

    def __iter__(self) -> Iterator[tuple[Tensor, ...]]:
        # This runs when a batch is asked for: Lightning makes the iterator before it tells the epoch.
        sampler = self.sampler
        sampler.start = self.done = self.resumed.pop(sampler.epoch, 0)
        self.resumed.clear()
        batches = list(sampler)
        for indices, (images, labels) in zip(batches, self._read(batches), strict=True):
            self.done += 1
            yield images, labels, key_of(sampler.seed, sampler.epoch, torch.tensor(indices))
        # Without a trainer that counts the epochs, the next one still has another order.
        sampler.set_epoch(sampler.epoch + 1)
        self.done = 0

    def state_dict(self) -> dict[str, int]:
        return {
            "epoch": self.sampler.epoch,
            "batches": self.done,
            "images_a_batch": self._images_a_batch,
            "images": self.sampler.images,
        }

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on where another loader was.

        Raises:
            ValueError: within an epoch, whose batches were of another size, or of another number of images.
        """
        begun = 0 < state["batches"] < len(self)
        # Earlier versions did not tell.
        if begun and state.get("images", self.sampler.images) != self.sampler.images:
            raise ValueError(
                f"the epoch was begun with {state['images']:,} training images, and there are "
                f"{self.sampler.images:,} now: go on with the same ones, or from the end of an epoch"
            )
        if begun and state["images_a_batch"] != self._images_a_batch:
            raise ValueError(
                f"the epoch was begun with {state['images_a_batch']} images a batch of all processes together, and has "
                f"{self._images_a_batch} now: go on with the same batch size and number of processes, or from the end "
                "of an epoch"
            )
        self.sampler.set_epoch(state["epoch"])
        self.resumed = {state["epoch"]: state["batches"]}


def _fits(images: Tensor, device: torch.device) -> bool:
    return device.type != "cuda" or images.nbytes <= LARGEST_SHARE * torch.cuda.mem_get_info(device)[0]


def collate_unchanged(batch: Any) -> Any:
    return batch
