"""Networks to start from: timm's with weights from the Hub's cache or a file, checkpoints, and their conversion."""

import json
import re
import shutil
from pathlib import Path

import pytest
import safetensors.torch
import timm
import torch

import zoo
from operators import OperatorConfig, calibrate
from tests.command_line import fit, make_photos
from zoo.checkpoints.starting_points import licence_of, shape_of, start_from
from zoo.commands import console as command_line
from zoo.data import Digits
from zoo.errors import CheckpointError
from zoo.models.conversion import convert

NAME = "test_resnet"


pytestmark = [
    # Two steps are fewer than the logging interval that real recipes have.
    pytest.mark.filterwarnings("ignore:The number of training batches"),
]


@pytest.fixture
def weights(tmp_path):
    """Return a file with random weights of test_resnet for ImageNet's classes, and the network."""
    torch.manual_seed(0)
    network = timm.create_model(NAME).eval()
    safetensors.torch.save_file(network.state_dict(), tmp_path / "weights.safetensors")
    return tmp_path / "weights.safetensors", network


@pytest.fixture
def hub_cache(tmp_path, weights, monkeypatch):
    """Lay the weights where the Hub's client has them after a download, and allow no network."""
    repository = timm.get_pretrained_cfg(NAME).hf_hub_id
    folder = tmp_path / "hub" / f"models--{repository.replace('/', '--')}"
    commit = "0" * 40
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text(commit)
    (folder / "snapshots" / commit).mkdir(parents=True)
    shutil.copy(weights[0], folder / "snapshots" / commit / "model.safetensors")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))


def normalised(images):
    config = timm.get_pretrained_cfg(NAME)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (config.mean, config.std))
    return (images - mean) / std


def test_a_network_of_timm_comes_with_its_weights_classes_and_normalisation(hub_cache, weights):
    model = start_from(f"timm:{NAME}")
    images = torch.rand(2, 3, 96, 96)
    torch.testing.assert_close(model(images), weights[1](normalised(images)))
    assert not model.training and (model.spec.architecture, model.spec.input_size) == (NAME, 160)
    assert model.class_names[0] == "tench, Tinca tinca" and len(model.class_names) == 1000
    assert shape_of(f"timm:{NAME}") == (3, 160) and licence_of(f"timm:{NAME}") == "apache-2.0"
    tagged = start_from(f"timm:{NAME}.r160_in1k", in_chans=1, input_size=64)
    assert tagged.spec.mean == pytest.approx([sum(timm.get_pretrained_cfg(NAME).mean) / 3])
    assert tagged.spec.architecture == NAME and (tagged.spec.in_chans, tagged.spec.input_size) == (1, 64)


def test_weights_that_cannot_be_had_are_an_error_with_the_cure(hub_cache):
    with pytest.raises(ValueError, match="weights of timm:test_vit cannot be had.*--weights FILE"):
        start_from("timm:test_vit")


@pytest.mark.parametrize("name", ["resnet51", "resnet20", "resnet20.x"])
def test_an_unknown_network_of_timm_is_refused(name):
    with pytest.raises(ValueError, match=f"unknown network of timm '{name}'. Did you mean 'resnet"):
        start_from(f"timm:{name}")
    for function in (shape_of, licence_of):
        with pytest.raises(ValueError, match="unknown network of timm"):
            function(f"timm:{name}")


def test_an_unknown_tag_is_refused():
    with pytest.raises(ValueError, match="unknown tag of resnet50 'a1_in1'. Did you mean 'a1_in1k'"):
        start_from("timm:resnet50.a1_in1")


def test_weights_of_a_tag_expect_the_pixels_of_that_tag(tmp_path):
    network = timm.create_model("tf_efficientnet_b0", num_classes=2)
    safetensors.torch.save_file(network.state_dict(), tmp_path / "weights.safetensors")
    for tag, mean in [(".ap_in1k", 0.5), ("", 0.485)]:
        model = start_from(f"timm:tf_efficientnet_b0{tag}", weights=tmp_path / "weights.safetensors", input_size=32)
        assert model.spec.mean[0] == mean


def test_weights_of_before_torch_counted_batches_are_taken(tmp_path, weights):
    tensors = {name: value for name, value in weights[1].state_dict().items() if "num_batches" not in name}
    safetensors.torch.save_file(tensors, tmp_path / "old.safetensors")
    model = start_from(f"timm:{NAME}", weights=tmp_path / "old.safetensors")
    images = torch.rand(1, 3, 64, 64)
    torch.testing.assert_close(model(images), weights[1](normalised(images)))


@pytest.mark.parametrize("ending", ["safetensors", "pth"])
def test_weights_from_a_file_tell_the_classes_and_channels(tmp_path, ending):
    torch.manual_seed(0)
    network = timm.create_model(NAME, num_classes=3, in_chans=1).eval()
    path = tmp_path / f"mine.{ending}"
    if ending == "pth":
        torch.save({"state_dict": {f"module.{name}": value for name, value in network.state_dict().items()}}, path)
    else:
        safetensors.torch.save_file(network.state_dict(), path)
    model = start_from(f"timm:{NAME}", weights=path, input_size=32)
    assert (model.class_names, model.spec.in_chans, model.spec.input_size) == (("0", "1", "2"), 1, 32)
    images = torch.rand(2, 1, 32, 32)
    torch.testing.assert_close(model(images), network((images - 0.5) / 0.25))


def test_wrong_weights_are_refused(tmp_path, weights):
    with pytest.raises(FileNotFoundError, match="no file .*nowhere.pth; weights are"):
        start_from(f"timm:{NAME}", weights=tmp_path / "nowhere.pth")
    (tmp_path / "broken.pth").write_bytes(b"not weights")
    with pytest.raises(ValueError, match="broken.pth cannot be read as weights"):
        start_from(f"timm:{NAME}", weights=tmp_path / "broken.pth")
    torch.save(weights[1], tmp_path / "whole.pth")
    with pytest.raises(ValueError, match=r"whole.pth cannot be read .{,250}; a whole network is not taken, for"):
        start_from(f"timm:{NAME}", weights=tmp_path / "whole.pth")
    with pytest.raises(ValueError, match="weights.safetensors does not fit test_vit: missing cls_token; .*in all"):
        start_from("timm:test_vit", weights=weights[0])
    with pytest.raises(ValueError, match="takes 3 channels, not 1"):
        start_from(f"timm:{NAME}", weights=weights[0], in_chans=1)
    with pytest.raises(ValueError, match="digits_cnn6_conv has weights of its own"):
        start_from("digits_cnn6_conv", weights=weights[0])


def test_a_checkpoint_starts_at_another_size_or_not_at_all():
    assert start_from("digits_cnn6_conv", input_size=16).transform.input_size == 16
    assert shape_of("digits_cnn6_conv") == (1, 8) and shape_of("cifar10_resnet20_conv") == (3, 32)
    with pytest.raises(ValueError, match="cannot take 2×2"):
        start_from("digits_cnn6_conv", input_size=2)


def test_a_bare_name_is_weighted_and_anything_else_means_what_it_says():
    for operator, weighting in [
        ("tanh_cosine", "linear"),
        ({"name": "tanh_cosine", "radius": 2.0}, "none"),
        ({"name": "tanh_cosine", "weighting": "tanh"}, "tanh"),
        (OperatorConfig("tanh", "cosine"), "none"),
    ]:
        model = zoo.load("digits_cnn6_conv")
        report = convert(model, operator)
        assert model.spec.operator == report.operator and model.spec.operator.weighting == weighting
    with pytest.raises(ValueError, match="the network is tanh_cosine already, .*or leave out operator and calibrate"):
        convert(model, "ball_cosine")


def test_a_calibrated_model_is_saved_and_loaded_with_what_its_layers_have_of_their_own(tmp_path):
    model = zoo.load("digits_cnn6_conv")
    convert(model, "seg_cosine")
    calibrate(model, [Digits().sample(64)], 0.9)
    folder = zoo.save(model, tmp_path / "digits_cnn6_seg_cosine")
    config = json.loads((folder / "config.json").read_text())
    assert config["operator"]["radius"] == 1.0 and len(config["layer_settings"]) == 6
    assert set(config["layer_settings"]["features.0"]) == {"radius", "alpha", "beta"}
    loaded = zoo.load(folder)
    images = torch.rand(4, 1, 8, 8)
    assert torch.equal(loaded(images), model(images)) and zoo.verify(folder) == []
    assert "| settings of single layers | 6 layers, listed in `config.json` |" in (folder / "README.md").read_text()
    assert loaded.describe() == loaded.spec == model.describe()
    with pytest.warns(UserWarning, match="3 channels"):
        wider = zoo.load(folder, in_chans=3)
    torch.testing.assert_close(wider(images.expand(4, 3, 8, 8)), model(images), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"features.99": {"radius": 2.0}}, "unknown decoupled layer 'features.99'"),
        ({"fc": {"radius": 2.0}}, "unknown decoupled layer 'fc'"),
        ({"features.0": {"radius": -1.0}}, "radius must be more than 0"),
        ({"features.0": {"radios": 1.0}}, "unknown operator setting 'radios'. Did you mean 'radius'"),
        ({"features.0": 3}, "layer_settings"),
        (["features.0"], "layer_settings"),
    ],
)
def test_wrong_settings_of_layers_are_refused(tmp_path, settings, message):
    folder = zoo.save(zoo.build("cnn6", "seg_cosine", in_chans=1, input_size=8), tmp_path / "digits_cnn6_seg_cosine")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "layer_settings": settings}))
    with pytest.raises(CheckpointError, match=message):
        zoo.load(folder)


def test_a_network_of_timm_is_converted_calibrated_and_fine_tuned(run, hub_cache):  # noqa: F811
    make_photos(Path("photos"), count=8, size=40)
    words = ["--model.init_from", f"timm:{NAME}", "--model.operator", "tanh_cosine", "--model.calibrate", "0.99"]
    path = fit(run, "--data=ImageFolder", "--data.root=photos", "--data.input_size=48", *words)
    assert "15 convolutions converted\n" in run.told() and "15 convolutions calibrated on 14" in run.told()
    record = torch.load(path, weights_only=True)["decoupled_zoo"]
    assert record["source"] == {"name": f"timm:{NAME}", "licence": "apache-2.0"}
    folder = f"photos_{NAME}_tanh_cosine"
    status, _, errors = run("export", path, folder, "--to", ".", main=command_line.main)
    assert status == 0, errors
    config = json.loads(Path(folder, "config.json").read_text())
    assert config["licence"] == f"not stated (images), apache-2.0 (timm:{NAME})"
    assert config["training"]["started_from"] == f"timm:{NAME}" and config["class_names"] == ["cat", "dog"]
    assert zoo.load(folder).spec.mean == start_from(f"timm:{NAME}").spec.mean


def zoo_command(run, *words):  # noqa: F811
    return run("convert", *words, main=command_line.main)


def test_the_convert_command_writes_a_calibrated_folder_and_shows_the_report(run, weights):  # noqa: F811
    make_photos(Path("photos"), count=4, size=40)
    words = ["timm:test_resnet", "imagenet_test_resnet_tanh_cosine", "--weights", weights[0], "--images", "photos"]
    status, printed, errors = zoo_command(run, *words)
    assert status == 0, errors
    assert "tanh_cosine(weighting=linear): 15 convolutions converted\n" in printed and printed.count("\n") <= 25
    assert "15 convolutions calibrated on 8 images, radii searched" in printed and "accuracy" not in printed
    model = zoo.load("outputs/imagenet_test_resnet_tanh_cosine")
    assert model.spec.operator.weighting == "linear" and len(model.spec.layer_settings) == 15
    assert zoo.verify("outputs/imagenet_test_resnet_tanh_cosine") == []
    status, _, errors = zoo_command(run, *words)
    assert status == 1 and "exists; choose another name or parent (--to), or replace it (--overwrite)" in errors


def test_the_convert_command_takes_a_plain_checkpoint(run):  # noqa: F811
    status, _, errors = zoo_command(run, "digits_cnn6_conv", "digits_cnn6_conv", "--to", "plain")
    assert status == 0 and zoo.load("plain/digits_cnn6_conv").spec.operator is None, errors
    status, printed, errors = zoo_command(run, "digits_cnn6_conv", "digits_cnn6_mix_cosine", "--to", "here")
    assert status == 0 and "not calibrated (--images), so train it before use" in printed, errors
    assert zoo.load("here/digits_cnn6_mix_cosine").spec.operator.name == "mix_cosine"
    assert json.loads(Path("here/digits_cnn6_mix_cosine/config.json").read_text())["licence"] == "CC-BY-4.0"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("digits_cnn6_conv digits_cnn6_mixx_cosine", "unknown operator 'mixx_cosine'. Did you mean 'mix_cosine'"),
        ("digits_cnn6_conv digits --operator mixx_cosine", "unknown operator 'mixx_cosine'. Did you mean 'mix_cosine'"),
        ("digits_cnn6_conv photos --operator mix_cosine", "is called <data>_cnn6_mix_cosine, got 'photos'"),
        ("digits_cnn6_conv digits", "is called <data>_cnn6_<operator>, got 'digits'"),
        ("digits_cnn6_conv _cnn6_mix_cosine", "is called <data>_cnn6_mix_cosine, got '_cnn6_mix_cosine'"),
        ("resnet10t a_resnet10t_mix_cosine", "resnet10t is a network of timm: .* write timm:resnet10t"),
        ("./photo a_cnn6_mix_cosine", "no checkpoint folder ./photo; check the path"),
        (
            "digits_cnn6_conv digits_cnn6_mix_cosine --classes classes.txt",
            "classes.txt has 2 lines, 2 of them",
        ),
        ("digits_cnn6_tanh_cosine digits_cnn6_mix_cosine", "the network is tanh_cosine already"),
        ("digits_cnn6_conv digits_cnn6_conv --images here", "a plain network is not converted: leave out"),
        ("digits_cnn6_conv digits_cnn6_mix_cosine --images nowhere", "no image file or folder nowhere"),
        ("digits_cnn6_conv digits_cnn6_mix_cosine --images here --quantile 2", r"quantile is a share in \(0, 1\]"),
        ("digits_cnn6_conv digits_cnn6_mix_cosine --quantile 0.9", "--quantile 0.9 says how .* needs --images"),
        ("digits_cnn6_conv digits_cnn6_mix_cosine --distil 2", "--distil 2 says how .* needs --images"),
        ("digits_cnn6_conv digits_cnn6_mix_cosine --images here --teacher mnist_cnn6_conv", "needs --distil"),
        ("digits_cnn6_conv digits_cnn6_mix_cosine --images here --least-beyond 1", r"least_beyond is .* in \[0, 1\)"),
        ("digits_cnn6_conv digits_cnn6_mix_cosine --least-beyond 0.1", "--least-beyond 0.1 says how .* needs --images"),
        (
            "digits_cnn6_conv digits_cnn6_mix_cosine --images here --least-beyond 0.1 --quantile 0.9",
            "--least-beyond bounds radii that are searched for, and --quantile says them",
        ),
        ("digits_cnn6_conv digits_cnn6_mix_cosine --keep stem", "unknown convolution to keep plain 'stem'"),
        (
            "digits_cnn6_conv digits_cnn6_mix_cosine --images here --distil 1 --teacher cifar10_resnet20_conv",
            r"the teacher \(resnet20\) has other classes than the network, 10 \(airplane,",
        ),
        ("timm:vit_tiny_patch99 a_vit_mix_cosine", "unknown network of timm 'vit_tiny_patch99'. Did you mean"),
        ("digits_cnn6 digits_cnn6_mix_cosine", "unknown checkpoint 'digits_cnn6'. Did you mean"),
    ],
)
def test_the_convert_command_refuses_and_writes_nothing(run, words, message):  # noqa: F811
    make_photos(Path("here"))
    Path("classes.txt").write_text("cat\ndog\n")
    status, _, errors = zoo_command(run, *words.split())
    assert status == 1 and re.search(message, errors) and not Path("outputs").exists()


@pytest.mark.parametrize("command", ["convert", "export"])
def test_a_name_is_no_path(run, command):  # noqa: F811
    status, _, errors = run(command, "digits_cnn6_conv", "my/digits_cnn6_mix_cosine", main=command_line.main)
    assert status == 2 and "alone (--to names the folder it is put into), got 'my/digits_cnn6_mix_cosine'" in errors


@pytest.mark.filterwarnings("ignore:2 of 8 images cannot be read and are left out")
def test_the_convert_command_leaves_out_a_few_unreadable_images(run):  # noqa: F811
    photos = make_photos(Path("photos"), count=4)
    for place in (0, 1):
        (photos / f"train/cat/{place}.png").write_bytes(b"")
    words = ["digits_cnn6_conv", "digits_cnn6_tanh_cosine", "--images", "photos"]
    status, printed, errors = zoo_command(run, *words)
    assert status == 0 and "calibrated on 6 images" in printed, errors
    for file in photos.rglob("*.png"):
        file.write_bytes(b"")
    status, _, errors = zoo_command(run, *words, "--overwrite")
    assert status == 1 and "8 of 8 images cannot be read; remove or replace them:\n  photos/train/cat/0.png:" in errors
    assert zoo.verify("outputs/digits_cnn6_tanh_cosine") == []


def test_the_convert_command_names_the_classes(run):  # noqa: F811
    Path("classes.txt").write_text("\n".join(["null, zero", *"one two three four five six seven eight nine".split()]))
    folder = "outputs/digits_cnn6_mix_cosine"
    status, _, errors = zoo_command(run, "digits_cnn6_conv", Path(folder).name, "--classes", "classes.txt")
    assert status == 0 and zoo.load(folder).class_names[:2] == ("null, zero", "one"), errors
    assert "| classes | null, zero; one; two;" in Path(folder, "README.md").read_text()
