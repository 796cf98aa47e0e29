"""``python -m zoo train-zoo``: every recipe trains, stops in time, goes on where it was killed, and is verified."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image

import zoo
from operators import OperatorConfig
from tests.image_files import write_dataset, write_images
from zoo.checkpoints.catalogue import PRETRAINED
from zoo.checkpoints.config import read_config
from zoo.data import MNIST
from zoo.recipes import recipe as training
from zoo.recipes import whole_zoo
from zoo.recipes.epochs import StopInTime
from zoo.recipes.recipe import is_finished, recipes, train
from zoo.recipes.whole_zoo import train_zoo
from zoo.resuming.record import read_lightning_checkpoint
from zoo.training.classifier import Classifier
from zoo.training.device import Device, bfloat16_share
from zoo.training.export import LARGEST_IN_FLOAT32

CPU = Device("cpu", compile=False)
STUDIES = training.CONFIGS / "studies"
RECIPES = {path.stem: path for path in (*recipes(), *recipes(folder=STUDIES))}
NAMES = list(RECIPES)
CLASSES = "airplane automobile bird cat deer dog frog horse ship truck".split()


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Write a few images where the recipes expect theirs."""
    folder = tmp_path_factory.mktemp("images")
    write_dataset("MNIST", folder / "data")
    for split, count in (("train", 3), ("test", 1)):
        for label, name in enumerate(CLASSES):
            path = folder / "data/cifar10" / split / name
            path.mkdir(parents=True)
            for index in range(count):
                Image.new("RGB", (32, 32), (20 * label, 60 * index, 100)).save(path / f"{index}.jpg")
    return folder


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_every_recipe_but_that_for_fine_tuning_is_of_the_zoo():
    found = [path.stem for folder in (training.CONFIGS, STUDIES) for path in folder.glob("*.yaml")]
    assert sorted(found) == sorted([*NAMES, "finetune"])


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_is_named_for_what_it_trains_and_differs_from_its_twin_in_the_operator_alone(name):
    recipe = yaml.safe_load(RECIPES[name].read_text(encoding="utf-8"))
    operator = recipe["model"].pop("operator")
    operator_name = operator if operator == "conv" else OperatorConfig.parse(operator).name
    family = name.removesuffix(f"_{operator_name}")
    assert family.endswith(f"_{recipe['model']['architecture']}")
    twin = yaml.safe_load(RECIPES[f"{family}_conv"].read_text(encoding="utf-8"))
    assert twin["model"].pop("operator") == "conv" and recipe == twin


@pytest.mark.parametrize("name", NAMES)
def test_every_recipe_trains_and_gives_a_checkpoint(name, images, tmp_path, monkeypatch):
    monkeypatch.chdir(images)
    monkeypatch.setattr(whole_zoo, "WORK", tmp_path / "work")
    assert train_zoo(name, folder=RECIPES[name].parent, device=CPU, epochs=1, to=tmp_path)
    config = read_config(tmp_path / name)
    assert config["training"]["epochs"] == 1 and config["metrics"][-1]["split"] == "test"
    assert (tmp_path / name / "model.safetensors").stat().st_size <= 4 * 2**20
    # As the recipe has it, so that the accuracy can be verified without naming a folder.
    root = {"mnist": "data", "cifar10": "data/cifar10"}.get(name.split("_")[0])
    assert config["training"]["data"]["arguments"].get("root") == root
    # All have more than the MiB of parameters that would be stored in float32.
    assert 4 * config["parameters"] > LARGEST_IN_FLOAT32 and config["precision"] == "float16"
    recipe = yaml.safe_load(RECIPES[name].read_text(encoding="utf-8"))
    assert read_operator(config["operator"]) == read_operator(recipe["model"]["operator"])


def read_operator(operator):
    return operator if operator == "conv" else OperatorConfig.parse(operator)


def test_all_checkpoints_of_the_zoo_fit_into_40_mib(images):
    total = 0
    for path in recipes():
        weights = PRETRAINED / path.stem / "model.safetensors"
        if weights.is_file():
            total += weights.stat().st_size
            continue
        recipe = yaml.safe_load(path.read_text(encoding="utf-8"))["model"]
        small = {"mnist": (1, 28), "digits": (1, 8)}.get(path.stem.split("_")[0], (3, 32))
        arguments = recipe.get("architecture_args", {})
        model = zoo.build(recipe["architecture"], in_chans=small[0], input_size=small[1], **arguments)
        size = sum(tensor.nbytes for tensor in model.state_dict().values())
        total += size / 2 if size > LARGEST_IN_FLOAT32 else size
    assert total < 40 * 2**20


def test_the_zoo_goes_on_where_it_stopped_and_leaves_what_is_there(here, capsys, monkeypatch):
    name, work = "digits_cnn6_conv", here / "work"
    monkeypatch.setattr(whole_zoo, "WORK", work)
    monkeypatch.setattr(StopInTime, "on_train_epoch_end", stop)
    assert train_zoo(name, device=CPU, minutes=1, epochs=3, to=here)
    assert "goes on in the next call" in capsys.readouterr().out and not (here / name).exists()
    assert not is_finished(work / name / "3_epochs/last.ckpt")
    monkeypatch.undo()
    monkeypatch.chdir(here)
    monkeypatch.setattr(whole_zoo, "WORK", work)
    assert train_zoo(name, device=CPU, epochs=3, to=here)
    printed = capsys.readouterr().out
    assert "epoch 2 of 3" in printed and "epoch 1 of 3" not in printed and "verified" in printed
    assert is_finished(work / name / "3_epochs/last.ckpt")
    command = read_config(here / name)["training"]["command"]
    assert command.startswith("python train.py fit --config ") and command.count("&&") == 1
    before = (here / name / "config.json").read_bytes()
    for epochs in (3, 2):
        assert train_zoo(name, device=CPU, epochs=epochs, to=here)
        assert capsys.readouterr().out == f"{name}: has its checkpoint\n"
    assert (here / name / "config.json").read_bytes() == before
    assert train_zoo(name, device=CPU, epochs=4, to=here)
    assert read_config(here / name)["training"]["epochs"] == 4


def test_another_seed_begins_another_run_of_the_recipe(here, monkeypatch):
    monkeypatch.setattr(whole_zoo, "WORK", here / "work")
    for seed in (None, 7):
        assert train_zoo("digits_cnn6_conv", device=CPU, epochs=1, seed=seed, to=here / str(seed))
    first, other = (read_config(here / str(seed) / "digits_cnn6_conv") for seed in (None, 7))
    assert first["training"]["seed"] == 0 and other["training"]["seed"] == 7
    assert "--seed_everything 7" in other["training"]["command"] and first["sha256"] != other["sha256"]


def test_a_checkpoint_of_another_seed_is_told_and_left(here, capsys, monkeypatch):
    monkeypatch.setattr(whole_zoo, "WORK", here / "work")
    assert train_zoo("digits_cnn6_conv", device=CPU, epochs=1, to=here)
    before = (here / "digits_cnn6_conv/config.json").read_bytes()
    assert not train_zoo("digits_cnn6_conv", device=CPU, epochs=1, seed=7, to=here)
    assert "is of the seed 0, not of 7; name another parent (--to)" in capsys.readouterr().out
    assert (here / "digits_cnn6_conv/config.json").read_bytes() == before
    assert train_zoo("digits_cnn6_conv", device=CPU, epochs=1, seed=0, to=here)


def test_a_folder_without_recipes_is_named(here):
    with pytest.raises(ValueError, match="nowhere has no recipes"):
        recipes(folder=Path("nowhere"))


def stop(self, trainer, module):
    trainer.should_stop = True


@pytest.mark.parametrize(("remaining", "stops"), [(2.5, False), (1.5, True), (-1, True)])
def test_training_stops_if_no_time_is_left_for_another_epoch(remaining, stops, monkeypatch):
    clock = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    callback, trainer = StopInTime(deadline=102 + remaining), type("Trainer", (), {"should_stop": False})
    callback.on_train_epoch_start(trainer, None)
    clock[0] += 2
    callback.on_train_epoch_end(trainer, None)
    assert trainer.should_stop == stops


def test_no_recipe_is_begun_without_time(here, capsys):
    assert train_zoo("digits*", device=CPU, minutes=0.01, epochs=1, to=here)
    assert capsys.readouterr().out.count("no time left") == 3 and list(here.iterdir()) == []


def test_a_killed_training_loses_at_most_one_epoch(here):
    command = [sys.executable, "-m", "zoo", "train-zoo", "--only", "digits_cnn6_conv", "--epochs", "400", "--to", "."]
    environment = {**os.environ, "PYTHONPATH": str(training.CONFIGS.parent)}
    log = here / "log"
    with open(log, "w") as file:
        process = subprocess.Popen([*command, "--device", "cpu"], stdout=file, stderr=file, env=environment)
        while "epoch 3 of 400" not in log.read_text():
            assert process.poll() is None, log.read_text()
            time.sleep(0.05)
        process.send_signal(signal.SIGKILL)
        process.wait()
    told = log.read_text().count(" of 400,")
    saved = read_lightning_checkpoint(here / "outputs/zoo/digits_cnn6_conv/400_epochs/last.ckpt")
    assert saved["epoch"] + 1 >= told - 1


def test_a_checkpoint_that_is_not_written_whole_leaves_the_one_before(here, monkeypatch):
    recipe, options = training.CONFIGS / "digits_cnn6_conv.yaml", ["--trainer.max_epochs", "2"]
    with monkeypatch.context() as patched:
        patched.setattr(StopInTime, "on_train_epoch_end", stop)
        before = train(recipe, CPU, folder=here / "run", options=options).checkpoint.read_bytes()

    def broken(self, path, *arguments, **settings):
        Path(path).write_bytes(before[:1000])
        raise OSError("no space left on device")

    monkeypatch.setattr("lightning.Trainer.save_checkpoint", broken)
    with pytest.raises(OSError, match="no space left"):
        train(recipe, CPU, folder=here / "run", options=options)
    assert (here / "run/last.ckpt").read_bytes() == before


@pytest.mark.parametrize("why", ["no images", "not finite"])
def test_a_recipe_that_fails_is_told_and_the_next_one_is_trained(why, here, capsys, monkeypatch):
    if why == "no images":
        only, wrong = "*_cnn6_conv", "mnist_cnn6_conv"
        expected = "failed (FileNotFoundError): no complete MNIST under"
    else:
        only, wrong = "digits_cnn6_*", "digits_cnn6_conv"
        expected = "failed (FloatingPointError): training stopped at step 0 (epoch 1, batch 1) before it changed"
        training_step = Classifier.training_step

        def broken(self, *arguments):
            loss = training_step(self, *arguments)
            return loss * float("nan") if self.model.spec.operator is None else loss

        monkeypatch.setattr(Classifier, "training_step", broken)
    assert not train_zoo(only, device=CPU, epochs=1, to=here)
    printed = capsys.readouterr().out
    assert f"{wrong}: {expected}" in printed and printed.count("verified") == len(zoo_folders(here)) > 0
    assert wrong not in zoo_folders(here)


def zoo_folders(folder):
    return {path.parent.name for path in folder.glob("*/config.json")}


def test_wrong_names_bring_what_there_is(here):
    with pytest.raises(ValueError, match="no recipe matches 'imagenet'; there are digits_cnn6_conv, .*mnist"):
        recipes("imagenet")
    with pytest.raises(ValueError, match="device is auto, cpu, or cuda where torch finds a GPU; got 'tpu'"):
        Device.choose("tpu")


@pytest.mark.parametrize(("share", "precision"), [(0.6, "bf16-mixed"), (0.95, "32-true"), (None, "32-true")])
def test_a_cpu_trains_in_what_is_faster_there(share, precision, monkeypatch):
    monkeypatch.setattr("zoo.training.device.SLOW_ON_CPUS", () if share else (torch.bfloat16,))
    monkeypatch.setattr("zoo.training.device.bfloat16_share", lambda: share)
    device = Device.choose("cpu")
    assert device.precision == precision and f"--trainer.precision {precision}" in " ".join(device.options())
    why = f"a step in bfloat16 takes {share:.0%} of the time in float32 here" if share else "has no bfloat16"
    assert why in str(device)


def test_the_share_of_bfloat16_is_that_of_two_times_and_leaves_the_random_numbers():
    before = torch.get_rng_state()
    assert 0.01 < bfloat16_share(rounds=1) < 100
    assert torch.equal(torch.get_rng_state(), before)


def test_a_run_that_goes_on_keeps_its_precision(here, monkeypatch):
    """Half trained in bfloat16, it is not finished in float32, nor the other way round."""
    (recipe,), folder = recipes("digits_cnn6_conv"), here / "outputs/run"
    options = ["--trainer.max_epochs", "2", "--trainer.limit_train_batches", "2", "--trainer.limit_val_batches", "1"]
    fast = dataclasses.replace(CPU, precision="bf16-mixed")
    used = []
    monkeypatch.setattr(Classifier, "on_train_start", lambda module: used.append(module.trainer.precision))
    monkeypatch.setattr(
        StopInTime, "on_train_epoch_end", lambda self, trainer, module: setattr(trainer, "should_stop", True)
    )
    assert not train(recipe, fast, folder=folder, options=options).finished
    assert train(recipe, CPU, folder=folder, options=options).finished
    assert used == ["bf16-mixed", "bf16-mixed"]


def test_compiled_training_gives_what_eager_training_gives(here):
    """Four steps on Digits, in float32; the compiled one rounds otherwise."""
    models = []
    torch._dynamo.utils.counters.clear()
    for compile in (False, True):
        assert not torch._dynamo.utils.counters["stats"]["unique_graphs"]
        options = ["--trainer.max_epochs", "1", "--trainer.limit_train_batches", "4", "--data.augment", "none"]
        # Adam divides by the gradient's size, which makes rounding large where the gradient all but vanishes.
        options += ["--model.optimizer", "sgd"]
        if compile:
            options += ["--model.compile", "true"]
        trained = train(
            training.CONFIGS / "digits_cnn6_tanh_cosine.yaml", CPU, folder=here / str(compile), options=options
        )
        models.append(read_lightning_checkpoint(trained.checkpoint)["state_dict"])
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
    assert models[0].keys() == models[1].keys()
    for name, value in models[0].items():
        torch.testing.assert_close(models[1][name], value, rtol=1e-3, atol=1e-4)


def test_another_recipe_is_trained_afresh_and_a_finished_one_not_again(here, capsys):
    recipe = here / "recipe.yaml"
    text = (training.CONFIGS / "digits_cnn6_conv.yaml").read_text(encoding="utf-8").replace("30", "1")
    recipe.write_text(text, encoding="utf-8")
    first = train(recipe, CPU, folder=here / "run")
    before = first.checkpoint.read_bytes()
    again = train(recipe, CPU, folder=here / "run")
    assert again.finished and again.checkpoint.read_bytes() == before
    assert again.epochs == first.epochs and again.images_per_epoch == first.images_per_epoch
    # Remarks are no settings.
    recipe.write_text(f"# A remark.\n{text}", encoding="utf-8")
    assert train(recipe, CPU, folder=here / "run").checkpoint.read_bytes() == before
    capsys.readouterr()
    recipe.write_text(text.replace("model:", "model:\n  learning_rate: 0.001"), encoding="utf-8")
    other = train(recipe, CPU, folder=here / "run")
    assert other.finished and other.epochs != first.epochs
    assert "run held a training with other settings, which is thrown away" in capsys.readouterr().out


def test_a_folder_with_other_files_is_left_alone(here):
    (here / "run").mkdir()
    (here / "run/notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="run has other files than a training's; name another folder, or empty it"):
        train(training.CONFIGS / "digits_cnn6_conv.yaml", CPU, folder=here / "run")
    assert (here / "run/notes.txt").read_text() == "mine"


def test_a_finished_training_is_measured_on_its_own_images(here):
    """Also if it was not published then, and the recipe before it was for others."""
    recipe, options = training.CONFIGS / "digits_cnn6_conv.yaml", ["--trainer.max_epochs", "1"]
    train(recipe, CPU, folder=here / "run", options=options)
    again = train(recipe, CPU, folder=here / "run", options=options, data=MNIST(root="nowhere"))
    assert again.finished and again.images().title == "Digits"


def test_a_training_says_why_it_does_not_go_on(here, capsys, monkeypatch):
    recipe, options = training.CONFIGS / "digits_cnn6_conv.yaml", ["--trainer.max_epochs", "2"]
    monkeypatch.setattr(StopInTime, "on_train_epoch_end", stop)
    first = train(recipe, CPU, folder=here / "run", options=options)
    capsys.readouterr()
    again = train(recipe, CPU, folder=here / "run", options=options, deadline=time.monotonic())
    assert not again.finished and again.epochs == first.epochs
    needed = f"{first.epochs[0]['seconds']:.0f}"
    assert capsys.readouterr().out == f"digits_cnn6_conv: an epoch takes {needed} s, and 0 s are left\n"


def test_a_network_without_test_images_is_published_with_its_validation_accuracy(here, monkeypatch):
    for split, count in (("train", 3), ("val", 2)):
        write_images(here / "photos" / split, {"cat": count, "dog": count})
    recipe = {
        "model": {"architecture": "cnn6", "operator": "conv"},
        "data": {"class_path": "ImageFolder", "init_args": {"root": "photos", "input_size": 8}},
        "trainer": {"max_epochs": 1},
    }
    (here / "photos_cnn6_conv.yaml").write_text(yaml.safe_dump(recipe))
    monkeypatch.setattr(training, "CONFIGS", here)
    assert train_zoo(device=CPU, to=here / "zoo")
    metrics = read_config(here / "zoo/photos_cnn6_conv")["metrics"]
    assert {(metric["split"], metric["images"]) for metric in metrics} == {("val", 4)}


def test_the_history_of_epochs_survives_a_stop(here, monkeypatch):
    recipe = training.CONFIGS / "digits_cnn6_conv.yaml"
    options = ["--trainer.max_epochs", "2"]
    monkeypatch.setattr(StopInTime, "on_train_epoch_end", stop)
    first = train(recipe, CPU, folder=here / "run", options=options)
    second = train(recipe, CPU, folder=here / "run", options=options, data=first.data)
    assert [epoch["epoch"] for epoch in first.epochs] == [1] and not first.finished
    assert [epoch["epoch"] for epoch in second.epochs] == [1, 2] and second.finished
    assert second.epochs[0] == first.epochs[0] and json.dumps(second.epochs)
    assert second.images_per_epoch == 20 * 64 and second.data.split("train") is first.data.split("train")
