"""Images with labels, in memory or on disk."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import Dataset

from zoo.corruptions.corruption import corrupted, corruption_keys
from zoo.models.transform import ImageTransform


class MemoryImages(Dataset):
    """Images in memory: uint8 (N, C, H, W) and labels int64 (N,). A batch is one indexing of the two.

    Args:
        files: where the images come from, if they come from files.
    """

    in_memory = True

    def __init__(self, images: Tensor, labels: Tensor, files: Sequence[Path] = ()) -> None:
        self.images = images
        self.labels = labels
        self.files = files

    def __len__(self) -> int:
        return len(self.labels)

    def __getitems__(self, indices: list[int]) -> tuple[Tensor, Tensor]:
        # Some 20 times as fast as self.images[indices].
        return self.choose(torch.tensor(indices))

    def choose(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """Return the images and labels with these indices."""
        return self.images.index_select(0, indices), self.labels.index_select(0, indices)

    def to(self, device: torch.device) -> "MemoryImages":
        """Return the same images on a device."""
        return MemoryImages(self.images.to(device), self.labels.to(device), self.files)


class DiskImages(Dataset):
    """Images read from files, batch by batch, as the same tensors that ``MemoryImages`` gives.

    Raises:
        ValueError: from a batch with a file that is no readable image.
    """

    in_memory = False

    def __init__(self, files: Sequence[Path], labels: Tensor, transform: ImageTransform) -> None:
        self.files = files
        self.labels = labels
        self.transform = transform

    def __len__(self) -> int:
        return len(self.labels)

    def __getitems__(self, indices: list[int]) -> tuple[Tensor, Tensor]:
        return torch.stack([self.transform.read(self.files[index]) for index in indices]), self.labels[indices]


ImageSet = MemoryImages | DiskImages


class CorruptedImages(Dataset):
    """Other images, corrupted as they are read, always in the same way.

    Args:
        images: the images as they are.
        name, severity: as :func:`zoo.corruptions.corruption.corrupted` takes them.
    """

    # Batches are made one by one, as of images on disk.
    in_memory = False

    def __init__(self, images: ImageSet, name: str, severity: int) -> None:
        self.images = images
        self.name = name
        self.severity = severity
        self.labels = images.labels
        self.files = images.files

    def __len__(self) -> int:
        return len(self.images)

    def __getitems__(self, indices: list[int]) -> tuple[Tensor, Tensor]:
        images, labels = self.images.__getitems__(indices)
        keys = corruption_keys(torch.tensor(indices))
        return corrupted(images, self.name, self.severity, keys), labels
