"""Two processes on this machine (gloo) against one with the same global batch, by the command line of train.py."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy
import pytest
import torch
import yaml
from PIL import Image

import zoo
from zoo.resuming.record import read_lightning_checkpoint

ROOT = Path(__file__).resolve().parent.parent
BATCHES = 5
RECIPE = {
    "model": {
        "architecture": "cnn9",
        # Statistics of BatchNorm are those of a process, unless --trainer.sync_batchnorm (GPUs only) says otherwise.
        "architecture_args": {"batch_norm": False},
        "operator": {"name": "tanh_cosine", "radius_mode": "learned", "radius_relative": True},
        "optimizer": "sgd",
        "schedule": "constant",
        "warmup": 0.0,
        "learning_rate": 0.01,
    },
    "data": {"class_path": "Digits", "init_args": {"augment": "crop"}},
    "trainer": {"max_epochs": 2, "limit_train_batches": BATCHES, "accelerator": "cpu"},
}
STRATEGIES = {
    "one": [],
    "ddp": ["--trainer.devices=2", "--trainer.strategy=ddp"],
    "fsdp": [
        "--trainer.devices=2",
        "--trainer.strategy=ModelParallelStrategy",
        "--trainer.strategy.data_parallel_size=2",
        "--trainer.strategy.tensor_parallel_size=1",
        "--trainer.strategy.save_distributed_checkpoint=false",
        "--trainer.strategy.process_group_backend=gloo",
    ],
}


def command(folder, strategy, *options, script="train.py"):
    recipe = folder / "recipe.yaml"
    if not recipe.exists():
        recipe.write_text(yaml.safe_dump(RECIPE))
    batch = ["--data.batch_size=32" if strategy == "one" else "--data.batch_size=16"]
    words = ["--config", str(recipe), *batch, *STRATEGIES[strategy], "--checkpoint.dirpath", str(folder / strategy)]
    return [sys.executable, str(ROOT / script), "fit", *words, *options]


def environment(folder):
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "XDG_CACHE_HOME": str(folder / "caches")}


def train(folder, strategy, *options, script="train.py"):
    run = subprocess.run(
        command(folder, strategy, *options, script=script),
        cwd=folder,
        env=environment(folder),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    return read_lightning_checkpoint(folder / strategy / "last.ckpt")


def validated(checkpoint):
    (state,) = (state for name, state in checkpoint["callbacks"].items() if name.startswith("ModelCheckpoint"))
    return state["current_score"].item()


def assert_same_weights(one, other, **tolerance):
    for name, value in one["state_dict"].items():
        torch.testing.assert_close(other["state_dict"][name], value, msg=name, **tolerance)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    return folder, {name: train(folder, name) for name in STRATEGIES}


def test_one_step_of_two_processes_has_the_gradient_of_one(tmp_path):
    """In double precision, where the order of sums does not hide anything; running means of radii among the values."""
    options = ["--trainer.max_steps=1", "--trainer.precision=64-true"]
    one, two = (train(tmp_path, name, *options) for name in ("one", "ddp"))
    assert_same_weights(one, two, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_two_processes_train_as_one(runs, strategy):
    _, trained = runs
    one, two = trained["one"], trained[strategy]
    assert one["global_step"] == two["global_step"] == 2 * BATCHES
    assert_same_weights(one, two, rtol=1e-4, atol=1e-6)
    # Each image of the validation split counts once.
    assert validated(one) == validated(two)


def test_the_whole_state_of_shards_becomes_a_checkpoint_like_that_of_one_process(runs):
    folder, _ = runs
    for name in ("one", "fsdp"):
        export = [sys.executable, "-m", "zoo", "export", str(folder / name / "last.ckpt"), "digits_cnn9_tanh_cosine"]
        run = subprocess.run([*export, "--to", str(folder / f"{name}_zoo")], cwd=folder, env=environment(folder))
        assert run.returncode == 0
    configs, models = [], []
    for name in ("one", "fsdp"):
        path = folder / f"{name}_zoo/digits_cnn9_tanh_cosine"
        assert not zoo.verify(path)
        configs.append(json.loads((path / "config.json").read_text()))
        models.append(zoo.load(path))
    for field in ("architecture", "model_args", "operator", "class_names", "metrics"):
        assert configs[0][field] == configs[1][field], field
    images = torch.rand(4, 1, 8, 8)
    torch.testing.assert_close(*(model(images) for model in models), rtol=1e-4, atol=1e-5)


def test_shards_go_on_to_the_bit(runs, tmp_path):
    _, trained = runs
    train(tmp_path, "fsdp", "--trainer.max_steps=7")
    resumed = train(tmp_path, "fsdp", "--ckpt_path", str(tmp_path / "fsdp/last.ckpt"))
    assert_same_weights(trained["fsdp"], resumed, rtol=0, atol=0)


def test_a_signal_to_the_first_process_stops_and_saves_all(runs, tmp_path):
    folder = tmp_path / "ddp"
    script = "tests/signalled.py"
    words = command(tmp_path, "ddp", script=script)
    stop = {"SIGNAL": str(int(signal.SIGTERM)), "STEP": str(BATCHES + 2)}
    stopped = subprocess.run(
        words, cwd=tmp_path, env={**environment(tmp_path), **stop}, capture_output=True, text=True, timeout=300
    )
    assert stopped.returncode == 128 + signal.SIGTERM, stopped.stderr[-3000:]
    assert read_lightning_checkpoint(folder / "last.ckpt")["global_step"] == BATCHES + 3
    assert_same_weights(runs[1]["ddp"], train(tmp_path, "ddp", script=script), rtol=0, atol=0)


# The second process is where it cannot hear that the first one fails, as NCCL's are.
WAITING = """
import os
import resource
import time

import lightning as L

from zoo.commands.console import readable_errors
from zoo.training.cli import run


class Wait(L.Callback):
    def on_validation_start(self, trainer, module):
        if trainer.global_rank:
            print("waiting", os.getpid(), flush=True)
            time.sleep(600)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))


with readable_errors():
    run(callbacks=[Wait()])
"""


def has_ended(process):
    """Return whether there is no such process, or one that waits to be reaped only."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="processes are looked for as Linux shows them")
def test_a_full_disk_ends_all_processes(tmp_path):
    script = tmp_path / "train.py"
    script.write_text(WAITING)
    words = command(tmp_path, "ddp", script=script)
    settings = {"cwd": tmp_path, "env": environment(tmp_path), "capture_output": True, "text": True}
    run = subprocess.run(words, timeout=300, **settings)
    assert run.returncode == 1 and re.search(
        r"^error: .*last\.ckpt was not saved \(.*File too large", run.stderr, re.MULTILINE
    )
    (waiting,) = re.findall(r"waiting (\d+)", run.stdout)
    for _ in range(100):
        if has_ended(waiting):
            break
        time.sleep(0.1)
    assert has_ended(waiting)
    assert not list(tmp_path.rglob("*.part"))


def test_one_process_examines_the_images_and_the_others_take_its_word(tmp_path):
    noise = numpy.random.default_rng(0)
    for split, name in (("train", "a"), ("train", "b"), ("val", "a"), ("val", "b")):
        (tmp_path / "photos" / split / name).mkdir(parents=True)
        for place in range(8):
            pixels = noise.integers(0, 256, (8, 8, 3), dtype=numpy.uint8)
            Image.fromarray(pixels).save(tmp_path / "photos" / split / name / f"{place}.png")
    (tmp_path / "photos/train/a/0.png").write_bytes(b"")
    options = ["--data=ImageFolder", "--data.root=photos", "--data.input_size=8", "--data.memory_limit_mb=0"]
    run = subprocess.run(
        [*command(tmp_path, "ddp"), *options, "--data.batch_size=4", "--data.num_workers=1", "--trainer.max_epochs=1"],
        cwd=tmp_path,
        env=environment(tmp_path),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    # Processes that wrote it at once would have left drafts, or each a record.
    assert [path.suffix for path in (tmp_path / "caches/decoupled_zoo").iterdir()] == [".json"] * 2
