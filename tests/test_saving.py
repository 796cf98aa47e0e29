"""Going on to the bit, saving that loses nothing, and stops that save."""

import contextlib
import errno
import hashlib
import itertools
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import lightning as L
import numpy
import pytest
import torch
from PIL import Image

from zoo.data import Digits, ImageFolder
from zoo.resuming.files import SEAL_LENGTH, SafeCheckpointIO, damage_of
from zoo.resuming.folder import usable_checkpoint
from zoo.resuming.last_checkpoint import LastCheckpoint
from zoo.resuming.record import read_lightning_checkpoint
from zoo.training.adversarial import AdversarialTraining
from zoo.training.classifier import Classifier

ROOT = Path(__file__).resolve().parent.parent
LEARNED = {"name": "tanh_cosine", "radius_mode": "learned", "radius_relative": True}
# Epochs and batches of the runs below.
EPOCHS, BATCHES = 3, 5

# Whatever is drawn while a network trains: augmentation, dropout, mixed images, random starts of attacks.
SETTINGS = {
    "learned": {"operator": LEARNED},
    "dropout": {"architecture": "efficientnet_b0", "architecture_args": {"drop_rate": 0.2, "drop_path_rate": 0.1}},
    "mixup": {"operator": "conv", "mixup": 0.4, "optimizer": "sgd"},
    "averaged": {"operator": LEARNED, "ema": 0.9},
    "frozen": {"init_from": "digits_cnn6_tanh_cosine", "freeze_epochs": 2},
    "resting": {"init_from": "digits_cnn6_tanh_cosine", "freeze_norms": True},
    "attacked": {"operator": "ball_cosine", "adversarial": AdversarialTraining(eps=0.1, steps=2)},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder of 60 training images of two classes and a few others."""
    root = tmp_path_factory.mktemp("images")
    noise = numpy.random.default_rng(0)
    for split, name, place in itertools.product(("train", "val"), ("a", "b"), range(30)):
        if split == "train" or place < 3:
            path = root / split / name / f"{place}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(noise.integers(0, 256, (12, 12, 3), dtype=numpy.uint8)).save(path)
    return root


class StopAt(L.Callback):
    """Sends this process a signal while the step of a batch is under way."""

    def __init__(self, epoch, batch, number=signal.SIGTERM):
        self.place = (epoch, batch)
        self.number = number

    def on_after_backward(self, trainer, module):
        if (trainer.current_epoch, trainer.fit_loop.epoch_loop.batch_idx) == self.place:
            os.kill(os.getpid(), self.number)


class OtherDraws(L.Callback):
    """Lets what was drawn before training not matter."""

    def on_train_start(self, trainer, module):
        torch.manual_seed(time.monotonic_ns())


def fit(folder, data, *callbacks, ckpt_path=None, **arguments):
    settings = arguments.pop("settings", {"operator": LEARNED})
    L.seed_everything(0, verbose=False)
    classifier = Classifier(**settings)
    defaults = {"max_epochs": EPOCHS, "limit_train_batches": BATCHES, "limit_val_batches": 1, "devices": 1}
    arguments = {"accelerator": "cpu", "plugins": SafeCheckpointIO(), **defaults, **arguments}
    settings = {"monitor": "val_accuracy", "mode": "max", "enable_version_counter": False}
    best = L.pytorch.callbacks.ModelCheckpoint(folder, filename="best", **settings)
    trainer = L.Trainer(
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        # As the command line has them.
        callbacks=[OtherDraws(), *callbacks, best, LastCheckpoint()],
        **arguments,
    )
    trainer.fit(classifier, datamodule=data, ckpt_path=ckpt_path, weights_only=True)
    return classifier


def digest(module):
    digest = hashlib.sha256()
    for name, value in module.state_dict().items():
        digest.update(name.encode() + value.numpy(force=True).tobytes())
    return digest.hexdigest()


def stopped(folder, data, epoch, batch, number=signal.SIGTERM, **arguments):
    """Train until a signal in the step of a batch; return the exit status."""
    with pytest.raises(SystemExit) as stop:
        fit(folder, data, StopAt(epoch, batch, number), **arguments)
    return stop.value.code


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_a_run_goes_on_to_the_bit_from_any_batch(settings, tmp_path):
    def data():
        return Digits(batch_size=16, augment="crop_flip_cutout")

    settings = {"settings": settings}
    whole = digest(fit(tmp_path / "whole", data(), **settings))
    # In an epoch, in its last step, and in the first of one.
    for epoch, batch in ((0, 2), (0, BATCHES - 1), (1, 0), (2, 3)):
        folder = tmp_path / f"{epoch}_{batch}"
        assert stopped(folder, data(), epoch, batch, **settings) == 128 + signal.SIGTERM
        saved = read_lightning_checkpoint(folder / "last.ckpt")
        assert saved["global_step"] == epoch * BATCHES + batch + 1
        assert saved["decoupled_zoo"]["training"]["epochs"] == epoch + (batch == BATCHES - 1)
        assert digest(fit(folder, data(), ckpt_path=folder / "last.ckpt", **settings)) == whole, (epoch, batch)


@pytest.mark.parametrize(("workers", "augment"), [(0, "crop_flip"), (2, "crop_flip"), (2, "resized_crop_flip")])
def test_a_run_on_images_from_disk_goes_on_to_the_bit(workers, augment, folder, tmp_path):
    """With any number of workers, and as from memory."""

    def data(workers, limit=0):
        settings = {"num_workers": workers, "memory_limit_mb": limit, "batch_size": 8, "augment": augment}
        return ImageFolder(str(folder), input_size=8, **settings)

    whole = digest(fit(tmp_path / "whole", data(0, limit=2048)))
    assert stopped(tmp_path / "run", data(workers), 1, 2) == 128 + signal.SIGTERM
    assert digest(fit(tmp_path / "run", data(2 - workers), ckpt_path=tmp_path / "run/last.ckpt")) == whole


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "16-mixed"])
def test_a_run_on_a_gpu_goes_on_to_the_bit(precision, tmp_path):
    settings = {"accelerator": "gpu", "deterministic": True, "precision": precision}
    whole = digest(fit(tmp_path / "whole", Digits(batch_size=16), **settings))
    assert stopped(tmp_path / "run", Digits(batch_size=16), 1, 2, **settings) == 128 + signal.SIGTERM
    resumed = fit(tmp_path / "run", Digits(batch_size=16), ckpt_path=tmp_path / "run/last.ckpt", **settings)
    assert digest(resumed) == whole


def test_accumulated_gradients_are_finished_before_a_stop(tmp_path):
    settings = {"accumulate_grad_batches": 2}
    whole = digest(fit(tmp_path / "whole", Digits(batch_size=16), **settings))
    for batch, step in ((0, 1), (2, 2)):
        folder = tmp_path / f"{batch}"
        stopped(folder, Digits(batch_size=16), 0, batch, **settings)
        assert read_lightning_checkpoint(folder / "last.ckpt")["global_step"] == step
        resumed = fit(folder, Digits(batch_size=16), ckpt_path=folder / "last.ckpt", **settings)
        assert digest(resumed) == whole


class Enough(L.Callback):
    """Stops a run after a batch, as the end of its time does, or in the validation after it."""

    def __init__(self, epoch, batch, validating=False):
        self.place, self.validating = (epoch, batch), validating

    def stop(self, trainer, validating):
        here = trainer.current_epoch, trainer.fit_loop.epoch_loop.batch_idx
        trainer.should_stop |= (here, validating) == (self.place, self.validating)

    def on_train_batch_end(self, trainer, *_):
        self.stop(trainer, validating=False)

    def on_validation_end(self, trainer, module):
        self.stop(trainer, validating=True)


@pytest.mark.parametrize(
    "stop",
    [
        lambda: (Enough(1, 2), None),
        lambda: (Enough(1, 2, validating=True), None),
        lambda: (Validations(step=4, fails=True), OSError),
        lambda: (Validations(step=4), SystemExit),
        lambda: (StopAt(1, 2), SystemExit),
    ],
    ids=["time", "stopped by a validation", "killed in validation", "signal in validation", "signal"],
)
def test_what_stops_between_two_steps_loses_no_gradient(stop, tmp_path):
    """Validation after the third batch of five, two of which make a step."""

    def train(folder, *callbacks, path=None):
        settings = {"accumulate_grad_batches": 2, "val_check_interval": 3, "limit_val_batches": 3, "ckpt_path": path}
        return fit(folder, Digits(batch_size=16), *callbacks, **settings)

    whole = digest(train(tmp_path / "whole"))
    stopping, error = stop()
    with pytest.raises(error) if error else contextlib.nullcontext():
        train(tmp_path / "run", stopping)
    assert read_lightning_checkpoint(tmp_path / "run/last.ckpt")["global_step"] < 3 * EPOCHS
    assert digest(train(tmp_path / "run", path=tmp_path / "run/last.ckpt")) == whole


@pytest.mark.parametrize(
    "arguments", [{"max_steps": 7, "max_epochs": -1}, {"max_time": {"milliseconds": 1}}], ids=["max_steps", "max_time"]
)
def test_what_ends_within_an_epoch_goes_on_within_it(arguments, tmp_path):
    settings = {"settings": {"operator": LEARNED, "schedule": "constant", "warmup": 0.0}}
    whole = digest(fit(tmp_path / "whole", Digits(batch_size=16), **settings))
    calls = 0
    path, done = None, 0
    while done < EPOCHS * BATCHES:
        last = {} if calls and "max_steps" in arguments else arguments
        classifier = fit(tmp_path / "parts", Digits(batch_size=16), ckpt_path=path, **{**settings, **last})
        path = tmp_path / "parts/last.ckpt"
        done, calls = read_lightning_checkpoint(path)["global_step"], calls + 1
        assert calls <= 1 + EPOCHS * BATCHES
    assert calls > 1 and digest(classifier) == whole


class Validations(L.Callback):
    """Notes what each validation finds; in that of a step, it sends a signal, or fails as a killed process does."""

    def __init__(self, step=None, fails=False):
        self.step, self.fails, self.found = step, fails, []

    def on_validation_batch_start(self, trainer, module, batch, batch_index):
        if (trainer.global_step, batch_index) == (self.step, 1):
            if self.fails:
                raise OSError
            os.kill(os.getpid(), signal.SIGTERM)

    def on_validation_end(self, trainer, module):
        # With the place that loggers are told.
        place = trainer.current_epoch, trainer.global_step, trainer.fit_loop.epoch_loop._batches_that_stepped
        self.found.append((*place, trainer.callback_metrics["val_loss"].item()))


@pytest.mark.parametrize(
    ("interval", "stop"),
    [
        (1.0, lambda: (Validations(step=2 * BATCHES), SystemExit)),
        (2, lambda: (Validations(step=BATCHES + 2), SystemExit)),
        (2, lambda: (Validations(step=BATCHES + 2, fails=True), OSError)),
        (1.0, lambda: (StopAt(1, BATCHES - 1), SystemExit)),
        (2, lambda: (StopAt(1, 1), SystemExit)),
    ],
    ids=["signal", "signal within an epoch", "killed within an epoch", "signal just before", "just before within"],
)
@pytest.mark.parametrize("settings", [SETTINGS["learned"], SETTINGS["averaged"]], ids=["learned", "averaged"])
def test_a_validation_that_is_broken_off_is_begun_again(interval, stop, settings, tmp_path):
    def train(folder, *callbacks, path=None):
        validations = {"val_check_interval": interval, "limit_val_batches": 3, "ckpt_path": path}
        return fit(folder, Digits(batch_size=16), *callbacks, settings=settings, **validations)

    uninterrupted, first, rest = Validations(), Validations(), Validations()
    whole = digest(train(tmp_path / "whole", uninterrupted))
    stopping, error = stop()
    with pytest.raises(error):
        train(tmp_path / "run", first, stopping)
    assert digest(train(tmp_path / "run", rest, path=tmp_path / "run/last.ckpt")) == whole
    assert first.found and first.found + rest.found == uninterrupted.found
    assert {path.name for path in (tmp_path / "run").iterdir()} == {"best.ckpt", "last.ckpt", "previous.ckpt"}
    scores = (torch.load(tmp_path / name / "best.ckpt", weights_only=True)["global_step"] for name in ("run", "whole"))
    assert len(set(scores)) == 1


def test_what_a_validation_stops_within_an_epoch_goes_on_within_it(tmp_path):
    def train(folder, *callbacks, path=None):
        return fit(folder, Digits(batch_size=16), *callbacks, val_check_interval=2, ckpt_path=path)

    whole = digest(train(tmp_path / "whole"))
    train(tmp_path / "run", Enough(1, 1, validating=True))
    assert read_lightning_checkpoint(tmp_path / "run/last.ckpt")["global_step"] == BATCHES + 2
    assert digest(train(tmp_path / "run", path=tmp_path / "run/last.ckpt")) == whole


def test_a_run_can_be_saved_between(tmp_path):
    class Saved(L.Callback):
        def on_train_batch_end(self, trainer, *_):
            last = tmp_path / "last.ckpt"
            steps.append(read_lightning_checkpoint(last)["global_step"] if last.exists() else 0)

    steps = []
    L.seed_everything(0, verbose=False)
    best = L.pytorch.callbacks.ModelCheckpoint(tmp_path)
    trainer = L.Trainer(
        accelerator="cpu",
        max_steps=7,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[Saved(), LastCheckpoint(every_n_steps=3), best],
    )
    trainer.fit(Classifier(), datamodule=Digits())
    assert steps == [0, 0, 0, 3, 3, 3, 6]
    assert [read_lightning_checkpoint(tmp_path / name)["global_step"] for name in ("previous.ckpt", "last.ckpt")] == [
        6,
        7,
    ]
    with pytest.raises(ValueError, match="every_n_steps must be at least 1, got 0"):
        LastCheckpoint(0)


def save_until_killed(path):
    """Save again and again in another process; return its number."""
    content = {f"layer{place}": torch.full((1000, 1000), float(place)) for place in range(8)}
    # The first one is there, however slow the disk is.
    SafeCheckpointIO().save_checkpoint({"decoupled_zoo": {}, **content}, path)
    if process := os.fork():
        return process
    # What fails must not go on as a second run of the tests.
    try:
        while True:
            SafeCheckpointIO().save_checkpoint({"decoupled_zoo": {}, **content}, path)
    finally:
        os._exit(1)


@pytest.mark.parametrize("place", ["beside the temporary files", "on another file system"])
def test_a_killed_save_leaves_a_whole_checkpoint_and_no_litter(place, tmp_path, monkeypatch):
    folder = tmp_path / "run"
    if place == "on another file system":
        other = Path("/dev/shm")
        if not other.is_dir() or other.stat().st_dev == tmp_path.stat().st_dev:
            pytest.skip("there is one file system only")
        folder = other / f"decoupled_zoo_{os.getpid()}"
    folder.mkdir()
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    moments, litter = numpy.random.default_rng(0).uniform(0.05, 0.4, 20), 0
    try:
        for moment in moments:
            process = save_until_killed(folder / "last.ckpt")
            time.sleep(moment)
            os.kill(process, signal.SIGKILL)
            os.waitpid(process, 0)
            visible = [path for path in folder.iterdir() if path.suffix == ".ckpt"]
            assert all(damage_of(path) is None for path in visible)
            for path in visible:
                assert read_lightning_checkpoint(path)["layer7"].mean() == 7
            litter += len(list(folder.glob("*.part")))
        assert litter > 0 and (folder / "last.ckpt").exists()
        # The next run that begins there removes the litter, and nothing else.
        with pytest.raises(FileExistsError, match="has the checkpoints of a run; go on with it"):
            fit(folder, Digits(), max_epochs=1)
        assert {path.name for path in folder.iterdir()} == {"last.ckpt"}
    finally:
        for path in folder.iterdir():
            path.unlink()
        folder.rmdir()


def test_a_full_disk_leaves_what_was_there(tmp_path):
    saver, path = SafeCheckpointIO(), tmp_path / "last.ckpt"
    saver.save_checkpoint({"step": torch.tensor(1)}, path)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, limits[1]))
    try:
        with pytest.raises(OSError, match=r"last\.ckpt was not saved \(.*MiB are free there"):
            saver.save_checkpoint({"step": torch.zeros(1 << 20)}, path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, before)
    assert torch.load(path)["step"] == 1 and [file.name for file in tmp_path.iterdir()] == ["last.ckpt"]


def test_what_cannot_be_read_back_takes_no_place(tmp_path, monkeypatch):
    def damaged(content, file):
        save(content, file)
        file.seek(-2000, os.SEEK_END)
        file.write(b"damaged")

    saver, path, save = SafeCheckpointIO(), tmp_path / "last.ckpt", torch.save
    saver.save_checkpoint({"step": torch.zeros(1000)}, path)
    monkeypatch.setattr(torch, "save", damaged)
    with pytest.raises(OSError, match=r"last\.ckpt was not saved, for what was written could not be read back"):
        saver.save_checkpoint({"step": torch.ones(1000)}, path)
    assert torch.load(path)["step"].sum() == 0 and len(list(tmp_path.iterdir())) == 1


def test_any_changed_bit_is_damage(tmp_path):
    path = tmp_path / "last.ckpt"
    SafeCheckpointIO().save_checkpoint({"decoupled_zoo": {}, "layer": torch.arange(3.0)}, path)
    assert damage_of(path) is None and read_lightning_checkpoint(path)["layer"].tolist() == [0, 1, 2]
    whole = path.read_bytes()
    for place in range(len(whole)):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1 << place % 8]) + whole[place + 1 :])
        if damage_of(path) is None:
            # Of the seal's own first letters or length: all before it is as it was.
            assert torch.load(path)["layer"].tolist() == [0, 1, 2] and place >= len(whole) - SEAL_LENGTH - 2, place


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.EIO])
def test_a_file_system_without_locks_is_trained_on_without(number, tmp_path, monkeypatch):
    def flock(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("fcntl.flock", flock)
    if number == errno.EIO:
        with pytest.raises(ValueError, match="checkpoints cannot be written to .*Input/output error"):
            fit(tmp_path, Digits(), max_epochs=1)
        return
    fit(tmp_path, Digits(), max_epochs=1)
    assert (tmp_path / "last.ckpt").exists()


def test_a_run_that_waited_for_another_does_not_begin_anew_over_its_checkpoint(tmp_path):
    class Late(L.Callback):
        """Saves where the command line has looked for checkpoints, before the run has the folder to itself."""

        def setup(self, trainer, module, stage):
            (tmp_path / "last.ckpt").write_bytes(b"another run's")

    with pytest.raises(FileExistsError, match="has the checkpoints of a run; go on with it"):
        fit(tmp_path, Digits(), Late(), max_epochs=1)
    assert (tmp_path / "last.ckpt").read_bytes() == b"another run's"
    assert {path.name for path in tmp_path.iterdir()} == {"last.ckpt"}


@pytest.mark.parametrize("damage", ["missing", "empty", "one bit"])
def test_a_run_goes_on_with_the_checkpoint_before_a_damaged_one(damage, tmp_path):
    whole = digest(fit(tmp_path / "whole", Digits(batch_size=16)))
    tmp_path = tmp_path / "run"
    last = tmp_path / "last.ckpt"
    stopped(tmp_path, Digits(batch_size=16), EPOCHS - 1, 2)
    content = bytearray(last.read_bytes())
    content[len(content) // 2] ^= 1
    if damage == "missing":
        last.unlink()
    else:
        last.write_bytes(b"" if damage == "empty" else content)
    with pytest.warns(UserWarning, match=r"last\.ckpt.*; going on with the one before it, .*previous\.ckpt"):
        path = usable_checkpoint(last)
    assert read_lightning_checkpoint(path)["global_step"] == (EPOCHS - 1) * BATCHES
    before = Path(path).read_bytes()
    with pytest.raises(OSError):
        broken_off = Validations(step=EPOCHS * BATCHES, fails=True)
        fit(tmp_path, Digits(batch_size=16), broken_off, limit_val_batches=2, ckpt_path=path)
    # What was damaged has not taken the place of what was sound.
    assert (tmp_path / "previous.ckpt").read_bytes() == before
    assert digest(fit(tmp_path, Digits(batch_size=16), ckpt_path=last)) == whole
    last.write_bytes(b"")
    (tmp_path / "previous.ckpt").write_bytes(b"")
    with pytest.raises(
        ValueError, match=r"last\.ckpt cannot be read .*it is damaged, or another kind of file; use another checkpoint"
    ):
        usable_checkpoint(last)


COMMAND = "fit --data Digits --data.batch_size 16 --trainer.max_epochs 3 --checkpoint.dirpath {}"


def start_training(folder, number=None):
    """Start the command, which is sent a signal of this number at step 100, five quarters of the first epoch."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    stop = {"SIGNAL": str(int(number)), "STEP": "100"} if number else {}
    command = [sys.executable, str(ROOT / "tests/signalled.py"), *COMMAND.format(folder).split()]
    streams = {"stderr": subprocess.PIPE, "stdout": subprocess.DEVNULL, "text": True}
    return subprocess.Popen(command, cwd=folder.parent, env={**environment, **stop}, **streams)


def told_by(run):
    """Return the status of a run that has ended, and what it told."""
    with run:
        told = run.communicate(timeout=300)[1]
    return run.returncode, " ".join(told.split())


def weights(path):
    return {name: value.tolist() for name, value in read_lightning_checkpoint(path)["state_dict"].items()}


def test_the_same_command_goes_on_after_a_signal(tmp_path):
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
    stopped = {number: start_training(tmp_path / number.name, number) for number in numbers}
    whole = start_training(tmp_path / "whole")
    for number, run in stopped.items():
        status, told = told_by(run)
        assert status == 128 + number, told
        assert "saving before stopping" in told and "to go on, give the same command again" in told
        assert "last.ckpt holds step 101;" in told
        assert read_lightning_checkpoint(tmp_path / number.name / "last.ckpt")["global_step"] == 101
    assert told_by(whole)[0] == 0
    resumed = {number: start_training(tmp_path / number.name) for number in numbers}
    for number, run in resumed.items():
        status, told = told_by(run)
        assert status == 0 and "last.ckpt, which the same command has left" in told, told
        assert weights(tmp_path / number.name / "last.ckpt") == weights(tmp_path / "whole/last.ckpt")
        record = read_lightning_checkpoint(tmp_path / number.name / "last.ckpt")["decoupled_zoo"]["training"]
        assert record["epochs"] == 3 and record["command"].count("train.py") == 1
    status, told = told_by(start_training(tmp_path / "SIGTERM"))
    assert status == 0 and "nothing was trained" in told
