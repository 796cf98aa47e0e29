"""The networks whose explanations are measured, with the images on which they are."""

import copy
import hashlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from torch import Tensor

import zoo
from benchmarks.imagenet import ARCHITECTURE, Halves
from zoo.checkpoints.config import read_config
from zoo.checkpoints.starting_points import start_from
from zoo.data.measuring import data_for
from zoo.models.conversion import convert
from zoo.models.image_model import ImageModel
from zoo.models.spec import PLAIN
from zoo.training.recovery import calibrated, distilled

# Grids of so many cells a side, and how many of them at most.
GRIDS = {2: 150, 3: 60}
CURVE_IMAGES = 200
# Photographs take a hundred times as long as images of 32×32 pixels.
PHOTOGRAPH_GRIDS = {2: 20}
PHOTOGRAPH_CURVE_IMAGES = 40
# To what a network of photographs is converted, and for how many epochs it then learns from the plain one: SphereConv
# loses much by its conversion.
CONVERTED = {"tanh_cosine": 0, "sphere_cosine": 100}


@dataclass(frozen=True)
class Explained:
    """A network, and images with the number of their class.

    Attributes:
        sha256: of the weights, or of those that were converted.
        title: of the images.
        load: gives the network in evaluation mode, the images (N, C, H, W) in [0, 1], and their classes, int64 (N,).
        grids: how many grids of each number of cells a side.
        curve_images: on how many images pixels are deleted and inserted.
    """

    name: str
    sha256: str
    title: str
    load: Callable[[], tuple[ImageModel, Tensor, Tensor]]
    grids: Mapping[int, int]
    curve_images: int


def of_checkpoint(name: str, root: str | None) -> Explained:
    """Return a checkpoint with the test images that it was measured on."""
    data = data_for(name, None, root)

    def load() -> tuple[ImageModel, Tensor, Tensor]:
        return zoo.load(name), *data.evenly_spaced("test", len(data.split("test")))

    short = Path(name).name
    return Explained(short, read_config(zoo.find(name))["sha256"], data.title, load, GRIDS, CURVE_IMAGES)


def of_photographs(weights: Path, folder: Path) -> Iterator[Explained]:
    """Yield a network of timm that was trained on ImageNet, and its conversions, fitted to half of the photographs.

    The other half are the images.
    """
    plain = start_from(f"timm:{ARCHITECTURE}", weights=weights)
    halves, sha256 = Halves(folder, plain), hashlib.sha256(weights.read_bytes()).hexdigest()

    def load(operator: str) -> tuple[ImageModel, Tensor, Tensor]:
        model = copy.deepcopy(plain)
        if operator in CONVERTED:
            convert(model, operator)
            calibrated(model, halves.fitted, "auto")
            if epochs := CONVERTED[operator]:
                distilled(model, copy.deepcopy(plain), halves.fitted, epochs)
        return model.eval(), halves.images, halves.labels

    for name in (PLAIN, *CONVERTED):
        yield Explained(
            name=f"imagenet_{ARCHITECTURE}_{name}",
            sha256=sha256,
            title="photographs of ImageNet",
            load=partial(load, name),
            grids=PHOTOGRAPH_GRIDS,
            curve_images=PHOTOGRAPH_CURVE_IMAGES,
        )
