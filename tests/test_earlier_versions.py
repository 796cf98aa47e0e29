"""What earlier versions wrote goes on: runs, to the bit, and the class paths that recipes and checkpoints name."""

import dataclasses
import importlib
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import lightning as L
import pytest
import torch
from lightning.pytorch.cli import LightningArgumentParser
from PIL import Image

from zoo.data import DATA, ImageData
from zoo.models.spec import ModelSpec
from zoo.resuming.record import record_of
from zoo.training import ckpt_path
from zoo.training.ckpt_path import checkpoint_settings, hash_of

ROOT = Path(__file__).resolve().parent.parent
# A run of version 0.1, stopped by SIGTERM in its second epoch, after this step.
EARLIER, STEP = ROOT / "tests" / "earlier_run" / "last.ckpt", 11
# In float64, so that what another processor rounds otherwise stays far below what a wrong step would change.
COMMAND = """
    fit --seed_everything 3 --data.batch_size 32 --data.augment crop_flip_cutout --model.mixup 0.2
    --model.architecture cnn9 --model.architecture_args {"widths":[4,4,4],"hidden":8}
    --model.operator {"name":"tanh_cosine","radius_mode":"learned","radius_relative":true}
    --trainer.max_epochs 2 --trainer.limit_train_batches 8 --trainer.precision 64-true --trainer.accelerator cpu
    --trainer.callbacks WeightProjection --trainer.callbacks.every_n_steps 3
""".split()


def fit(folder, step=-1):
    """Run the command with that folder, let it be stopped in a step, and return the exit status and what it told."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "SIGNAL": str(int(signal.SIGTERM)), "STEP": str(step)}
    words = [sys.executable, "-m", "tests.signalled", *COMMAND, "--checkpoint.dirpath", folder.name]
    done = subprocess.run(words, cwd=folder.parent, env=environment, capture_output=True, text=True)
    return done.returncode, done.stderr


def tensors(file):
    return torch.load(file, weights_only=True)["state_dict"]


def test_a_run_of_an_earlier_version_goes_on_by_the_same_command_to_the_bit(tmp_path):
    run, whole, again = (tmp_path / name for name in ("run", "whole", "again"))
    run.mkdir()
    shutil.copy(EARLIER, run)
    status, told = fit(run)
    assert status == 0 and "going on with run/last.ckpt, which the same command has left" in told
    assert fit(whole)[0] == 0
    assert fit(again, step=STEP - 1)[0] == 128 + signal.SIGTERM
    mine, theirs = tensors(run / "last.ckpt"), tensors(whole / "last.ckpt")
    assert mine.keys() == theirs.keys() and len(mine) > 50
    # A processor that rounds as the one that wrote the checkpoint has to end with the very same weights.
    begun, beginning = tensors(EARLIER), tensors(again / "last.ckpt")
    tolerance = 0 if all(begun[name].equal(beginning[name]) for name in begun) else 1e-9
    for name, value in mine.items():
        torch.testing.assert_close(value, theirs[name], rtol=tolerance, atol=tolerance, msg=name)


@pytest.mark.parametrize(
    "path",
    [
        *(f"zoo.data.{name}" for name in ("Digits", "MNIST", "CIFAR10", "CIFAR100", "ImageFolder")),
        *(f"zoo.callbacks.{name}" for name in ("WeightProjection", "WeightedGradients", "MovingAverage")),
    ],
)
def test_class_paths_that_recipes_name_stay(path):
    module, _, name = path.rpartition(".")
    assert isinstance(getattr(importlib.import_module(module), name), type)


@pytest.mark.parametrize("name", DATA)
def test_data_sets_are_recorded_by_the_class_paths_that_they_had(name, tmp_path, monkeypatch):
    """In the options that a checkpoint stands for, and in the settings of which a run has the hash."""
    # ImageTable has no earlier version, but its own path must stay from now on, too.
    arguments = {"ImageFolder": {"root": str(write_images(tmp_path))}, "ImageTable": {"table": "labels.csv"}}.get(
        name, {}
    )
    record = dataclasses.replace(record_of(EARLIER), data={"name": name, "arguments": arguments})
    monkeypatch.setattr(ckpt_path, "record_of", lambda path: record)
    options = checkpoint_settings(str(EARLIER), predicting=False)
    assert json.loads(options[options.index("--data") + 1])["class_path"] == f"zoo.data.{name}"
    for given in (name, f"zoo.data.{name}"):
        place = "".join(f" --data.{option} {value}" for option, value in arguments.items())
        assert settings_of_command(f"--data {given}{place}").data.class_path == f"zoo.data.{name}"


@pytest.mark.parametrize(
    ("recorded", "name"), [("resnet10t.c3_in1k", "resnet10t"), ("tv_resnet50", "resnet50"), ("resnet20", "resnet20")]
)
def test_names_of_architectures_that_were_recorded_are_those_of_today(recorded, name):
    fields = record_of(EARLIER).spec.to_dict() | {"architecture": recorded, "model_args": {}}
    assert ModelSpec.from_dict(fields).architecture == name
    fields |= {"architecture": "decoupled_zoo", "model_args": {"architecture": recorded}}
    assert ModelSpec.from_dict(fields).architecture == name


def test_callbacks_have_the_hash_that_they_had():
    given = ("WeightProjection", "zoo.callbacks.WeightProjection", "zoo.training.callbacks.WeightProjection")
    hashes = {hash_of(settings_of_command(f"--trainer.callbacks {path}")) for path in given}
    assert len(hashes) == 1 and hashes != {hash_of(settings_of_command("--trainer.callbacks WeightedGradients"))}


def write_images(folder):
    for name in ("a", "b"):
        (folder / "train" / name).mkdir(parents=True, exist_ok=True)
        Image.new("L", (8, 8)).save(folder / "train" / name / "0.png")
    return folder


def settings_of_command(options):
    """Return the settings of ``train.py fit`` with these options, as they are hashed, without running it."""
    parser = LightningArgumentParser(exit_on_error=False)
    parser.add_lightning_class_args(ImageData, "data", subclass_mode=True, required=False)
    parser.add_lightning_class_args(L.Trainer, "trainer")
    parser.add_argument("--checkpoint.dirpath", default=None)
    parser.set_defaults({"data": {"class_path": "zoo.data.Digits"}})
    return parser.parse_args(options.split())
