"""What users of other zoos ran into, tried here: the right result, or one sentence with the cure, and nothing lost."""

import csv
import io
import json
import re
import threading
from pathlib import Path

import numpy
import pytest
import timm
import torch
from PIL import Image
from timm.models import save_for_hf

import zoo
from operators import convert_decoupled, decoupled_layers, revert
from operators.evaluation_mode import evaluating
from tests.command_line import SHORT, fit, make_photos, run  # noqa: F401
from tests.image_files import noise
from zoo.checkpoints.starting_points import start_from
from zoo.commands import console as command_line
from zoo.models.transform import ImageTransform
from zoo.resuming.record import record_of

NAME = "cifar10_resnet20_tanh_cosine"

pytestmark = pytest.mark.filterwarnings("ignore:The number of training batches")


@pytest.fixture
def image(tmp_path):
    Image.fromarray(noise(32, 32, 3)).save(tmp_path / "image.png")
    return str(tmp_path / "image.png")


def files(folder):
    return {path.name for path in Path(folder).iterdir()}


# What is written, and replaced.


def test_replacing_a_checkpoint_never_deletes_anything_else(run):  # noqa: F811
    path = fit(run)
    folder = path.parent.rename(path.parent.with_name("digits_cnn6_tanh_cosine"))
    before = files(folder)
    for words in ([], ["--overwrite"]):
        export = ["export", folder / "last.ckpt", folder.name, "--to", folder.parent, *words]
        status, _, errors = run(*export, main=command_line.main)
        assert status == 1 and "holds more than a checkpoint (best.ckpt, last.ckpt, previous.ckpt)" in errors
        assert "--overwrite" not in errors and files(folder) == before
    with pytest.raises(FileExistsError, match="holds more than a checkpoint"):
        zoo.save(zoo.load("digits_cnn6_conv"), folder, overwrite=True)
    Path("afile").write_text("mine")
    status, _, errors = run("export", folder / "last.ckpt", folder.name, "--to", "afile", main=command_line.main)
    assert status == 1 and "afile is a file and no folder" in errors and Path("afile").read_text() == "mine"


@pytest.mark.parametrize(
    ("told", "message"),
    [
        ({"metrics": [zoo.Metric("accuracy", 1.0, "x", "test", 3.0)]}, "a metric is malformed"),
        ({"metrics": [zoo.Metric("accuracy", "high", "x", "test", 3)]}, "a metric is malformed"),
        ({"training": {"data": "mine"}}, "what it was measured or trained on is malformed"),
        ({"training": {"when": object()}}, "cannot be"),
        ({"licence": None}, "'licence' is missing or malformed"),
    ],
)
def test_what_could_not_be_read_again_is_not_written(tmp_path, told, message):
    with pytest.raises(ValueError, match=message):
        zoo.save(zoo.load("digits_cnn6_conv"), tmp_path / "net", **told)
    assert not (tmp_path / "net").exists()


def test_numbers_of_numpy_are_written(tmp_path):
    metric = zoo.Metric("accuracy", numpy.float32(0.5), "x", "test", numpy.int64(3))
    folder = zoo.save(zoo.load("digits_cnn6_conv"), tmp_path / "net", metrics=[metric], training={"n": numpy.int8(1)})
    assert zoo.verify(folder) == [] and json.loads((folder / "config.json").read_text())["metrics"][0]["images"] == 3


# The best checkpoint is the best.


@pytest.mark.parametrize(
    ("monitor", "better"), [("val_loss", min), ("val_accuracy", max), ("val_balanced_accuracy", max)]
)
def test_the_best_checkpoint_is_that_of_the_best_epoch(run, monitor, better):  # noqa: F811
    words = "--trainer.max_epochs 4 --trainer.limit_train_batches 4 --model.schedule constant --model.warmup 0"
    status, _, errors = run("fit", *words.split(), "--checkpoint.dirpath", "run", "--checkpoint.monitor", monitor)
    assert status == 0, errors
    with open("outputs/runs/version_0/metrics.csv") as file:
        values = [float(row[monitor]) for row in csv.DictReader(file) if row[monitor]]
    saved = torch.load("run/best.ckpt", weights_only=True)
    assert len(values) == 4 and saved["epoch"] == values.index(better(values))
    assert f"best {monitor} {better(values):.4f}" in run.told()


def test_a_run_goes_on_with_what_tells_its_best_checkpoint(run):  # noqa: F811
    last = fit(run, "--checkpoint.monitor", "val_loss", "--checkpoint.filename", "lowest")
    assert record_of(last).best == {"monitor": "val_loss", "filename": "lowest", "save_top_k": 1}
    status, _, errors = run("fit", "--ckpt_path", last, "--trainer.max_epochs", "2", *SHORT[2:])
    assert status == 0 and "best val_loss" in run.told(), errors
    assert files("run") == {"lowest.ckpt", "last.ckpt", "previous.ckpt"}


REFUSED = {
    "--checkpoint.save_top_k 3": "keeps several checkpoints, and --checkpoint.filename best is one; .* '{epoch}'",
    "--checkpoint.save_top_k -1": "keeps several checkpoints",
    "--checkpoint.monitor val_acc": "unknown quantity to monitor .* 'val_acc'. Did you mean 'val_accuracy'",
    "--checkpoint.mode min": "the best val_accuracy is the highest; leave out --checkpoint.mode min",
    "--trainer.overfit_batches 1": "--trainer.limit_train_batches N --data.augment none",
    "--trainer.barebones true": "leave out --trainer.barebones: each run keeps its last checkpoint",
    "--trainer.enable_checkpointing false": "leave out --trainer.enable_checkpointing",
    "--model.learning_rate 1e400": "learning_rate must be finite, got inf",
    "--model.mixup -1": "mixup must not be negative, got -1",
    "--data.class_weights [1]": "class_weights is .auto., or a number more than 0 for each of the 10 classes",
}


@pytest.mark.parametrize("words", REFUSED)
def test_settings_that_would_lose_work_are_refused(run, words):  # noqa: F811
    status, _, errors = run("fit", *SHORT, "--checkpoint.dirpath", "run", *words.split())
    assert status == 1 and re.search(REFUSED[words], errors) and not Path("run").exists(), errors


def test_several_checkpoints_with_names_of_their_own_are_kept(run):  # noqa: F811
    fit(run, "--checkpoint.save_top_k", "-1", "--checkpoint.filename", "{epoch}")
    assert "epoch=0.ckpt" in files("run")


@pytest.mark.parametrize("stage", ["test", "validate", "predict"])
def test_a_stage_that_would_do_nothing_is_refused(run, stage):  # noqa: F811
    limit = {"test": "test", "validate": "val", "predict": "predict"}[stage]
    words = [stage, "--model.init_from", "digits_cnn6_conv", f"--trainer.limit_{limit}_batches", "0"]
    status, _, errors = run(*words)
    assert status == 1 and f"--trainer.limit_{limit}_batches must be more than 0, got 0" in errors


def test_a_run_without_a_progress_bar_is_trained(run):  # noqa: F811
    fit(run, "--trainer.enable_progress_bar", "false")


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("--trainer.fast_dev_run true", "fast_dev_run keeps nothing"),
        ("--checkpoint.save_top_k 0", "save_top_k is 0, so there is no best.ckpt; last.ckpt has the network"),
        ("--trainer.limit_val_batches 0", "no images were validated on, so there is no best.ckpt; last.ckpt has"),
        ("--trainer.max_time 00:00:00:00", "nothing was trained, and nothing is kept"),
    ],
)
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::lightning.fabric.utilities.warnings.PossibleUserWarning")
def test_what_is_kept_is_told_as_it_is(run, words, told):  # noqa: F811
    status, _, errors = run("fit", *SHORT, "--checkpoint.dirpath", "run", *words.split())
    assert status == 0 and told in run.told(), errors
    assert ("last.ckpt has" in told) == Path("run/last.ckpt").exists()


# Numbers that are none.


def test_weights_that_are_not_finite_are_not_saved(run):  # noqa: F811
    last = fit(run)
    before = last.read_bytes()
    # AdamW's smallest numbers are 0 in float16.
    words = ["--trainer.max_epochs", "2", "--trainer.precision", "16-true", "--trainer.limit_train_batches", "2"]
    status, _, errors = run("fit", "--ckpt_path", last, *words)
    assert status == 1 and re.search(r"not finite.*(bf16-mixed|32-true)", errors, re.DOTALL), errors
    assert last.read_bytes() == before
    status, _, errors = run("fit", *SHORT, *words[2:], "--checkpoint.dirpath", "other")
    assert status == 1 and "not finite" in errors and not list(Path("other").glob("*.ckpt"))


@pytest.mark.parametrize("precision", ["float32", "float16"])
def test_answers_that_are_not_finite_are_no_classes(image, precision):
    model = zoo.load(NAME)
    model.network.get_classifier().weight.data.mul_(float("inf") if precision == "float32" else 1e9)
    with pytest.raises(ValueError, match="answers are not finite .* run it in float32"):
        model.to(getattr(torch, precision)).classify(image)


# One network, many threads.


def test_threads_that_classify_leave_a_network_in_training_as_it_was(image):
    model = zoo.load(NAME)
    expected = model.classify(image, top=1)
    model.train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found = []
    threads = [threading.Thread(target=lambda: found.append(model.classify(image, top=1))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert model.training and all(module.training for module in model.modules())
    assert all(value.equal(before[name]) for name, value in model.state_dict().items())
    for ((name, share),) in found:
        assert name == expected[0][0] and share == pytest.approx(expected[0][1], abs=1e-5)


def test_evaluation_mode_may_begin_within_itself():
    model = zoo.load("digits_cnn6_conv").train()
    with evaluating(model):
        with evaluating(model):
            assert not model.training
        assert not model.training
    assert model.training


# Building, loading and saving under unusual settings of torch.


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_default_dtype_is_not_the_checkpoints(image, dtype):
    expected = zoo.load(NAME).classify(image)
    torch.set_default_dtype(dtype)
    try:
        model = zoo.load(NAME)
        assert torch.get_default_dtype() == dtype
        untrained = zoo.load_untrained(NAME)
    finally:
        torch.set_default_dtype(torch.float32)
    assert model.classify(image) == expected
    assert {parameter.dtype for parameter in (*model.parameters(), *untrained.parameters())} == {torch.float32}


def test_a_checkpoint_is_loaded_whole_under_another_default_device(image):
    expected = zoo.load(NAME).classify(image)
    with torch.device("meta"):
        model = zoo.load(NAME)
        with pytest.warns(UserWarning, match="fresh classifier"):
            other = zoo.load(NAME, num_classes=3)
    assert model.classify(image) == expected and not any(value.is_meta for value in other.state_dict().values())


def test_a_network_loaded_under_inference_mode_can_be_trained():
    with torch.inference_mode():
        model = zoo.load("digits_cnn6_tanh_cosine")
    model.train()(torch.rand(4, 1, 8, 8)).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.parametrize("assign", [False, True])
def test_a_network_built_without_memory_is_filled_by_its_state_dict(image, assign):
    model = zoo.load(NAME)
    spec = model.spec
    with torch.device("meta"):
        empty = zoo.build("resnet20", spec.operator, class_names=spec.class_names, mean=spec.mean, std=spec.std)
    if not assign:
        empty.to_empty(device="cpu")
    empty.load_state_dict(model.state_dict(), assign=assign)
    assert empty.eval().classify(image) == model.classify(image)


# timm's own way of saving.


def test_timm_builds_no_plain_network_of_a_converted_one_that_it_saved(tmp_path):
    network = timm.create_model("test_resnet", num_classes=3)
    other = timm.create_model("test_resnet", num_classes=3)
    before = dict(network.pretrained_cfg)
    convert_decoupled(network, "tanh_cosine")
    save_for_hf(network, tmp_path / "mine", safe_serialization=True)
    with pytest.raises(zoo.CheckpointError, match="saved by timm of a network that had been converted"):
        timm.create_model(f"local-dir:{tmp_path / 'mine'}", pretrained=True)
    with pytest.raises(zoo.CheckpointError, match="does not tell its operator: make the network again"):
        zoo.load(tmp_path / "mine")
    assert other.pretrained_cfg == before and network.pretrained_cfg != before
    assert revert(network).pretrained_cfg == before
    save_for_hf(network, tmp_path / "plain", safe_serialization=True)
    assert not decoupled_layers(timm.create_model(f"local-dir:{tmp_path / 'plain'}", pretrained=True))


@pytest.mark.parametrize("operator", ["conv", "tanh_cosine"])
def test_timm_saves_a_network_that_it_loaded_from_our_folder(tmp_path, operator):
    folder = zoo.save(zoo.build("test_resnet", operator, num_classes=3).eval(), tmp_path / "net")
    network = timm.create_model(f"local-dir:{folder}", pretrained=True)
    save_for_hf(network, tmp_path / "again", safe_serialization=True)
    if operator == "conv":
        images = torch.rand(2, 3, 160, 160)
        torch.testing.assert_close(start_from(tmp_path / "again")(images), zoo.load(folder)(images))
    else:
        with pytest.raises(zoo.CheckpointError, match="saved by timm of a network that had been converted"):
            timm.create_model(f"local-dir:{tmp_path / 'again'}", pretrained=True)


# Words and names.


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model:\n  learning_rate: 0.1\nmodel:\n  weight_decay: 0.5\n", "'model' stands twice in one block"),
        ("model:\n  learning_rate: 0.1\n  learning_rate: 0.2\n", "'learning_rate' stands twice"),
        (
            "model:\n  learning_rte: 0.1\n",
            "unknown option '--model.learning_rte'. Did you mean '--model.learning_rate'",
        ),
    ],
)
def test_a_configuration_file_that_says_something_twice_or_wrongly_is_refused(run, text, message):  # noqa: F811
    Path("mine.yaml").write_text(text)
    for words in (["fit", "--config", "mine.yaml"], ["fit", "--config=mine.yaml"], ["fit", "-c", "mine.yaml"]):
        status, _, errors = run(*words, *SHORT)
        assert status == 1 and message in errors, errors
    assert not Path("outputs").exists()


@pytest.mark.parametrize("names", [("cat [old]", "cat [new]"), ("and/or [/s]", "x"), ("[bold]", ":smile:")])
def test_brackets_in_names_are_shown_as_they_are(run, names):  # noqa: F811
    make_photos(Path("photos [a]"), classes=[name.replace("/", "") for name in names])
    words = ["--data", "ImageFolder", "--data.root", "photos [a]", "--data.input_size", "8"]
    last = fit(run, *words)
    new = Path("new [b]")
    new.mkdir()
    Image.fromarray(noise(8, 8, 3)).save(new / "0.png")
    status, printed, errors = run(
        "predict", "--ckpt_path", last, "--data.predict", new, "--predictions.output", "a.csv"
    )
    assert status == 0 and all(name.replace("/", "") in printed for name in names), errors
    assert "new [b]/0.png" in printed and "new [b]/0.png" in Path("a.csv").read_text()
    status, printed, errors = run("test", "--ckpt_path", last)
    assert status == 0 and all(name.replace("/", "") in printed for name in names), errors


def test_a_terminal_of_few_letters_ends_no_run(run, monkeypatch):  # noqa: F811
    make_photos(Path("photos"), classes=("café", "тест"))
    last = fit(run, "--data", "ImageFolder", "--data.root", "photos", "--data.input_size", "8")
    narrow = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr("sys.argv", ["train.py", "predict", "--ckpt_path", str(last), "--predictions.output", "a.csv"])
    with monkeypatch.context() as patch:
        patch.setattr("sys.stdout", narrow)
        command_line.train()
    narrow.flush()
    assert b"caf?" in narrow.buffer.getvalue() and "café" in Path("a.csv").read_text(encoding="utf-8")


def test_a_table_that_cannot_be_written_is_told_before_the_work(run):  # noqa: F811
    Path("afile").write_text("mine")
    status, printed, errors = run(
        "predict", "--model.init_from", "digits_cnn6_conv", "--predictions.output=afile/m.csv"
    )
    assert status == 1 and "afile is a file and no folder" in errors and "class 1" not in printed


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_names_of_classes_from_windows_are_read(run, encoding):  # noqa: F811
    names = "zero one two three four five six seven eight nine".split()
    Path("classes.txt").write_text("\n".join(names), encoding=encoding)
    words = ["convert", "digits_cnn6_conv", "digits_cnn6_mix_cosine", "--classes", "classes.txt"]
    status, _, errors = run(*words, main=command_line.main)
    assert status == 0 and zoo.load("outputs/digits_cnn6_mix_cosine").class_names == tuple(names), errors


def test_names_of_classes_in_another_encoding_are_refused(run):  # noqa: F811
    Path("classes.txt").write_text("zéro\n", encoding="utf-16")
    words = ["convert", "digits_cnn6_conv", "digits_cnn6_mix_cosine", "--classes", "classes.txt"]
    status, _, errors = run(*words, main=command_line.main)
    assert status == 1 and "classes.txt is not in UTF-8" in errors and "save it as UTF-8" in errors


@pytest.mark.parametrize("names", ["cat,dog", {0: "cat", 1: "dog"}, 5, [1, 2], [b"cat"]], ids=repr)
def test_class_names_are_a_list_of_names(names):
    with pytest.raises(TypeError, match="class_names are"):
        zoo.build("cnn6", class_names=names)
    with pytest.raises(TypeError, match="class_names are"):
        zoo.load("digits_cnn6_conv").reset_classifier(names)


def test_class_names_may_be_an_array_or_an_iterator():
    names = numpy.array(["cat", "dog"])
    assert zoo.build("cnn6", class_names=names).class_names == ("cat", "dog")
    assert zoo.build("cnn6", class_names=iter(names)).class_names == ("cat", "dog")


@pytest.mark.parametrize("what", ["mean", "std"])
def test_normalisation_of_bytes_is_refused(what):
    with pytest.raises(ValueError, match=f"{what} is that of pixels in .0, 1., .* divide it by 255"):
        zoo.build("cnn6", **{what: [123.7, 116.3, 103.5]})


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (b"\x89PNG", "got bytes; PIL.Image.open reads open files, and io.BytesIO makes one of bytes"),
        (io.BytesIO(b""), "got BytesIO"),
        ({"image": 1}, "got dict"),
        ("https://x.org/a.png", "no image file https://x.org/a.png; fetch it first"),
    ],
)
def test_classify_says_what_it_takes(given, message):
    with pytest.raises((TypeError, FileNotFoundError), match=re.escape(message)):
        zoo.load("digits_cnn6_conv").classify(given)


def test_a_tensor_of_another_size_is_told(image):
    model = zoo.load(NAME)
    with pytest.warns(UserWarning, match="a tensor of 40×48 pixels is taken as it is, and the network was tr"):
        model.classify(torch.rand(3, 40, 48))
    model.classify(torch.rand(2, 3, 32, 32))


def test_top_may_be_a_number_of_numpy(image):
    assert len(zoo.load(NAME).classify(image, top=numpy.int64(2))) == 2


@pytest.mark.parametrize("bits", [8, 16])
def test_grey_images_of_netpbm_are_read(tmp_path, bits):
    pixels = noise(8, 8).astype(f"uint{bits}") * (257 if bits == 16 else 1)
    largest = 2**bits - 1
    (tmp_path / "a.pgm").write_bytes(b"P5 8 8 %d\n" % largest + pixels.astype(f">u{bits // 8}").tobytes())
    assert torch.equal(ImageTransform(1, 8).read(tmp_path / "a.pgm")[0], torch.from_numpy(noise(8, 8)))


def test_a_transparent_level_of_sixteen_bits_becomes_white(tmp_path):
    pixels = numpy.full((8, 8), 1000, dtype=numpy.uint16)
    pixels[:, 4:] = 60_000
    for dtype, divisor in ((numpy.uint16, 1), (numpy.uint8, 257)):
        level = 1000 // divisor
        Image.fromarray((pixels // divisor).astype(dtype)).save(tmp_path / "a.png", transparency=level)
        read = ImageTransform(1, 8).read(tmp_path / "a.png")[0]
        assert (read[:, :4] == 255).all() and (read[:, 4:] == 60_000 // 257).all(), dtype


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("https://x.org/run/last.ckpt", "https://x.org/run/last.ckpt is no file of this machine; download it first"),
        (
            "net/model.safetensors",
            "net/model.safetensors holds weights, and nothing of a run; .* --model.init_from net",
        ),
    ],
)
def test_what_is_no_checkpoint_of_a_run_is_told_what_it_is(run, path, message):  # noqa: F811
    zoo.save(zoo.load("digits_cnn6_conv"), "net")
    for words in (["fit"], ["predict"], ["test"]):
        status, _, errors = run(*words, "--ckpt_path", path)
        assert status == 1 and re.search(message, errors), errors
