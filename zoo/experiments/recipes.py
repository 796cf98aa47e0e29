"""Train a recipe of ``configs/`` as far as the time goes, and the whole zoo, one recipe after another."""

import contextlib
import dataclasses
import fnmatch
import logging
import os
import shutil
import tempfile
import time
import warnings
from collections.abc import Iterator, Sequence
from itertools import product
from pathlib import Path

import torch
import yaml

import zoo
from zoo.checkpoints.loading import CONFIG, PRETRAINED, put_in_place, read_config, write_whole
from zoo.data import ImageData
from zoo.runs.record import read_lightning_checkpoint, record_of
from zoo.training.callbacks import EpochLines, StopInTime
from zoo.training.cli import run
from zoo.training.export import export, recorded_data

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
WORK = Path("outputs/zoo")

# What is trained first: networks that cost little, then those most asked for, each family beginning with its twin;
# recipes of other families and operators come last.
FAMILIES = ("digits_cnn6", "mnist_cnn6", "cifar10_resnet20", "cifar10_cnn9", "cifar10_cnn9_no_batchnorm")
OPERATORS = ("conv", *(f"{name}_cosine" for name in ("tanh", "sphere", "ball", "linear", "seg", "log", "mix")))

# Less time than this, in seconds, is not worth reading the images.
LEAST_SECONDS = 20


@dataclasses.dataclass(frozen=True)
class Device:
    """Where and how to train, as options of ``train.py``.

    Args:
        name: "cuda" or "cpu".
        compile: whether networks are compiled.
    """

    name: str
    compile: bool

    @classmethod
    def choose(cls, name: str, compile: bool | None = None) -> "Device":
        """Return the device called "cpu" or "cuda", or for "auto" the GPU if there is one.

        Args:
            compile: by default, networks are compiled on GPUs only.

        Raises:
            ValueError: another name, or "cuda" where there is none.
        """
        available = torch.cuda.is_available()
        if name not in ("auto", "cpu", "cuda") or (name == "cuda" and not available):
            raise ValueError(f"device is auto, cpu, or cuda where torch finds a GPU; got {name!r}")
        name = "cuda" if available and name != "cpu" else "cpu"
        return cls(name, name == "cuda" if compile is None else compile)

    @property
    def accelerator(self) -> str:
        """What Lightning calls it."""
        return "gpu" if self.name == "cuda" else "cpu"

    @property
    def precision(self) -> str:
        """bfloat16 where it is faster: on GPUs that have it, and on CPUs that have it for compiled networks."""
        if self.name == "cuda":
            fast = torch.cuda.is_bf16_supported(including_emulation=False)
        else:
            fast = self.compile and (torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
        return "bf16-mixed" if fast else "32-true"

    def options(self) -> list[str]:
        settings = {"trainer.accelerator": self.accelerator, "trainer.precision": self.precision}
        settings["model.compile"] = str(self.compile).lower()
        return [word for name, value in settings.items() for word in (f"--{name}", value)]


@dataclasses.dataclass(frozen=True)
class Trained:
    """What became of a training.

    Attributes:
        checkpoint: of the last epoch; it is not there if the first one has not ended.
        finished: whether all epochs are trained.
        stopped: why it cannot go on, if gradients were not finite.
        epochs: one mapping of metrics for each epoch.
        images_per_epoch: how many images an epoch has, if one was begun.
        data: the images, if any epoch was trained now: for whoever trains on them next.
    """

    checkpoint: Path
    finished: bool
    stopped: str | None
    epochs: list[dict[str, float]]
    images_per_epoch: int | None
    data: ImageData | None

    def images(self) -> ImageData:
        """Return the images, those that the checkpoint records if nothing was left to train."""
        return self.data or recorded_data(record_of(self.checkpoint)["data"], root=None)


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
    _claim(folder, recipe)
    last = folder / "last.ckpt"
    lines = EpochLines(recipe.stem)
    resume = []
    if last.exists():
        lines.load_state_dict(read_lightning_checkpoint(last)["callbacks"][lines.state_key])
        finished = is_finished(last)
        seconds, left = lines.epochs[-1]["seconds"], deadline - time.monotonic()
        if not finished and seconds > left:
            print(f"{recipe.stem}: an epoch takes {seconds:.0f} s, and {max(left, 0):.0f} s are left")
        if finished or seconds > left:
            return Trained(last, finished, None, lines.epochs, lines.images_per_epoch, None)
        resume = ["--ckpt_path", str(last)]
    arguments = ["fit", "--config", os.path.relpath(recipe), "--checkpoint.dirpath", str(folder)]
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
    return Trained(last, is_finished(last), stopped, lines.epochs, lines.images_per_epoch, data)


def _claim(folder: Path, recipe: Path) -> None:
    """Make ``folder`` that of ``recipe``, and throw away what is there of another one."""
    mine, text = folder / "recipe.yaml", recipe.read_text(encoding="utf-8")
    if mine.is_file():
        if yaml.safe_load(mine.read_text(encoding="utf-8")) == yaml.safe_load(text):
            return
        print(f"{recipe.stem}: {folder} held a training with other settings, which is thrown away")
        shutil.rmtree(folder)
    elif folder.exists() and any(folder.iterdir()):
        raise ValueError(f"{folder} has other files than a training's; name another folder, or empty it")
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(mine, text)


def is_finished(checkpoint: Path) -> bool:
    """Say whether a Lightning checkpoint is the end of its training; one that is not there is not."""
    if not checkpoint.exists():
        return False
    record = record_of(checkpoint)
    return record["training"]["epochs"] >= record["trainer"]["max_epochs"]


def recipes(only: str = "*") -> list[Path]:
    """Return the recipes of checkpoints whose name matches the pattern, most wanted first.

    Raises:
        ValueError: no recipe has such a name.
    """
    order = {f"{family}_{operator}": place for place, (family, operator) in enumerate(product(FAMILIES, OPERATORS))}
    existing = sorted(CONFIGS.glob("*_*.yaml"), key=lambda path: (order.get(path.stem, len(order)), path.stem))
    chosen = [path for path in existing if fnmatch.fnmatch(path.stem, only)]
    if not chosen:
        raise ValueError(f"no recipe matches {only!r}; there are {', '.join(path.stem for path in existing)}")
    return chosen


def train_zoo(
    only: str = "*",
    *,
    device: Device,
    minutes: float = float("inf"),
    epochs: int | None = None,
    to: Path = PRETRAINED,
) -> bool:
    """Train, export and verify every recipe that has no checkpoint of as many epochs; return whether none failed.

    A checkpoint is not compared with its recipe otherwise: to train a changed recipe, remove its folder.

    Args:
        only: a pattern of names, as of files.
        minutes: no epoch is begun that would not end in that time; what is unfinished goes on in the next call.
        epochs: train so many, in place of each recipe's own number.
        to: parent of the checkpoint folders.

    Raises:
        ValueError: no recipe has such a name.
        OSError: ``to`` is no folder and cannot become one.
    """
    to.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + 60 * minutes
    all_well, data = True, None
    for recipe in recipes(only):
        folder = to / recipe.stem
        try:
            wanted = epochs or yaml.safe_load(recipe.read_text(encoding="utf-8"))["trainer"]["max_epochs"]
            if (folder / CONFIG).is_file() and read_config(folder)["training"].get("epochs", 0) >= wanted:
                print(f"{recipe.stem}: has its checkpoint")
                continue
            if deadline - time.monotonic() < LEAST_SECONDS:
                print(f"{recipe.stem}: no time left")
                continue
            work = WORK / recipe.stem / f"{wanted}_epochs"
            options = ["--trainer.max_epochs", str(wanted)]
            trained = train(recipe, device, folder=work, options=options, deadline=deadline, data=data)
            data = trained.data or data
            if trained.stopped:
                raise FloatingPointError(trained.stopped)
            if trained.finished:
                _publish(trained, folder)
            else:
                print(f"{recipe.stem}: goes on in the next call ({trained.checkpoint})")
        # Whatever it is, out of memory for one, the other recipes need not suffer from it.
        except Exception as error:
            if os.environ.get("ZOO_TRACEBACK"):
                raise
            print(f"{recipe.stem}: failed ({type(error).__name__}): {error}", flush=True)
            all_well = False
    return all_well


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


def _publish(trained: Trained, folder: Path) -> None:
    """Export a finished training, verify it, put it in place of what is there, and say what was measured.

    Raises:
        CheckpointError: the export does not verify; what was there is left.
    """
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as scratch:
        draft = Path(scratch) / folder.name
        data = trained.images()
        metrics = export(trained.checkpoint, draft, data=data, precision=None)
        split = metrics[-1].split
        if problems := zoo.verify(draft, data.evaluation_batches(split), split):
            raise zoo.CheckpointError("; ".join(problems))
        put_in_place(draft, folder, old=Path(scratch) / "old")
    measured = ", ".join(f"{metric.split} accuracy {metric.value:.4f}" for metric in metrics)
    print(f"{folder.name}: {measured}, verified", flush=True)
