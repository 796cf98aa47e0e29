"""What a conversion keeps: partial conversions in checkpoints, the convert command's accuracy, and distillation."""

import copy
import json
import re
import shutil
from pathlib import Path

import pytest
import timm
import torch
import torchvision.transforms.v2.functional as TF

import zoo
from operators import Distillation, calibrate, decoupled_layers, fold, revert
from tests.command_line import SHORT, fit
from zoo.checkpoints.starting_points import _imagenet_names
from zoo.commands import console as command_line
from zoo.commands.conversion import labels_of
from zoo.data import Digits
from zoo.data.unlabelled import UnlabelledImages
from zoo.models.conversion import convert
from zoo.training.recovery import distilled

# Two steps are fewer than the logging interval that real recipes have.
pytestmark = pytest.mark.filterwarnings("ignore:The number of training batches")


def zoo_command(run, *words):
    return run("convert", *words, main=command_line.main)


def digit_folder(folder: Path, count: int) -> Path:
    """Write so many of scikit-learn's digits as images, in class folders."""
    digits = Digits()
    images, labels = digits.evenly_spaced("train", count)
    for place, (image, label) in enumerate(zip(images, labels.tolist(), strict=True)):
        target = folder / "deep" / digits.class_names[label] / f"{place}.png"
        target.parent.mkdir(parents=True, exist_ok=True)
        TF.to_pil_image(image).save(target)
    return folder


def test_the_convert_command_tells_the_accuracy_before_and_after(run):
    digit_folder(Path("photos"), 400)
    words = ["digits_cnn6_conv", "digits_cnn6_sphere_cosine", "--images", "photos", "--keep", "features.0"]
    status, printed, errors = zoo_command(run, *words, "--distil", "3")
    assert status == 0, errors
    line = r"^(\w+): accuracy ([\d.]+)% \([\d.]+% to [\d.]+%\) on 80 images that it is not fitted to"
    told = re.findall(line, printed, re.MULTILINE)
    assert [what for what, _ in told] == ["plain", "calibrated", "distilled"]
    before, calibrated, distilled = (float(share) for _, share in told)
    assert before > 99 and distilled >= calibrated > 50
    assert "5 convolutions converted, 1 plain (1 kept plain by its name)" in printed and printed.count("\n") <= 25
    assert "distilled for 3 epochs: divergence from the teacher" in printed
    assert sorted(path.name for path in Path("outputs").iterdir()) == ["digits_cnn6_sphere_cosine"]
    status, printed, errors = zoo_command(run, *words, "--overwrite", "--verbose")
    assert status == 0 and printed.count("error ") == 5, errors
    Path("photos/deep/other").mkdir()
    shutil.copy(next(Path("photos/deep/1").iterdir()), "photos/deep/other")
    status, printed, errors = zoo_command(run, *words, "--overwrite")
    assert status == 0 and "accuracy" not in printed, errors


def test_the_accuracy_is_that_of_other_images_if_there_are_enough(run, monkeypatch):
    monkeypatch.setattr("zoo.commands.conversion.CALIBRATION_IMAGES", 300)
    digit_folder(Path("photos"), 400)
    words = ["digits_cnn6_conv", "digits_cnn6_tanh_cosine", "--images", "photos"]
    status, printed, errors = zoo_command(run, *words)
    assert status == 0 and printed.count("on 100 images that it is not fitted to") == 2, errors


def test_folders_may_be_called_by_the_numbers_of_wordnet():
    names = _imagenet_names(1000)
    files = [Path("n01440764/a.jpg"), Path("b/n15075141/c.jpg")]
    assert labels_of(files, names).tolist() == [0, 999]
    assert labels_of(files, [*names[:-1], "paper"]) is None and labels_of(files, ["0", "1"]) is None


def test_a_distillation_that_was_stopped_goes_on(run, monkeypatch):
    digit_folder(Path("photos"), 80)
    words = ["digits_cnn6_conv", "digits_cnn6_sphere_cosine", "--images", "photos", "--distil", "2", "--to"]
    assert zoo_command(run, *words, "whole")[0] == 0
    monkeypatch.setattr("zoo.training.recovery.SAVED_EVERY", 0.0)
    step, steps = Distillation.step, []

    def stopping(self, images):
        if len(steps) == 7:
            raise KeyboardInterrupt
        steps.append(self.steps)
        return step(self, images)

    monkeypatch.setattr(Distillation, "step", stopping)
    status, printed, _ = zoo_command(run, *words, "stopped")
    assert "stopped; the same command goes on after step 7 (stopped/.digits_cnn6_sphere_cosine" in printed
    assert status == 130 and [path.name for path in Path("stopped").iterdir()] == [
        ".digits_cnn6_sphere_cosine.distillation.ckpt"
    ]
    monkeypatch.setattr(Distillation, "step", lambda self, images: steps.append(self.steps) or step(self, images))
    status, printed, errors = zoo_command(run, *words, "stopped")
    assert status == 0 and steps == list(range(10)), errors
    assert "the distillation of before goes on after step 7" in printed
    states = [zoo.load(f"{to}/digits_cnn6_sphere_cosine").state_dict() for to in ("whole", "stopped")]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert [path.name for path in Path("stopped").iterdir()] == ["digits_cnn6_sphere_cosine"]


@pytest.mark.parametrize(("channels", "size"), [(1, 8), (3, 20)])
def test_images_to_learn_by_follow_from_seed_and_epoch(channels, size):
    images = torch.rand(7, channels, 32, 32)
    batches = UnlabelledImages(images, size, 3, seed=1)
    state = torch.get_rng_state()
    first = list(batches)
    assert len(batches) == 3 and [tuple(batch.shape) for batch in first] == [
        (n, channels, size, size) for n in (3, 3, 1)
    ]
    assert all(0 <= batch.min() and batch.max() <= 1 for batch in first)
    assert all(torch.equal(left, right) for left, right in zip(first, batches, strict=True))
    batches.set_epoch(1)
    others = [next(iter(batches)), next(iter(UnlabelledImages(images, size, 3, seed=2)))]
    assert not any(torch.equal(first[0], other) for other in others)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    ("architecture", "size", "learnt"),
    [("cnn6", 8, 8), ("test_efficientnet", 64, 64), ("test_efficientnet", 224, 144), ("test_vit", 160, 160)],
)
def test_networks_of_photographs_learn_by_smaller_ones_if_they_take_them(monkeypatch, architecture, size, learnt):
    plain = zoo.build(architecture, num_classes=3, in_chans=3, input_size=size)
    model = copy.deepcopy(plain)
    convert(model, "tanh_cosine")
    step, shapes = Distillation.step, []
    monkeypatch.setattr(
        Distillation, "step", lambda self, images: shapes.append(images.shape[2:]) or step(self, images)
    )
    distilled(model, plain, torch.rand(4, 3, size, size), 1)
    assert set(shapes) == {(learnt, learnt)}


def other_digits() -> Path:
    """Write a checkpoint of the same architecture and classes with other weights, and return its folder."""
    model = zoo.load("digits_cnn6_conv")
    with torch.no_grad():
        model.network.fc.weight.mul_(2)
    return zoo.save(model, "teachers/digits_cnn6_conv")


@pytest.mark.parametrize("damage", ["none", "bytes", "epochs", "teacher"])
@pytest.mark.filterwarnings("ignore:.*is damaged", "ignore:.*is of a distillation of other networks")
def test_a_state_that_is_damaged_or_of_another_distillation_is_not_taken(run, monkeypatch, damage):
    digit_folder(Path("photos"), 40)
    monkeypatch.setattr("zoo.training.recovery.SAVED_EVERY", 0.0)
    words = ["digits_cnn6_conv", "digits_cnn6_sphere_cosine", "--images", "photos", "--distil"]
    with monkeypatch.context() as full:
        full.setattr("zoo.save", lambda *_, **__: (_ for _ in ()).throw(OSError("no space left")))
        assert zoo_command(run, *words, "1")[0] == 1
    (state,) = Path("outputs").glob(".*.ckpt")
    if damage == "bytes":
        state.write_bytes(state.read_bytes()[:-100])
    elif damage == "teacher":
        words[-1:] = ["--teacher", str(other_digits()), "--distil"]
    epochs = "2" if damage == "epochs" else "1"
    step, steps = Distillation.step, []
    monkeypatch.setattr(Distillation, "step", lambda self, images: steps.append(self.steps) or step(self, images))
    status, _, errors = zoo_command(run, *words, epochs)
    assert status == 0 and steps == ([] if damage == "none" else list(range(3 * int(epochs)))), errors
    assert not list(Path("outputs").glob(".*.ckpt"))


@pytest.mark.parametrize("selection", [{}, {"depthwise": True}, {"keep": ["conv_stem", "blocks.2.*"]}, "filter"])
def test_a_partial_conversion_is_kept_by_its_checkpoint(tmp_path, selection):
    if selection == "filter":
        selection = {"filter_fn": lambda module, name: "conv_pw" in name or "se.conv_reduce" in name}
    name = "test_efficientnet"
    plain = start_from_timm(name)
    model = copy.deepcopy(plain)
    report = convert(model, "tanh_cosine", **selection)
    calibrate(model, [torch.rand(4, 3, 160, 160)])
    folder = zoo.save(model, tmp_path / f"a_{name}_tanh_cosine")
    config = json.loads((folder / "config.json").read_text())
    assert config["plain_layers"] == [layer.name for layer in report.skipped]
    assert f"| ordinary convolutions | {len(report.skipped)} layers" in (folder / "README.md").read_text()
    loaded = zoo.load(folder)
    assert list(decoupled_layers(loaded.network)) == [layer.name for layer in report.converted]
    assert zoo.verify(folder) == []
    images = torch.rand(2, 3, 160, 160)
    with torch.no_grad():
        torch.testing.assert_close(loaded(images), model.eval()(images))
        torch.testing.assert_close(fold(loaded, images)[0](images), loaded(images), rtol=1e-3, atol=1e-3)
        timms = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
        torch.testing.assert_close(timms((images - loaded.mean) / loaded.std), loaded(images))
        torch.testing.assert_close(revert(model)(images), plain.eval()(images))
    with pytest.warns(UserWarning, match="fresh classifier"):
        wider = zoo.load(folder, num_classes=3)
    assert list(decoupled_layers(wider.network)) == list(decoupled_layers(loaded.network))


def start_from_timm(name: str) -> zoo.ImageModel:
    torch.manual_seed(0)
    return zoo.build(name, num_classes=5)


def test_a_checkpoint_of_before_has_decoupled_depthwise_convolutions(tmp_path):
    model = zoo.build("test_efficientnet", "tanh_cosine", depthwise=True, num_classes=5)
    folder = zoo.save(model, tmp_path / "a_test_efficientnet_tanh_cosine")
    config = json.loads((folder / "config.json").read_text())
    assert all(".se." in name for name in config.pop("plain_layers"))
    (folder / "config.json").write_text(json.dumps(config))
    loaded = zoo.load(folder)
    assert list(decoupled_layers(loaded.network)) == list(decoupled_layers(model.network))
    assert loaded.describe() == model.describe()


@pytest.mark.parametrize(
    ("plain", "message"),
    [(["nowhere"], "unknown convolution to keep plain 'nowhere'"), ([3], "'plain_layers' is malformed"), ("x", "malf")],
)
def test_wrong_names_of_plain_layers_are_refused(tmp_path, plain, message):
    folder = zoo.save(zoo.load("digits_cnn6_tanh_cosine"), tmp_path / "digits_cnn6_tanh_cosine")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "plain_layers": plain}))
    with pytest.raises(zoo.CheckpointError, match=message):
        zoo.load(folder)


def test_which_layers_stay_plain_is_no_matter_of_a_plain_network():
    for settings in ({"depthwise": True}, {"keep": ["features.0"]}):
        with pytest.raises(ValueError, match="operator 'conv' leaves all convolutions plain"):
            zoo.build("cnn6", "conv", **settings)


def test_fit_converts_a_part_distils_it_and_goes_on(run):
    words = ["--model.init_from=digits_cnn6_conv", "--model.operator=sphere_cosine", "--model.calibrate=auto"]
    words += ["--model.keep=[features.0]", "--model.distil=1"]
    path = fit(run, *words)
    told = run.told()
    assert "5 convolutions converted, 1 plain (1 kept plain by its name)" in told and "radii searched" in told
    assert "distilled for 1 epochs" in told and not list(Path(path).parent.glob("distillation*"))
    status, _, errors = run("fit", "--ckpt_path", path, *SHORT, "--trainer.max_epochs", 2)
    assert status == 0, errors
    name = "digits_cnn6_sphere_cosine"
    status, _, errors = run("export", path, name, "--to", ".", main=command_line.main)
    assert status == 0 and json.loads(Path(name, "config.json").read_text())["plain_layers"] == ["features.0"], errors
    status, _, errors = run("test", "--model.init_from", name)
    assert status == 0, errors


def test_fit_calibrates_what_it_converts_and_nothing_else(run):
    fit(run, "--model.init_from=digits_cnn6_tanh_cosine", "--model.calibrate=auto")
    assert "calibrated" not in run.told()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--model.init_from digits_cnn6_conv --model.distil 1", "distil lets a network that is just converted learn"),
        ("--model.distil -1", "distil is a number of epochs, at least 0, got -1"),
        ("--model.teacher digits_cnn6_conv", "which needs distil, its epochs"),
        ("--model.operator conv --model.depthwise true", "with operator conv, leave them out"),
        ("--model.init_from digits_cnn6_conv --model.keep [features.0]", "without operator, or with operator conv"),
        (
            "--model.init_from digits_cnn6_conv --model.operator mix_cosine --model.distil 1 "
            "--model.teacher cifar10_resnet20_conv",
            "the teacher (resnet20) has other classes than the network",
        ),
        ("--model.operator tanh_cosine --model.keep [stem]", "unknown convolution to keep plain 'stem'"),
    ],
)
def test_fit_refuses_settings_that_recover_nothing(run, words, message):
    status, _, errors = run("fit", *words.split(), *SHORT)
    assert status == 1 and message in errors
