"""Images without labels, changed so much that a network can learn by a few hundred of them for many epochs."""

import math
from collections.abc import Iterator

import torch
from torch import Tensor
from torchvision.transforms import v2

from zoo.randomness import generator_of, seed_of

# The least share of an image's area that a crop shows, and the largest change of brightness and contrast.
LEAST_AREA, LIGHT = 0.1, 0.3
# How often a batch has parts of other images laid over each (CutMix), or other images blended in (mixup).
CUT, BLENDED = 0.4, 0.3


class UnlabelledImages:
    """Batches of images in [0, 1], shuffled and changed anew in each epoch, on the CPU.

    Each is a random crop, resized, perhaps mirrored, and brighter or darker; batches are mixed with themselves.

    Args:
        images: in [0, 1], (N, C, H, W).
        size: height and width of the results, in pixels.
        batch_size: images in a batch; the last one may be smaller.
        seed: what all that is drawn follows from, with the epoch and the batch.
    """

    def __init__(self, images: Tensor, size: int, batch_size: int, seed: int) -> None:
        self.images, self.batch_size, self.seed, self.epoch = images, batch_size, seed, 0
        crop = v2.RandomResizedCrop(size, scale=(LEAST_AREA, 1.0))
        self.change = v2.Compose([crop, v2.RandomHorizontalFlip(), v2.ColorJitter(LIGHT, LIGHT)])
        # They mix labels, too, of which there are none.
        mixing = [v2.CutMix(num_classes=1), v2.MixUp(num_classes=1), v2.Identity()]
        self.mix = v2.RandomChoice(mixing, p=[CUT, BLENDED, 1 - CUT - BLENDED])

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return math.ceil(len(self.images) / self.batch_size)

    def __iter__(self) -> Iterator[Tensor]:
        order = torch.randperm(len(self.images), generator=generator_of(self.seed, self.epoch))
        for number, places in enumerate(order.split(self.batch_size)):
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed_of(self.seed, self.epoch, number))
                images = torch.stack([self.change(self.images[place]) for place in places])
                images, _ = self.mix(images, torch.zeros(len(images), dtype=torch.int64))
            yield images.contiguous(memory_format=torch.channels_last)
