"""Training the whole zoo, one recipe after another."""

import dataclasses
import os
import tempfile
import time
from pathlib import Path

import yaml

import zoo
from zoo.checkpoints.catalogue import PRETRAINED
from zoo.checkpoints.config import read_config
from zoo.data import ImageData
from zoo.files import put_in_place, write_whole
from zoo.hub.repository import CONFIG
from zoo.recipes.recipe import LEAST_SECONDS, Trained, recipes, train
from zoo.training.device import Device
from zoo.training.export import export

WORK = Path("outputs/zoo")


def train_zoo(
    only: str = "*",
    *,
    folder: Path | None = None,
    device: Device,
    minutes: float = float("inf"),
    epochs: int | None = None,
    seed: int | None = None,
    to: Path = PRETRAINED,
) -> bool:
    """Train, export and verify every recipe that has no checkpoint of as many epochs; return whether none failed.

    A checkpoint is not compared with its recipe otherwise: to train a changed recipe, remove its folder.

    Args:
        only: a pattern of names, as of files.
        folder: where the recipes are, by default ``configs/``.
        minutes: no epoch is begun that would not end in that time; what is unfinished goes on in the next call.
        epochs: train so many, in place of each recipe's own number.
        seed: begin with it, in place of each recipe's own; ``to`` is a folder of its own then.
        to: parent of the checkpoint folders.

    Raises:
        ValueError: no recipe has such a name.
        OSError: ``to`` is no folder and cannot become one.
    """
    to.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + 60 * minutes
    all_well, data, begun = True, None, None
    for recipe in recipes(only, folder):
        target = to / recipe.stem
        try:
            wanted = epochs or yaml.safe_load(recipe.read_text(encoding="utf-8"))["trainer"]["max_epochs"]
            if _is_trained(target, wanted, seed):
                print(f"{recipe.stem}: has its checkpoint")
                continue
            if deadline - time.monotonic() < LEAST_SECONDS:
                print(f"{recipe.stem}: no time left")
                continue
            if begun is None:
                begun = _as_begun(device)
                print(f"training {begun}", flush=True)
            trained = _train(recipe, begun, wanted, seed, deadline, data)
            data = trained.data or data
            if trained.finished:
                _export_verified(trained, target)
            else:
                print(f"{recipe.stem}: goes on in the next call ({trained.checkpoint})")
        # Whatever it is, out of memory for one, the other recipes need not suffer from it.
        except Exception as error:
            if os.environ.get("ZOO_TRACEBACK"):
                raise
            print(f"{recipe.stem}: failed ({type(error).__name__}): {error}", flush=True)
            all_well = False
    return all_well


def _is_trained(folder: Path, epochs: int, seed: int | None) -> bool:
    """Say whether there is a checkpoint of as many epochs.

    Raises:
        ValueError: there is one of another seed than the one that is asked for.
    """
    if not (folder / CONFIG).is_file():
        return False
    training = read_config(folder)["training"]
    if seed is not None and training.get("seed") != seed:
        raise ValueError(f"{folder} is of the seed {training.get('seed')}, not of {seed}; name another parent (--to)")
    return training.get("epochs", 0) >= epochs


def _train(
    recipe: Path, device: Device, epochs: int, seed: int | None, deadline: float, data: ImageData | None
) -> Trained:
    """Train a recipe for so many epochs in a work folder of its own, and with a seed of its own if one is given.

    Raises:
        FloatingPointError: the training cannot go on, since gradients were not finite.
    """
    folder, options = WORK / recipe.stem / f"{epochs}_epochs", ["--trainer.max_epochs", str(epochs)]
    if seed is not None:
        folder, options = folder / f"seed_{seed}", [*options, "--seed_everything", str(seed)]
    trained = train(recipe, device, folder=folder, options=options, deadline=deadline, data=data)
    if trained.stopped:
        raise FloatingPointError(trained.stopped)
    return trained


def _as_begun(device: Device) -> Device:
    """Return the device with the precision of the recipes before, for twins are trained in one precision."""
    kept = WORK / f"precision_{device.name}"
    if kept.is_file():
        return dataclasses.replace(device, precision=kept.read_text(encoding="utf-8"), why=f"as begun, see {kept}")
    kept.parent.mkdir(parents=True, exist_ok=True)
    write_whole(kept, device.precision)
    return device


def _export_verified(trained: Trained, folder: Path) -> None:
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
    measured = ", ".join(f"{metric.split} {metric.name} {metric.value:.4f}" for metric in metrics)
    print(f"{folder.name}: {measured}, verified", flush=True)
