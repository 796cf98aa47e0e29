"""Recipes of ``configs/``, each trained as far as the time goes."""

import contextlib
import dataclasses
import fnmatch
import logging
import time
import warnings
from collections.abc import Iterator, Sequence
from itertools import product
from pathlib import Path

import torch

from zoo.data import ImageData
from zoo.data.measuring import recorded_data
from zoo.files import relative
from zoo.recipes.epochs import EpochLines, StopInTime
from zoo.resuming.files import LAST
from zoo.resuming.folder import claim
from zoo.resuming.record import read_lightning_checkpoint, record_of
from zoo.training.cli import run
from zoo.training.device import Device

CHECKOUT = Path(__file__).resolve().parents[2]
CONFIGS = CHECKOUT / "configs"

# What is trained first: networks that cost little, then those most asked for, each family beginning with its twin;
# recipes of other families and operators come last.
FAMILIES = ("digits_cnn6", "mnist_cnn6", "cifar10_resnet20", "cifar10_cnn9", "cifar10_cnn9_no_batchnorm")
OPERATORS = ("conv", *(f"{name}_cosine" for name in ("tanh", "sphere", "ball", "linear", "seg", "log", "mix")))

# Less time than this, in seconds, is not worth reading the images.
LEAST_SECONDS = 20


def is_checkout() -> bool:
    """Return whether the zoo runs from a checkout, which has recipes and the entry points of torch.hub beside it."""
    return (CHECKOUT / "hubconf.py").is_file() and CONFIGS.is_dir()


def need_checkout(command: str) -> None:
    """Refuse a command that reads recipes, and writes results and pages beside them, where there are none.

    Raises:
        FileNotFoundError: the zoo was installed without a checkout.
    """
    if not is_checkout():
        raise FileNotFoundError(
            f"{command} works in a checkout of decoupled-zoo only, which has configs/, docs/ and results/: clone the "
            f"repository, and run python -m zoo {command} there"
        )


@dataclasses.dataclass(frozen=True)
class Trained:
    """What became of a training.

    Attributes:
        checkpoint: of the last epoch; it is not there if the first one has not ended.
        finished: whether all epochs are trained.
        stopped: why it cannot go on, if gradients were not finite.
        epochs: one mapping of metrics for each epoch.
        images_per_epoch: how many images an epoch has, if one was begun.
        precision: in which it is trained, as Lightning calls it.
        data: the images, if any epoch was trained now: for whoever trains on them next.
    """

    checkpoint: Path
    finished: bool
    stopped: str | None
    epochs: list[dict[str, float]]
    images_per_epoch: int | None
    precision: str
    data: ImageData | None

    def images(self) -> ImageData:
        """Return the images, those that the checkpoint records if nothing was left to train."""
        return self.data or recorded_data(record_of(self.checkpoint).data, root=None)


def train(
    recipe: Path,
    device: Device,
    *,
    folder: Path,
    options: Sequence[str] = (),
    deadline: float = float("inf"),
    data: ImageData | None = None,
) -> Trained:
    """Train a recipe, going on where it was left, until it is finished, fails or no other epoch would end in time.

    Args:
        recipe: a configuration file of ``train.py fit``.
        folder: where its Lightning checkpoints are. Those of a recipe with other settings are thrown away.
        options: further options of ``train.py fit``.
        deadline: on the clock of ``time.monotonic``. How long an epoch takes is known after the first, which is
            begun in any case.
        data: images that need not be read again if the recipe is for the same.

    Raises:
        ValueError, OSError: a recipe that cannot be trained, e.g. for want of its images, or a folder with other files.
    """
    torch.compiler.reset()
    claim(folder, recipe)
    last = folder / LAST
    eager_cpu = device.name == "cpu" and not device.compile
    lines = EpochLines(recipe.stem, device.precision, earlier="32-true" if eager_cpu else device.precision)
    resume = []
    if last.exists():
        lines.load_state_dict(read_lightning_checkpoint(last)["callbacks"][lines.state_key])
        finished = is_finished(last)
        seconds, left = lines.epochs[-1]["seconds"], deadline - time.monotonic()
        if not finished and seconds > left:
            print(f"{recipe.stem}: an epoch takes {seconds:.0f} s, and {max(left, 0):.0f} s are left")
        if finished or seconds > left:
            return Trained(last, finished, None, lines.epochs, lines.images_per_epoch, lines.precision, None)
        resume = ["--ckpt_path", str(last)]
    arguments = ["fit", "--config", relative(recipe), "--checkpoint.dirpath", str(folder)]
    device = dataclasses.replace(device, precision=lines.precision)
    arguments += [*device.options(), *options, *resume]
    stopped = None
    try:
        with _one_line_an_epoch():
            data = run(arguments, [lines, StopInTime(deadline)], data).datamodule
    except FloatingPointError as error:
        data, stopped = lines.data, str(error)
    if data:
        # The trainer of before would keep its copy of the images on the device.
        data.trainer = None
    return Trained(last, is_finished(last), stopped, lines.epochs, lines.images_per_epoch, lines.precision, data)


def is_finished(checkpoint: Path) -> bool:
    """Say whether a Lightning checkpoint is the end of its training; one that is not there is not."""
    if not checkpoint.exists():
        return False
    return record_of(checkpoint).is_finished


def recipes(only: str = "*", folder: Path | None = None) -> list[Path]:
    """Return the recipes of checkpoints whose name matches the pattern, most wanted first.

    Args:
        folder: where the recipes are, by default ``configs/``.

    Raises:
        ValueError: no recipe has such a name, or there is none in the folder.
    """
    folder = folder or CONFIGS
    order = {f"{family}_{operator}": place for place, (family, operator) in enumerate(product(FAMILIES, OPERATORS))}
    existing = sorted(folder.glob("*_*.yaml"), key=lambda path: (order.get(path.stem, len(order)), path.stem))
    chosen = [path for path in existing if fnmatch.fnmatch(path.stem, only)]
    if not existing:
        raise ValueError(f"{folder} has no recipes (*_*.yaml); check the path")
    if not chosen:
        raise ValueError(f"no recipe matches {only!r}; there are {', '.join(path.stem for path in existing)}")
    return chosen


@contextlib.contextmanager
def _one_line_an_epoch() -> Iterator[None]:
    """Silence what Lightning tells of each training, and its warning that an epoch has few batches."""
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric")]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The number of training batches")
        try:
            for logger in loggers:
                logger.setLevel(logging.WARNING)
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)
