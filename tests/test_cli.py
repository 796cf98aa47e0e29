"""``train.py`` and ``python -m zoo`` as a person uses them: recipes, resuming, predicting, and every wrong input."""

import csv
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image
from sklearn.datasets import load_digits

import train
import zoo
from tests.command_line import SHORT, fit, make_photos
from zoo.checkpoints.catalogue import PRETRAINED
from zoo.checkpoints.config import headline
from zoo.commands import console as command_line
from zoo.data import DATA
from zoo.models import building
from zoo.recipes import recipe as recipes
from zoo.resuming import folder as run_folder
from zoo.resuming import record
from zoo.resuming.files import SafeCheckpointIO
from zoo.resuming.record import record_of
from zoo.training.classifier import Classifier

ROOT = Path(__file__).resolve().parent.parent

RECIPES = sorted((ROOT / "configs").glob("*.yaml"))

DIGITS = [name for name in zoo.list_checkpoints() if name.startswith("digits_")]

pytestmark = [
    # Two steps are fewer than the logging interval that real recipes have.
    pytest.mark.filterwarnings("ignore:The number of training batches"),
]


def test_fit_alone_trains_a_decoupled_network_on_digits(run):
    status, _, errors = run("fit", *SHORT)
    assert status == 0, errors
    (folder,) = Path("outputs/runs").iterdir()
    assert {"config.yaml", "metrics.csv", "checkpoints"} <= {path.name for path in folder.iterdir()}
    kept = {path.name for path in (folder / "checkpoints").iterdir()}
    assert kept == {"best.ckpt", "last.ckpt", "previous.ckpt"}
    record = torch.load(folder / "checkpoints/last.ckpt", weights_only=True)["decoupled_zoo"]
    assert record["spec"]["model_args"] == {"architecture": "cnn6"} and record["data"]["name"] == "Digits"


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_is_understood(run, recipe):
    status, printed, errors = run("fit", "--config", recipe, "--print_config")
    assert status == 0, errors
    written, understood = yaml.safe_load(recipe.read_text()), yaml.safe_load(printed)
    for setting, value in written["model"].items():
        shown = understood["model"][setting]
        assert shown == value or shown == {**shown, **value}
    assert understood["trainer"]["max_epochs"] == written["trainer"]["max_epochs"]
    data = written["data"] if isinstance(written["data"], dict) else {"class_path": written["data"], "init_args": {}}
    assert understood["data"]["class_path"].split(".")[-1] == data["class_path"].split(".")[-1]
    for setting, value in data["init_args"].items():
        assert understood["data"]["init_args"][setting] == value


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_the_recipes_for_many_gpus_are_understood(run, strategy):
    files = [f"--config={ROOT / 'configs/scaling' / name}.yaml" for name in ("imagenet", strategy)]
    status, printed, errors = run("fit", *files, "--trainer.num_nodes=4", "--print_config")
    assert status == 0, errors
    settings = yaml.safe_load(printed)
    assert settings["trainer"]["devices"] == 8 and settings["model"]["architecture"] == "resnet18"
    assert settings["last"]["every_n_steps"] == 500 and settings["trainer"]["precision"] == "bf16-mixed"


def test_every_embedded_checkpoint_has_its_recipe():
    assert set(zoo.list_checkpoints()) <= {path.stem for path in RECIPES}


def test_a_checkpoint_stands_for_its_own_settings(run):
    path = fit(run, "--model.operator.name=ball_cosine", "--model.operator.radius=2.0", "--data.batch_size=32")
    for subcommand in ("validate", "test", "predict"):
        status, printed, errors = run(subcommand, "--ckpt_path", path)
        assert status == 0, errors
    assert "test image 0" in printed
    status, _, errors = run("fit", *SHORT, "--ckpt_path", path, "--trainer.max_epochs=2")
    assert status == 0, errors
    saved = torch.load(path, weights_only=True)
    assert saved["global_step"] == 4 and saved["decoupled_zoo"]["spec"]["operator"]["radius"] == 2.0
    assert saved["decoupled_zoo"]["data"]["arguments"]["batch_size"] == 32
    assert {file.name for file in path.parent.iterdir()} == {"best.ckpt", "last.ckpt", "previous.ckpt"}


def test_a_run_goes_on_with_its_own_seed(run):
    path = fit(run, "--seed_everything=7", "--trainer.max_epochs=2")
    status, _, errors = run("fit", *SHORT[2:], "--ckpt_path", path, "--trainer.max_epochs=3")
    assert status == 0, errors
    assert torch.load(path, weights_only=True)["decoupled_zoo"]["training"]["seed"] == 7


def test_a_trainer_that_would_do_nothing_is_refused(run):
    steps, shares = (
        ("accumulate_grad_batches", "max_epochs", "max_steps"),
        ("val_check_interval", "limit_train_batches"),
    )
    for name in (*steps, *shares, "check_val_every_n_epoch"):
        status, _, errors = run("fit", *SHORT, f"--trainer.{name}=0")
        assert status == 1 and re.search(f"--trainer.{name} must be (at least 1|more than 0).*, got 0", errors), name
    status, _, errors = run("fit", *SHORT, "--trainer.gradient_clip_val=-1")
    assert status == 1 and "--trainer.gradient_clip_val must not be negative, got -1" in errors


def test_a_run_goes_on_to_its_own_last_epoch(run):
    path = fit(run, "--trainer.max_epochs=2")
    status, _, errors = run("fit", *SHORT[2:], "--ckpt_path", path)
    assert status == 0, errors
    saved = torch.load(path, weights_only=True)
    assert saved["epoch"] == 1 and saved["decoupled_zoo"]["trainer"] == {"max_epochs": 2}


def test_a_run_that_has_ended_is_told_to_be_one(run):
    path = fit(run)
    before = torch.load(path, weights_only=True)["global_step"]
    status, _, _ = run("fit", *SHORT[2:], "--ckpt_path", path)
    assert status == 0 and torch.load(path, weights_only=True)["global_step"] == before
    assert f"nothing was trained: {path} is of a run that had ended, at step " in run.told()
    run("fit", *SHORT[2:], "--ckpt_path", path, "--trainer.max_epochs=2")
    assert "nothing was trained" not in run.told()


@pytest.mark.parametrize(
    ("step", "told"),
    [
        (1, "nothing is kept, for nothing was saved yet"),
        (3, "run/last.ckpt holds step 2; to go on, give the same command again if it names the folder"),
    ],
)
def test_a_second_control_c_tells_how_to_go_on(run, monkeypatch, step, told):
    def interrupted(self, batch, batch_index):
        if self.global_step == step:
            raise KeyboardInterrupt
        return training_step(self, batch, batch_index)

    training_step = Classifier.training_step
    monkeypatch.setattr(Classifier, "training_step", interrupted)
    # Lightning lets further Ctrl-C pass while it shuts down.
    monkeypatch.setattr("signal.signal", lambda *_: None)
    status, _, _ = run("fit", *SHORT, "--trainer.max_epochs=2", "--checkpoint.dirpath=run")
    assert status == 130 and told in run.told() and Path("run/last.ckpt").exists() == (step == 3)


def test_control_c_ends_other_commands_without_a_stack_trace(run, monkeypatch):
    monkeypatch.setattr("zoo.verify", lambda *_: signal.raise_signal(signal.SIGINT))
    assert run("verify", main=command_line.main) == (130, "", "")


@pytest.mark.parametrize("words", [("train-zoo", "--only", "digits_cnn6_conv"), ("table", "no_relu")], ids=" ".join)
def test_control_c_says_how_to_go_on_with_the_zoo(run, monkeypatch, words):
    monkeypatch.setattr("zoo.recipes.recipe.run", lambda *_: signal.raise_signal(signal.SIGINT))
    status, printed, errors = run(*words, "--scale=tiny" if "table" in words else "--to=.", main=command_line.main)
    assert (status, errors) == (130, "")
    assert printed.startswith("training on the ") and printed.count("\n") == 3
    assert printed.endswith("\nstopped; the same command goes on from what was saved\n")


def test_a_folder_with_another_run_is_left_alone(run):
    path = fit(run)
    before = path.read_bytes()
    status, _, errors = run("fit", *SHORT, "--checkpoint.dirpath", "run", "--model.warmup=0.2")
    assert status == 1 and "run/last.ckpt is of another command: python train.py fit " in errors
    assert path.read_bytes() == before


def test_a_best_checkpoint_alone_is_not_overwritten(run):
    path = fit(run)
    for name in ("last.ckpt", "previous.ckpt"):
        path.with_name(name).unlink()
    before = path.with_name("best.ckpt").read_bytes()
    status, _, errors = run("fit", *SHORT, "--checkpoint.dirpath", "run")
    assert status == 1 and "run/best.ckpt is another run's, and would be overwritten" in errors
    assert path.with_name("best.ckpt").read_bytes() == before


@pytest.mark.parametrize("first_is_best", [True, False])
def test_a_copied_run_knows_its_best_checkpoint(run, first_is_best):
    def best(path):
        callbacks = torch.load(path, weights_only=True)["callbacks"]
        return next(state for name, state in callbacks.items() if name.startswith("ModelCheckpoint"))

    last = fit(run, "--checkpoint.monitor=val_loss")
    if first_is_best:
        # No later loss is as low as this one.
        content = torch.load(last, weights_only=True)
        for name, state in content["callbacks"].items():
            if name.startswith("ModelCheckpoint"):
                score = torch.tensor(0.0)
                paths = dict.fromkeys(state["best_k_models"], score)
                state |= {"best_model_score": score, "kth_value": score, "best_k_models": paths}
        SafeCheckpointIO().save_checkpoint(content, last)
    before = best(last)
    shutil.copytree("run", "copy")
    status, _, errors = run("fit", *SHORT[2:], "--ckpt_path", "copy/last.ckpt", "--trainer.max_epochs=2")
    assert status == 0, errors
    assert {path.name for path in Path("copy").glob("*.ckpt")} == {"best.ckpt", "last.ckpt", "previous.ckpt"}
    after = best("copy/last.ckpt")
    assert Path(after["best_model_path"]) == Path("copy/best.ckpt").resolve() and len(after["best_k_models"]) == 1
    # The loss of the second epoch is smaller than that of the first.
    assert (after["best_model_score"] == before["best_model_score"]) == first_is_best
    assert after["best_model_score"] <= before["best_model_score"]
    assert (Path("copy/best.ckpt").read_bytes() == Path("run/best.ckpt").read_bytes()) == first_is_best


def test_other_words_for_the_same_settings_go_on(run):
    Path("recipe.yaml").write_text("model: {learning_rate: 0.01}\ntrainer: {max_epochs: 1}\n")
    folder = ("--checkpoint.dirpath", "run")
    assert run("fit", *folder, *SHORT, "--model.learning_rate=0.01")[0] == 0
    status, _, errors = run("fit", "--config=recipe.yaml", *SHORT[2:], "--checkpoint.dirpath=./run/")
    assert status == 0 and "nothing was trained" in run.told(), errors
    Path("recipe.yaml").write_text("model: {learning_rate: 0.02}\ntrainer: {max_epochs: 1}\n")
    status, _, errors = run("fit", "--config=recipe.yaml", *SHORT[2:], "--checkpoint.dirpath=run")
    assert status == 1 and "run/last.ckpt is of another command" in errors


@pytest.mark.filterwarnings("ignore:The dirpath has changed")
def test_a_run_in_another_folder_goes_on_there(run):
    first = fit(run)
    command = ("fit", "--ckpt_path", first, "--checkpoint.dirpath", "other", "--trainer.limit_val_batches=1")
    assert run(*command, "--trainer.max_epochs=2", "--trainer.limit_train_batches=2")[0] == 0
    second = torch.load("other/last.ckpt", weights_only=True)["global_step"]
    assert second == 4
    # As a cluster gives it once more; and another command, which would write over that run.
    status, _, errors = run(*command, "--trainer.max_epochs=2", "--trainer.limit_train_batches=2")
    assert status == 0 and "going on with other/last.ckpt, which the same command has left" in run.told(), errors
    status, _, errors = run(*command, "--trainer.max_epochs=3", "--trainer.limit_train_batches=2")
    assert status == 1 and "other/last.ckpt is of another command" in errors
    assert torch.load("other/last.ckpt", weights_only=True)["global_step"] == second


def test_two_runs_do_not_write_to_one_folder(run, monkeypatch):
    Path("run").mkdir()
    monkeypatch.setattr(run_folder, "LOCK_SECONDS", 0.1)
    hold = "import filelock\nwith filelock.FileLock('run/.lock'): print('held', flush=True); input()"
    streams = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", hold], **streams) as other:
        assert other.stdout.readline() == b"held\n"
        status, _, errors = run("fit", *SHORT, "--checkpoint.dirpath", "run")
        assert status == 1 and "another run writes to run; wait for it to end, or choose another folder" in errors
        assert [path.name for path in Path("run").iterdir()] == [".lock"]
        other.kill()
    fit(run)


def test_commands_that_differ_in_a_folder_are_not_the_same(run, tmp_path):
    commands = [
        ("fit", *SHORT, "--checkpoint.dirpath=run", f"--trainer.default_root_dir={tmp_path / place / 'logs'}")
        for place in "ab"
    ]
    assert run(*commands[0])[0] == 0
    status, _, errors = run(*commands[1])
    assert status == 1 and "run/last.ckpt is of another command" in errors
    assert run(*commands[0])[0] == 0


def test_settings_that_contradict_the_checkpoint_are_refused(run):
    path = fit(run, "--model.operator=ball_cosine")
    before = path.read_bytes()
    status, _, errors = run("fit", *SHORT, "--ckpt_path", path, "--model.architecture=resnet20")
    assert status == 1 and "holds cnn6 with ball_cosine and 10 classes, but resnet20 with ball_cosine" in errors
    status, _, errors = run("test", "--ckpt_path", path, "--model.operator=conv")
    assert status == 1 and "but cnn6 with conv and 10 classes was asked for; leave out" in errors
    make_photos(Path("photos"))
    data = ["--data=ImageFolder", "--data.root=photos", "--data.input_size=8", "--data.in_chans=1"]
    status, _, errors = run("test", "--ckpt_path", path, *data)
    assert status == 1 and "but cnn6 with ball_cosine and 2 classes" in errors
    assert path.read_bytes() == before


def test_predict_names_the_classes_of_image_files(run):
    folder = Path("digits")
    folder.mkdir()
    digits = load_digits()
    for index in range(10):
        Image.fromarray((digits.images[index] * 15.9).astype("uint8")).convert("RGB").save(folder / f"{index}.png")
    status, printed, errors = run(
        "predict", "--model.init_from=digits_cnn6_tanh_cosine", "--data.predict=digits",
        "--predictions.output=out/guesses.csv", "--predictions.rows=3",
    )  # fmt: skip
    assert status == 0, errors
    assert "3 of 10 images" in printed and "digits/0.png" in printed and "written: out/guesses.csv" in printed
    with open("out/guesses.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["image"] for row in rows] == [f"digits/{index}.png" for index in range(10)]
    assert sum(row["class 1"] == str(digits.target[index]) for index, row in enumerate(rows)) >= 9
    assert all(float(row["probability 1"]) >= float(row["probability 2"]) for row in rows)
    assert sorted(path.name for path in Path("out").iterdir()) == ["guesses.csv"]


@pytest.mark.filterwarnings("ignore:2 of 22 images cannot be read")
def test_predict_goes_on_without_unreadable_files_and_names_each(run):
    make_photos(Path("photos"), count=10)
    for name in ("cat/broken.jpg", "dog/broken.png"):
        Path("photos/train", name).write_text("no image")
    words = ["--data.predict=photos", "--predictions.output=guesses.csv"]
    status, printed, errors = run("predict", "--model.init_from=digits_cnn6_conv", *words)
    assert status == 1 and "20 of 20 images" in printed and len(Path("guesses.csv").read_text().splitlines()) == 21
    assert errors.endswith(
        "error: 2 of 22 images cannot be read; the other 20 are in the table above. Remove or replace:\n"
        "  photos/train/cat/broken.jpg: no image of a known kind\n"
        "  photos/train/dog/broken.png: no image of a known kind\n"
    )


@pytest.mark.parametrize(
    ("words", "expected"),
    [([], (1, 8)), (["--data.input_size=16"], (1, 16)), (["--data.in_chans=3", "--data.input_size=12"], (3, 12))],
)
@pytest.mark.filterwarnings("ignore:.* now takes 3 channels")
def test_images_are_read_as_the_network_that_one_starts_from_takes_them(run, words, expected):
    make_photos(Path("photos"), count=8, size=20)
    path = fit(run, "--data=ImageFolder", "--data.root=photos", *words, "--model.init_from=digits_cnn6_conv")
    record = torch.load(path, weights_only=True)["decoupled_zoo"]
    assert (record["spec"]["in_chans"], record["spec"]["input_size"]) == expected
    assert (record["data"]["arguments"]["in_chans"], record["data"]["arguments"]["input_size"]) == expected
    status, _, errors = run("test", "--ckpt_path", path)
    assert status == 0, errors


def test_fewer_epochs_than_a_run_has_had_are_refused(run):
    path = fit(run, "--trainer.max_epochs=2")
    before = path.read_bytes()
    status, _, errors = run("fit", "--ckpt_path", path, "--trainer.max_epochs=1")
    assert status == 1 and "the run has had 2 epochs, more than --trainer.max_epochs 1: to train on, raise it" in errors
    assert path.read_bytes() == before


def test_a_run_that_started_from_a_network_goes_on_with_its_configuration_file(run):
    recipe = {"init_from": "digits_cnn6_conv", "operator": "tanh_cosine", "calibrate": 0.9, "learning_rate": 0.001}
    Path("recipe.yaml").write_text(yaml.safe_dump({"model": recipe}))
    path = fit(run, "--config", "recipe.yaml")
    spec = torch.load(path, weights_only=True)["decoupled_zoo"]["spec"]
    for epochs in (2, 3):
        words = ["--config", "recipe.yaml", "--ckpt_path", path, *SHORT, "--trainer.max_epochs", epochs]
        status, _, errors = run("fit", *words)
        assert status == 0, errors
        record = torch.load(path, weights_only=True)["decoupled_zoo"]
        assert record["training"]["epochs"] == epochs and record["spec"] == spec
        assert record["source"] == {"name": "digits_cnn6_conv", "licence": "CC-BY-4.0"}
    status, _, errors = run("fit", "--ckpt_path", path, "--model.init_from", "mnist_cnn6_conv")
    assert status == 1 and "is of a run that started from digits_cnn6_conv, not from mnist_cnn6_conv" in errors
    fit(run, "--checkpoint.dirpath", "other")
    status, _, errors = run("fit", "--ckpt_path", "other/last.ckpt", "--model.init_from", "digits_cnn6_conv")
    assert status == 1 and "started from a network of its own, not from digits_cnn6_conv" in errors


@pytest.mark.parametrize("command", ["fit", "test"])
def test_options_that_overrode_a_configuration_file_still_do_when_a_run_goes_on(run, command):
    recipe = {
        "model": {"operator": "tanh_cosine", "learning_rate": 0.5},
        "data": {"class_path": "ImageFolder", "init_args": {"root": "elsewhere", "input_size": 8, "augment": "none"}},
        "trainer": {"max_epochs": 2},
    }
    Path("recipe.yaml").write_text(yaml.safe_dump(recipe))
    for folder in ("elsewhere", "photos"):
        make_photos(Path(folder), count=8, size=8)
    options = ["--model.learning_rate=0.25", "--data.root=photos", "--model.freeze_epochs=1"]
    path = fit(run, "--config", "recipe.yaml", *options)
    shutil.rmtree("elsewhere")
    # Wherever the configuration file stands, options override it and the checkpoint.
    words = ["--trainer.max_epochs=3", "-c", "recipe.yaml", "--ckpt_path", path, *SHORT[2:]]
    status, _, errors = run(command, *words)
    assert status == 0, errors
    assert f"network, data and number of epochs are those of {path}, whatever recipe.yaml says of them" in run.told()
    record = torch.load(path, weights_only=True)["decoupled_zoo"]
    assert record["trainer"]["max_epochs"] == (3 if command == "fit" else 2)
    assert record["model"]["learning_rate"] == 0.25 and record["data"]["arguments"]["root"] == "photos"


def test_a_checkpoint_of_an_earlier_version_goes_on(run):
    path = fit(run)
    checkpoint = torch.load(path, weights_only=True)
    settings = checkpoint["decoupled_zoo"]["model"]
    later = ("depthwise", "keep", "distil", "teacher", "freeze_norms")
    for name in ("init_from", "calibrate", "freeze_epochs", "backbone_learning_rate", "mixup", *later):
        del settings[name]
    settings["pretrained"] = None
    del checkpoint["decoupled_zoo"]["source"]
    torch.save(checkpoint, path)
    status, _, errors = run("fit", "--ckpt_path", path, *SHORT, "--trainer.max_epochs", 2)
    assert status == 0, errors


def test_fine_tuning_on_photographs_then_predicting_without_them(run, monkeypatch):
    photos = make_photos(Path("photos"), count=8)
    config = ROOT / "configs/finetune.yaml"
    path = fit(run, "--config", config, f"--data.root={photos.resolve()}", "--data.batch_size=4")
    photos.rename("gone")
    status, printed, errors = run("predict", "--ckpt_path", path, "--data.predict=gone/train/cat/0.png")
    assert status == 0, errors
    assert "cat" in printed and "dog" in printed and run.told().count("parameters") == 1
    assert "resnet20 with tanh_cosine" in run.told() and "and 2 classes, 269," in run.told()
    status, _, errors = run("test", "--ckpt_path", path)
    assert status == 1 and f"no folder {photos.resolve()}/train" in errors
    status, _, errors = run("test", "--ckpt_path", path, "--data.root=gone")
    assert status == 0, errors
    name = "photos_resnet20_tanh_cosine"
    status, printed, errors = run("export", path, name, "--to", ".", "--root=gone", main=command_line.main)
    assert status == 0 and "test split" not in printed, errors
    config = json.loads(Path(name, "config.json").read_text())
    assert {metric["split"] for metric in config["metrics"]} == {"val"} and config["in_chans"] == 3
    assert "root" not in config["training"]["data"]["arguments"]
    status, _, errors = run("verify", "--accuracy", f"./{name}", main=command_line.main)
    assert (
        status == 1 and "error: no folder is recorded for the images (ImageFolder): name it (--root FOLDER)" in errors
    )
    assert run("verify", "--accuracy", "--root=gone", f"./{name}", "digits_cnn6_conv", main=command_line.main)[0] == 0


def test_measure_records_the_accuracy_of_a_folder(run, tmp_path):
    folder = zoo.save(zoo.load("digits_cnn6_conv"), tmp_path / "digits_cnn6_conv", licence="CC-BY-4.0")
    status, printed, errors = run("verify", folder, "--accuracy", main=command_line.main)
    assert status == 1 and "zoo measure" in printed + errors
    status, printed, errors = run("measure", folder, "--data", "Digits", main=command_line.main)
    assert status == 0, errors
    config = json.loads((folder / "config.json").read_text())
    accuracies = [metric for metric in config["metrics"] if metric["name"] == "accuracy"]
    assert accuracies == json.loads((PRETRAINED / "digits_cnn6_conv/config.json").read_text())["metrics"]
    assert "accuracy 1.0000 on Digits, test split, 360 images" in printed and "measured_on" in config
    status, printed, errors = run("verify", folder, "--accuracy", main=command_line.main)
    assert status == 0 and "as recorded" in printed, errors
    assert "trained on" not in (folder / "README.md").read_text()
    trained = shutil.copytree(PRETRAINED / "digits_cnn6_conv", tmp_path / "trained/digits_cnn6_conv")
    run("measure", trained, "--licence", "MIT", main=command_line.main)
    config = json.loads((trained / "config.json").read_text())
    assert config["licence"] == config["pretrained_cfg"]["license"] == "MIT"
    assert "were trained on Digits" in (trained / "README.md").read_text() and zoo.verify(trained) == []
    for label in range(10):
        for split in ("train", "val"):
            (tmp_path / f"images/{split}/{label}").mkdir(parents=True)
            Image.new("L", (9, 9), 20 * label).save(tmp_path / f"images/{split}/{label}/0.png")
    status, printed, errors = run("measure", folder, "--root", "images", main=command_line.main)
    assert status == 0 and "on images, val split, 10 images" in printed, errors
    assert json.loads((folder / "config.json").read_text())["measured_on"]["arguments"]["root"] == "images"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["digits_cnn6_conv", "--data", "ImageFolder"],
            "no folder is recorded for the images (ImageFolder): name it (--root FOLDER)",
        ),
        (["digits_cnn6_conv", "--data", "Digit"], "unknown data set 'Digit'. Did you mean 'Digits'"),
        (["digits_cnn6_conv", "--data", "Digits", "--title", "mine"], "--title is that of images of your own"),
        (["cifar10_resnet20_conv", "--data", "Digits"], "class_names"),
        (["nowhere", "--data", "Digits"], "unknown checkpoint 'nowhere'"),
        (["owner/name", "--data", "Digits"], "owner/name is a Hub repository; zoo.save("),
    ],
)
def test_measure_refuses_what_does_not_fit_in_words(run, words, message):
    status, _, errors = run("measure", *words, main=command_line.main)
    assert status not in (0, None) and message in errors + str(status)


def test_export_writes_a_folder_that_load_and_verify_take(run):
    path = fit(run, "--model.operator.name=seg_linear", "--model.operator.radius_mode=learned")
    export = ["export", path, "digits_cnn6_seg_linear", "--to", "published"]
    status, printed, errors = run(*export, main=command_line.main)
    assert status == 0, errors
    folder = Path("published/digits_cnn6_seg_linear")
    assert str(folder) in printed and zoo.verify(folder) == []
    config = json.loads((folder / "config.json").read_text())
    assert config["operator"]["radius_mode"] == "learned" and config["training"]["data"]["name"] == "Digits"
    saved = torch.load(path, weights_only=True)["state_dict"]
    for name, value in zoo.load(folder).network.state_dict().items():
        assert torch.equal(value, saved[f"model.network.{name}"])
    status, printed, errors = run("verify", folder, "--accuracy", main=command_line.main)
    metric = headline(config)
    found = f"test accuracy {metric['value']:.4f} on {metric['images']:,} images, as recorded"
    assert (status, printed) == (0, f"{folder}: ok, {found}\n"), errors
    status, _, errors = run(*export, main=command_line.main)
    assert status == 1 and "exists; choose another name or parent (--to), or replace it (--overwrite)" in errors
    assert run(*export, "--overwrite", main=command_line.main)[0] == 0
    status, _, errors = run("export", path, "digits_cnn6_conv", "--to", "published", main=command_line.main)
    assert status == 1 and "is called <data>_cnn6_seg_linear, got 'digits_cnn6_conv'" in errors
    assert [entry.name for entry in Path("published").iterdir()] == ["digits_cnn6_seg_linear"]
    (folder / "config.json").write_text(json.dumps({**config, "fingerprint": [[0.0] * 10] * 2}))
    status, printed, _ = run("verify", folder, main=command_line.main)
    assert status == 1 and "fingerprint" in printed


def test_cards_are_written_again(run):
    shutil.copytree(PRETRAINED / "digits_cnn6_conv", "digits_cnn6_conv")
    before = Path("digits_cnn6_conv/README.md").read_bytes()
    Path("digits_cnn6_conv/README.md").write_text("an older card")
    assert run("verify", "./digits_cnn6_conv", main=command_line.main)[0] == 1
    assert run("cards", "./digits_cnn6_conv", main=command_line.main)[0] == 0
    assert Path("digits_cnn6_conv/README.md").read_bytes() == before


def test_list_shows_every_embedded_checkpoint(run):
    status, printed, _ = run("list", main=command_line.main)
    assert status == 0 and all(name in printed for name in zoo.list_checkpoints())


def test_the_embedded_checkpoints_reach_what_they_claim(run):
    status, printed, errors = run("verify", "--accuracy", *DIGITS, main=command_line.main)
    assert status == 0, printed + errors
    for name in DIGITS:
        config = json.loads((PRETRAINED / name / "config.json").read_text())
        assert [m["value"] >= 0.98 for m in config["metrics"] if m["split"] == "test"] == [True]


def test_a_checkpoint_that_cannot_be_verified_does_not_keep_others_from_it(run):
    shutil.copytree(PRETRAINED / "digits_cnn6_tanh_cosine", "digits_cnn6_tanh_cosine")
    os.truncate("digits_cnn6_tanh_cosine/model.safetensors", 1000)
    names = ("cifar10_resnet20_conv", "./digits_cnn6_tanh_cosine", "digits_cnn6_conv")
    status, printed, errors = run("verify", "--accuracy", *names, main=command_line.main)
    assert status == 1 and "cifar10_resnet20_conv: no folder data/cifar10/train" in printed
    assert "./digits_cnn6_tanh_cosine: digits_cnn6_tanh_cosine/model.safetensors" in printed
    assert "digits_cnn6_conv: ok" in printed and not errors


@pytest.mark.parametrize("name", DIGITS)
def test_the_demo_writes_its_picture(run, name):
    status, printed, errors = run("demo", name, main=command_line.main)
    assert status == 0, errors
    assert "held-out digits" in printed
    with Image.open("outputs/demo.png") as picture:
        assert picture.width > 1000 and len(set(picture.convert("L").tobytes())) > 50


@pytest.mark.parametrize("other", [{"in_chans": 3}, {"input_size": 16}, {"num_classes": 3}], ids=str)
def test_the_demo_refuses_a_checkpoint_of_other_images_than_digits(run, monkeypatch, other):
    monkeypatch.setattr("zoo.data.digits.load_digits", lambda: pytest.fail("the digits are read"))
    zoo.save(zoo.build("cnn6", **{"in_chans": 1, "input_size": 8, **other}), "photos_cnn6_conv")
    status, _, errors = run("demo", "photos_cnn6_conv", main=command_line.main)
    assert status == 1 and "predict --model.init_from photos_cnn6_conv --data.predict FOLDER" in errors


WRONG = {
    "subcommand": ("fitt", "invalid choice: 'fitt' (choose from"),
    "option": ("fit --bogus 3", "unknown option '--bogus'"),
    "misspelt option": ("fit --trainer.max_epoch=1", "'--trainer.max_epoch'. Did you mean '--trainer.max_epochs'?"),
    "abbreviation": ("fit --model.learning_rat 1", "Did you mean '--model.learning_rate'? Choose one of: --model.adv"),
    "group": ("fit --modle.operator conv", "Did you mean '--model.operator'? Choose one of: --checkpoint, --ckpt"),
    "setting": ("fit --data.batch_siz 3", "unknown setting (--data) of Digits 'batch_siz'. Did you mean 'batch_size'?"),
    "folder elsewhere": (
        "fit --checkpoint.dirpath s3://bucket/run",
        "is a folder of this machine, or one mounted there",
    ),
    "data": ("fit --data Digitss", "unknown data set 'Digitss'. Did you mean 'Digits'?"),
    "operator": ("fit --model.operator tanh_cosin", "unknown operator 'tanh_cosin'. Did you mean 'tanh_cosine'?"),
    "architecture": ("fit --model.architecture cnn10", "unknown architecture 'cnn10'. Did you mean 'cnn"),
    "argument": ("fit --model.architecture_args.batch_nor=false", "unknown argument of cnn6 'batch_nor'"),
    "optimizer": ("fit --model.optimizer adam", "'sgd', 'adamw'"),
    "number": ("fit --trainer.max_epochs x", "Expected a <class 'int'>; got x"),
    "range": ("fit --model.learning_rate -1", "learning_rate must be more than 0, got -1.0"),
    "batch": ("fit --data.batch_size 0", "batch_size must be at least 1, got 0"),
    "augment": ("fit --data.augment flip", "'crop_flip'"),
    "config": ("fit --config nowhere.yaml", "nowhere.yaml"),
    "files": ("fit --data MNIST --data.root nowhere", "--data.download true"),
    "folder": ("fit --data ImageFolder --data.root nowhere", "no folder nowhere/train"),
    "untrained": ("test", "test needs a trained network: --ckpt_path"),
    "checkpoint": ("test --ckpt_path nowhere.ckpt", "no Lightning checkpoint nowhere.ckpt"),
    "checkpoint folder": (
        "test --ckpt_path digits_cnn6_conv",
        "zoo: fit and predict take it as --model.init_from d",
    ),
    "size": (
        "fit --model.architecture vit_tiny_patch16_224 --model.operator conv",
        "for images of 224×224 pixels, can",
    ),
    "init_from and architecture": (
        "fit --model.init_from digits_cnn6_conv --model.architecture cnn9",
        "has an architecture already; leave out architecture, or leave out init_from",
    ),
    "init_from and operator": (
        "fit --model.init_from digits_cnn6_tanh_cosine --model.operator ball_cosine",
        "tanh_cosine already, and only a plain one is converted and calibrated: start from its plain twin",
    ),
    "calibrate nothing": ("fit --model.calibrate 0.99", "calibrate fits a trained plain network"),
    "calibrate a plain network": (
        "fit --model.init_from digits_cnn6_conv --model.calibrate 0.99",
        "needs init_from, a plain network, and operator, got init_from digits_cnn6_conv and operator None",
    ),
    "operator of a network as it is": (
        "test --model.init_from digits_cnn6_conv --model.operator ball_cosine",
        "test measures a network as it is, but these say how training begins: operator;",
    ),
    "plain": (
        "fit --model.init_from digits_cnn6_tanh_cosine --model.operator conv",
        "is tanh_cosine; to train a plain network, start from its twin",
    ),
    "quantile": (
        "fit --model.init_from digits_cnn6_conv --model.operator mix_cosine --model.calibrate 2",
        'calibrate is "auto" or a quantile in (0, 1], got 2.0',
    ),
    "classes": (
        "fit --model.architecture_args.num_classes 5",
        "num_classes=5, but there are 10 class names",
    ),
    "init_from": ("predict --model.init_from digits_cnn6", "unknown checkpoint 'digits_cnn6'. Did you mean"),
    "init_from timm": ("fit --model.init_from resnet10t", "is a network of timm: to start from the weights that"),
    "input_size": (
        "fit --model.init_from digits_cnn6_conv --data ImageFolder --data.root photos --data.input_size 0",
        "input_size must be at least 1, got 0",
    ),
    "devices": (
        "predict --model.init_from digits_cnn6_conv --trainer.devices 2 --trainer.strategy ddp_spawn",
        "one device",
    ),
    "csv": (
        "predict --model.init_from digits_cnn6_conv --predictions.output guesses.json",
        "the predictions are written as CSV, so output ends in .csv, got guesses.json",
    ),
    "setting of another set": (
        "fit --data.root photos",
        "a setting of MNIST or CIFAR10 or CIFAR100 or ImageFolder (--d",
    ),
    "image": ("predict --model.init_from digits_cnn6_conv --data.predict nowhere.png", "nowhere.png"),
}


@pytest.mark.parametrize(("words", "message"), WRONG.values(), ids=WRONG)
def test_wrong_input_gets_one_clear_message(run, words, message):
    status, _, errors = run(*words.split())
    assert status not in (0, None)
    last = errors[errors.rindex("error: ") :]
    assert message in last and "Traceback" not in errors and "NoneType" not in errors
    assert not list(Path().rglob("*.ckpt"))


def test_a_folder_or_file_of_the_other_kind_is_told(run):
    path = fit(run)
    status, _, errors = run("test", "--ckpt_path", "run")
    assert status == 1 and "it is a folder: name the file in it, run/last.ckpt" in errors
    shutil.copytree(PRETRAINED / "digits_cnn6_conv", "mine")
    status, _, errors = run("test", "--ckpt_path", "mine")
    assert status == 1 and "of the zoo: fit and predict take it as --model.init_from mine, not" in errors
    status, _, errors = run("predict", "--model.init_from", path)
    assert status == 1 and "last.ckpt is a file, but a checkpoint is a folder; python -m zoo export makes" in errors


@pytest.mark.parametrize("words", ["verify --accurcy", "verify --acc"])
def test_misspelt_options_of_the_zoo_are_told(run, words):
    status, _, errors = run(*words.split(), main=command_line.main)
    assert status == 1 and "Did you mean '--accuracy'? Choose one of: --accuracy, --root." in errors


def test_corrupt_and_missing_images_are_named(run):
    make_photos(Path("photos"), splits=("train", "val"))
    words = ["fit", *SHORT, "--data=ImageFolder", "--data.root=photos", "--data.input_size=8"]
    Path("photos/train/dog/2.png").write_bytes(b"not an image")
    status, _, errors = run(*words, "--data.max_unreadable=0")
    assert (
        status == 1
        and "1 of 8 images cannot be read; remove or replace them (python -m zoo preflight photos lists all), or let"
        in errors
    )
    assert "\n  photos/train/dog/2.png: no image of a known kind" in errors and "--data.max_unreadable" in errors
    with pytest.warns(UserWarning, match=r"1 of 8 images cannot be read and are left out:\n  photos/train/dog/2.png"):
        status, _, errors = run(*words)
    assert status == 0, errors
    for path in Path("photos/train/dog").iterdir():
        path.unlink()
    status, _, errors = run(*words)
    assert status == 1 and "no image in the class folders dog of photos/train" in errors
    Path("photos/train/dog").rmdir()
    Path("photos/train/bird").mkdir()
    Path("photos/train/cat/0.png").rename("photos/train/bird/0.png")
    status, _, errors = run(*words)
    assert status == 1 and "but only photos/train has bird and only photos/val has dog; add" in errors


def test_the_command_line_has_no_stack_trace_in_a_process_of_its_own(tmp_path):
    command = [sys.executable, ROOT / "train.py", "fit", "--data", "Digitss"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 1
    assert result.stderr.strip().splitlines()[-1].startswith("error: unknown data set 'Digitss'. Did you mean")
    assert "Traceback" not in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_help_shows_the_data_sets_and_settings(run):
    status, printed, _ = run("fit", "--help")
    assert status == 0
    for words in ("--model.architecture", "--data", "--checkpoint.dirpath", "--predictions.output", "--trainer."):
        assert words in printed
    assert all(f"zoo.data.{name}" in printed for name in DATA)


@pytest.mark.parametrize("subcommand", [[], ["fit"], ["predict"]])
def test_help_is_plain_text(run, subcommand):
    for main in (train.main, command_line.main):
        _, printed, _ = run(*(subcommand if main is train.main else []), "--help", main=main)
        assert "usage: " in printed and "`" not in printed and ":class:" not in printed


def test_adversarial_training_is_recorded_resumed_and_exported(run):
    attacked = ["--model.adversarial.attack", "fgsm", "--model.adversarial.eps", "0.05"]
    path = fit(run, *attacked)
    saved = torch.load(path, weights_only=True)
    settings = {"attack": "fgsm", "eps": 0.05, "steps": 7, "step": None}
    assert saved["decoupled_zoo"]["training"]["adversarial"] == settings
    status, _, errors = run("fit", "--ckpt_path", path, *SHORT, "--trainer.max_epochs", "2")
    assert status == 0, errors
    again = torch.load(path.with_name("last.ckpt"), weights_only=True)["decoupled_zoo"]
    assert again["model"]["adversarial"] == settings == again["training"]["adversarial"]
    status, _, errors = run("export", path, "digits_cnn6_tanh_cosine", "--to", "published", main=command_line.main)
    assert status == 0, errors
    folder = Path("published/digits_cnn6_tanh_cosine")
    assert json.loads((folder / "config.json").read_text())["training"]["adversarial"] == settings
    assert zoo.verify(folder) == []


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--model.adversarial.attack", "fgms"], "fgms"),
        (["--model.adversarial.eps", "8"], "eps is a change of pixels in (0, 1]"),
        (["--model.adversarial.attack", "pgd", "--model.mixup", "0.2"], "leave out mixup or adversarial"),
    ],
)
def test_wrong_settings_of_adversarial_training_are_told(run, words, message):
    status, printed, errors = run("fit", *SHORT, *words)
    assert status not in (0, None) and message in printed + errors + str(status)


def test_every_program_trains_and_records_how_it_was_called(tmp_path):
    """From the packages alone, as who installs the wheel has them."""
    for package in ("operators", "zoo"):
        ignored = shutil.ignore_patterns("__pycache__", "pretrained")
        shutil.copytree(ROOT / package, tmp_path / "site" / package, ignore=ignored)
    shutil.copytree(PRETRAINED / "digits_cnn6_conv", tmp_path / "site/zoo/pretrained/digits_cnn6_conv")
    shutil.copy(PRETRAINED / "published.json", tmp_path / "site/zoo/pretrained")
    script = tmp_path / "bin/decoupled-zoo"
    script.parent.mkdir()
    script.write_text("from zoo.commands.console import main\nmain()\n")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "site")}

    def call(*words):
        command = [sys.executable, *words]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
        return done.returncode, done.stdout, done.stderr

    for program, called in ((["-m", "zoo"], "python -m zoo"), ([str(script)], "decoupled-zoo")):
        status, printed, errors = call(*program, "fit", *SHORT, "--checkpoint.dirpath", called.split()[0])
        assert status == 0, errors
        record = record_of(tmp_path / called.split()[0] / "last.ckpt")
        assert record.training["command"].startswith(f"{called} fit --trainer.max_epochs 1 ")
    assert call(str(script), "--help")[1].startswith("usage: decoupled-zoo [-h] COMMAND ...")
    assert call("-m", "zoo", "fit", "--help")[1].startswith("usage: python -m zoo [options] fit")
    assert call(str(script), "demo", "digits_cnn6_conv")[0] == 0 and (tmp_path / "outputs/demo.png").is_file()
    assert "error: train-zoo works in a checkout of decoupled-zoo only" in call(str(script), "train-zoo")[2]


@pytest.mark.parametrize("words", ["train-zoo", "table no_relu", "reports"])
def test_what_needs_a_checkout_says_so_elsewhere(run, monkeypatch, words):
    monkeypatch.setattr(recipes, "CHECKOUT", Path.cwd())
    name, *rest = words.split()
    status, printed, errors = run(name, *rest, main=command_line.main)
    assert (status, printed) == (1, "") and errors == (
        f"error: {name} works in a checkout of decoupled-zoo only, which has configs/, docs/ and results/: clone the "
        f"repository, and run python -m zoo {name} there\n"
    )


def test_export_reads_a_checkpoint_once_and_builds_no_more_than_it_must(run, monkeypatch):
    path = fit(run)
    built, read = [], []
    build = building._build_network
    monkeypatch.setattr(
        building,
        "_build_network",
        lambda *words: built.append(torch.get_default_device().type) or build(*words),
    )
    hashed, loaded = record.damage_in, torch.load
    monkeypatch.setattr(record, "damage_in", lambda file: read.append(file) or hashed(file))
    monkeypatch.setattr(torch, "load", lambda file, **settings: read.append(file) or loaded(file, **settings))
    assert run("export", path, "digits_cnn6_tanh_cosine", main=command_line.main)[0] == 0
    # The second one has no weights: it tells whether the folder can be loaded again.
    assert built == ["cpu", "meta"]
    # One open file is hashed and then loaded.
    assert len(read) == 2 and read[0] is read[1] and Path(read[0].name) == path


def test_each_family_has_the_commands_that_are_told_of_it():
    for family, names in command_line.FAMILIES.items():
        parser = command_line.command_parser([family])
        (commands,) = (action for action in parser._actions if action.choices)
        assert set(commands.choices) == {*names, *command_line.TRAINING}
    shared = {"__init__", "arguments", "console", "progress"}
    files = {file.stem for file in (ROOT / "zoo/commands").glob("*.py")} - shared
    assert files == set(command_line.FAMILIES)
