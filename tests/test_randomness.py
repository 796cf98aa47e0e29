"""Draws that follow from what they are for: their distribution, their independence, and batches that can go on."""

import collections
import types

import pytest
import torch

from zoo.data.augmentation import AUGMENTS, augment_batch
from zoo.data.image_sets import MemoryImages
from zoo.data.loaders import DistributedBatchSampler, Loader, TrainingLoader
from zoo.randomness import generator_of, key_of, uniform


def test_keys_are_those_of_splitmix64():
    """The first outputs of the published generator seeded with 0 are the hashes of multiples of its increment."""

    def scrambled(value):
        value = (value + 0x9E3779B97F4A7C15) % 2**64
        value = ((value ^ value >> 30) * 0xBF58476D1CE4E5B9) % 2**64
        value = ((value ^ value >> 27) * 0x94D049BB133111EB) % 2**64
        return value ^ value >> 31

    assert scrambled(0) == 0xE220A8397B1DCDAF
    for parts in ((0,), (7, 3), (-1, 2**40, 5)):
        expected = 0
        for part in parts:
            expected = scrambled(expected ^ scrambled(part % 2**64))
        assert int(key_of(*parts)) % 2**64 == expected


def test_draws_are_uniform_and_independent():
    draws = uniform(key_of(0, 1, torch.arange(100_000)), 8)
    assert draws.dtype == torch.float64 and 0 <= draws.min() and draws.max() < 1
    counts = torch.stack([torch.histc(column, 100, 0, 1) for column in draws.T])
    # χ² with 99 degrees of freedom has a mean of 99 and a standard deviation of 14.
    assert (((counts - 1000) ** 2 / 1000).sum(1) - 99).abs().max() < 5 * 14
    neighbours = torch.cat([draws[1:], draws[:-1]], dim=1).T.corrcoef()
    assert (neighbours - torch.eye(16, dtype=torch.float64)).abs().max() < 5 / 100_000**0.5


def test_every_part_and_its_place_change_a_key():
    keys = [key_of(*parts).item() for parts in ((0,), (1,), (-1,), (0, 0), (0, 1), (1, 0), (0, 0, 0))]
    assert len(set(keys)) == len(keys)
    many = torch.cat([key_of(0, epoch, torch.arange(50_000)) for epoch in range(4)])
    assert len(many.unique()) == len(many)
    assert torch.rand(3, generator=generator_of(1, 2)).tolist() == torch.rand(3, generator=generator_of(1, 2)).tolist()


@pytest.mark.parametrize("augment", AUGMENTS)
def test_an_image_is_changed_alike_in_any_batch(augment):
    images = torch.randint(256, (12, 3, 16, 16), dtype=torch.uint8, generator=generator_of(0))
    keys = key_of(0, 0, torch.arange(12))
    whole = augment_batch(images, augment, 14 if augment == "resized_crop_flip" else 16, keys)
    order = torch.randperm(12, generator=generator_of(1))
    for part in order.split(5):
        assert torch.equal(augment_batch(images[part], augment, whole.shape[2], keys[part]), whole[part])
    other = augment_batch(images, augment, whole.shape[2], key_of(0, 1, torch.arange(12)))
    assert torch.equal(other, whole) == (augment == "none")


class OnDisk(MemoryImages):
    in_memory = False


def make_loader(count, batch_size, *, kind=TrainingLoader, images=MemoryImages, workers=0, **settings):
    """Return a loader of images that hold their own numbers."""
    numbers = torch.arange(count)
    settings = {"shuffle": kind is TrainingLoader, "drop_last": False, "processes": 1, "rank": 0, "seed": 0} | settings
    share = DistributedBatchSampler(count, batch_size, **settings)
    return kind(images(numbers.to(torch.uint8).view(-1, 1, 1, 1), numbers), share, workers=workers)


def labels_of(loader):
    return [batch[1].tolist() for batch in loader]


@pytest.mark.parametrize(("images", "workers"), [(MemoryImages, 0), (OnDisk, 0), (OnDisk, 2)])
def test_a_loader_goes_on_where_its_state_was(images, workers):
    def make():
        return make_loader(23, 4, images=images, workers=workers)

    whole = make()
    epochs = [[(*map(torch.Tensor.tolist, batch),) for batch in whole] for _ in range(3)]
    assert epochs[0] != epochs[1] and sorted(sum((batch[1] for batch in epochs[1]), [])) == list(range(23))
    for epoch, done in ((0, 1), (1, 3), (1, 6), (2, 5)):
        stopped, resumed = make(), make()
        stopped.sampler.set_epoch(epoch)
        batches = iter(stopped)
        for _ in range(done):
            next(batches)
        state = stopped.state_dict()
        assert state == {"epoch": epoch, "batches": done, "images_a_batch": 4, "images": 23}
        resumed.load_state_dict(state)
        # Lightning makes the iterator before it tells the epoch.
        batches = iter(resumed)
        resumed.sampler.set_epoch(epoch)
        assert [(*map(torch.Tensor.tolist, batch),) for batch in batches] == epochs[epoch][done:]
        if epoch < 2:
            resumed.sampler.set_epoch(epoch + 1)
            assert [(*map(torch.Tensor.tolist, batch),) for batch in resumed] == epochs[epoch + 1]


def test_an_epoch_is_not_gone_on_with_in_other_batches():
    loader = make_loader(64, 4)
    batches = iter(loader)
    next(batches)
    state = loader.state_dict()
    make_loader(64, 2, processes=2).load_state_dict(state)
    for other in (make_loader(64, 8), make_loader(64, 4, processes=2)):
        with pytest.raises(ValueError, match="begun with 4 images a batch of all processes together, and has 8 now"):
            other.load_state_dict(state)
        other.load_state_dict({**state, "batches": 0})
    with pytest.raises(ValueError, match="begun with 64 training images, and there are 66 now"):
        make_loader(66, 4).load_state_dict(state)
    make_loader(64, 4).load_state_dict({name: value for name, value in state.items() if name != "images"})


def test_a_state_is_of_its_own_epoch_alone():
    loader, fresh = make_loader(10, 3), make_loader(10, 3)
    loader.load_state_dict({"epoch": 0, "batches": 2, "images_a_batch": 3, "images": 10})
    loader.sampler.set_epoch(1)
    fresh.sampler.set_epoch(1)
    assert labels_of(loader) == labels_of(fresh)


@pytest.mark.parametrize("kind", [TrainingLoader, Loader])
@pytest.mark.parametrize("processes", [1, 2, 3, 5])
@pytest.mark.parametrize("batch_size", [1, 2])
@pytest.mark.parametrize("count", [5, 23, 24, 25, 30])
def test_processes_share_an_epoch(kind, processes, count, batch_size):
    settings = {"kind": kind, "processes": processes}
    shares = [labels_of(make_loader(count, batch_size, rank=rank, **settings)) for rank in range(processes)]
    assert len({len(share) for share in shares}) == 1
    seen = collections.Counter(label for share in shares for batch in share for label in batch)
    assert set(seen) == set(range(count))
    if kind is Loader:
        assert set(seen.values()) == {1} and all(batch for share in shares for batch in share)
        return
    assert sum(seen.values()) == count + (-count % processes)
    together = make_loader(count, batch_size * processes)
    for place, batch in list(enumerate(together))[: count // (batch_size * processes)]:
        assert sorted(batch[1].tolist()) == sorted(label for share in shares for label in share[place])


def test_fewer_images_than_processes_cannot_be_measured():
    with pytest.raises(ValueError, match="2 images are too few for 3 processes"):
        make_loader(2, 4, kind=Loader, processes=3)


def test_keys_do_not_depend_on_the_process():
    keys = {}
    for processes in (1, 3):
        for rank in range(processes):
            for _, labels, each in make_loader(24, 4, processes=processes, rank=rank):
                keys.setdefault(processes, {}).update(zip(labels.tolist(), each.tolist(), strict=True))
    assert keys[1] == keys[3]


def test_evaluation_always_begins_with_the_first_image():
    loader = make_loader(10, 4, kind=Loader)
    next(iter(loader))
    assert labels_of(loader) == labels_of(loader) == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    assert not isinstance(loader, types.GeneratorType) and len(loader) == 3 and not hasattr(loader, "state_dict")
