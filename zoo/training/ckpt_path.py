"""What ``--ckpt_path`` stands for, and which runs have the same settings."""

import argparse
import hashlib
import inspect
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jsonargparse import Namespace
from lightning.pytorch.utilities import rank_zero_info

from operators.lookup import look_up
from zoo.data.registry import DATA, recorded_arguments
from zoo.models.spec import PLAIN
from zoo.resuming.folder import usable_checkpoint
from zoo.resuming.record import RunRecord, record_of
from zoo.training.classifier import Classifier

# Settings that came later, and their defaults.
LATER = {
    "data": {"class_weights": None, "draft": True, "corruption": None},
    "model": {"depthwise": False, "keep": None, "distil": 0, "teacher": None, "freeze_norms": False},
}
# Settings that say how a run's network was made, and what they are once it is there.
BEGINNING = {"init_from": None, "calibrate": None, "depthwise": False, "keep": None, "distil": 0, "teacher": None}


def hash_of(settings: Namespace) -> str:
    """Return a hash of all settings of fit but its folder, in whatever words and files they were given."""
    given = settings.as_dict()
    given.pop("config", None)
    # Commands are compared that name the same one, spelt in one way or another.
    del given["checkpoint"]["dirpath"]
    # Runs of earlier versions know nothing of these settings, and have their defaults.
    for settings, later in ((given["data"].get("init_args", {}), "data"), (given.get("model", {}), "model")):
        for name, default in LATER[later].items():
            if settings.get(name, default) == default:
                settings.pop(name, None)
    text = json.dumps(given, sort_keys=True, default=str)
    # Runs of earlier versions have the callbacks' class paths in their hash.
    return hashlib.sha256(text.replace('"zoo.training.callbacks.', '"zoo.callbacks.').encode()).hexdigest()


def config_files(arguments: Sequence[str]) -> list[Path]:
    """Return the configuration files that arguments name."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("-c", "--config", action="append", default=[])
    return [Path(file) for file in parser.parse_known_args(arguments)[0].config]


def going_on(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """Split ``arguments`` into what their ``--ckpt_path``, if there is one, stands for and what overrides it.

    Returns:
        The configuration files, followed by options for the checkpoint's network, data and folder; and the rest.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--ckpt_path")
    parser.add_argument("-c", "--config", action="append", default=[])
    known, rest = parser.parse_known_args(arguments)
    if known.ckpt_path is None:
        return [], list(arguments)
    if known.config:
        rank_zero_info(
            f"network, data and number of epochs are those of {known.ckpt_path}, whatever {' and '.join(known.config)} "
            "says of them; options override both"
        )
    predicting = any(word.partition("=")[0] == "--data.predict" for word in rest)
    files = [f"--config={file}" for file in known.config]
    path = usable_checkpoint(known.ckpt_path)
    return [*files, "--ckpt_path", path, *checkpoint_settings(path, predicting)], rest


def checkpoint_settings(path: str, predicting: bool) -> list[str]:
    """Return options for a checkpoint's network and folder, and, unless ``predicting`` on other images, its data."""
    record = record_of(path)
    # Settings of earlier versions that there are no more had been used when the run began.
    kept = record.model.keys() & inspect.signature(Classifier).parameters.keys()
    model = {name: record.model[name] for name in kept} | network_settings(record)
    folder = os.path.dirname(os.path.abspath(path))
    # Nothing but tensors and plain values is unpickled.
    settings = ["--weights_only", "true", "--model", json.dumps(model), "--checkpoint.dirpath", folder]
    settings += ["--trainer.max_epochs", json.dumps(record.max_epochs)]
    # Otherwise the best checkpoint so far would be forgotten, and overwritten.
    for name, value in record.best.items():
        settings += [f"--checkpoint.{name}", value if isinstance(value, str) else json.dumps(value)]
    # What is drawn in the rest of the run follows from its seed.
    if record.seed >= 0:
        settings += ["--seed_everything", str(record.seed)]
    # Images to predict on are decoded as the network wants them, so the training images need not be there.
    if not predicting:
        kind = look_up(DATA, record.data["name"], "data set")
        data = {"class_path": f"zoo.data.{kind.__name__}", "init_args": recorded_arguments(record.data)}
        settings += ["--data", json.dumps(data)]
    return settings


def network_settings(record: RunRecord) -> dict[str, Any]:
    """Return the settings of ``Classifier`` that build a checkpoint's network, whatever its run started from."""
    spec = record.spec
    network = {"architecture": spec.architecture, "architecture_args": dict(spec.model_args)}
    operator = spec.operator.to_dict() if spec.operator else PLAIN
    return {**network, "operator": operator, **BEGINNING}
