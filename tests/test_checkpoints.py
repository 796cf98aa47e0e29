"""Checkpoint folders: what is saved comes back, and nothing wrong is ever loaded."""

import hashlib
import json
import re
import shutil
from pathlib import Path

import pytest
import safetensors.torch
import torch
from PIL import Image
from torch import nn

import zoo
from operators import DecoupledConv2d, fold, revert
from zoo.checkpoints.catalogue import PRETRAINED
from zoo.checkpoints.saving import save_built
from zoo.training.adversarial import AdversarialTraining

NAME = "digits_cnn6_tanh_cosine"


@pytest.fixture
def model():
    torch.manual_seed(0)
    operator = {"name": "tanh_cosine", "radius_mode": "learned", "radius_relative": True}
    model = zoo.build("cnn6", operator, in_chans=1, class_names=[f"digit {label}" for label in range(10)])
    model(torch.rand(32, 1, 8, 8))
    return model.eval()


@pytest.fixture
def folder(model, tmp_path):
    return zoo.save(model, tmp_path / NAME, metrics=[zoo.Metric("accuracy", 0.5, "Digits", "test", 4)])


def edit_config(folder, **changes):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))


def replace_weights(folder, data):
    """Put other bytes in place of the weights, with a hash that fits, so that the later checks are reached."""
    (folder / "model.safetensors").write_bytes(data)
    edit_config(folder, sha256=hashlib.sha256(data).hexdigest())


def test_what_is_saved_comes_back(model, folder):
    loaded = zoo.load(folder)
    images = torch.rand(5, 1, 8, 8)
    assert torch.equal(loaded(images), model(images))
    assert loaded.spec == model.spec and not loaded.training
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in loaded.state_dict().items())
    assert zoo.verify(folder) == []
    assert sorted(path.name for path in folder.iterdir()) == ["README.md", "config.json", "model.safetensors"]


def test_equal_weights_give_equal_bytes(model, folder, tmp_path):
    again = zoo.save(zoo.load(folder), tmp_path / "again" / NAME)
    assert (again / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()


def test_a_half_written_folder_never_shows(model, folder, monkeypatch):
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    monkeypatch.setattr("zoo.checkpoints.saving.model_card", lambda config: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        zoo.save(model, folder, overwrite=True)
    with pytest.raises(ZeroDivisionError):
        zoo.save(model, folder.parent / "new")
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert [path.name for path in folder.parent.iterdir()] == [NAME]


def test_an_interrupted_replacement_leaves_the_old_folder(model, folder, monkeypatch):
    rename, calls = Path.rename, []

    def interrupted(self, target):
        calls.append(self)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", interrupted)
    with pytest.raises(KeyboardInterrupt):
        zoo.save(model, folder, overwrite=True)
    assert zoo.verify(folder) == []


def test_where_the_first_weights_came_from_is_not_saved(tmp_path):
    model = zoo.build("resnet10t", "ball_cosine", num_classes=2, pretrained=False)
    assert dict(zoo.load(zoo.save(model, tmp_path / "any_resnet10t_ball_cosine")).spec.model_args) == {}


def test_an_existing_folder_is_replaced_only_on_request(model, folder):
    with pytest.raises(FileExistsError, match="overwrite=True"):
        zoo.save(model, folder)
    zoo.save(model, folder, overwrite=True, licence="CC-BY-4.0")
    assert json.loads((folder / "config.json").read_text())["licence"] == "CC-BY-4.0"
    assert [path.name for path in folder.parent.iterdir()] == [NAME]


def test_weights_that_are_not_finite_are_not_saved(model, tmp_path):
    with torch.no_grad():
        model.network.fc.bias[0] = float("nan")
    with pytest.raises(ValueError, match="fc.bias has values that are not finite"):
        zoo.save(model, tmp_path / NAME)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ValueError, match="got Linear"):
        zoo.save(torch.nn.Linear(1, 1), tmp_path / NAME)


def louder(model):
    for layer in model.modules():
        if isinstance(layer, DecoupledConv2d):
            layer.magnitude.alpha = 2.0
    return model


CHANGES = {
    "missing .*features": lambda model: fold(model)[0],
    "missing .*radius": revert,
    "other answers": louder,
    "has dtype torch.bfloat16, not torch.float32": lambda model: model.bfloat16(),
}


@pytest.mark.parametrize("message", CHANGES)
def test_a_network_that_could_not_be_loaded_again_is_not_saved(model, tmp_path, message):
    changed = CHANGES[message](model)
    state = torch.get_rng_state()
    with pytest.raises(ValueError, match=f"is not what its spec describes, cnn6 with tanh_cosine .*{message}"):
        zoo.save(changed, tmp_path / NAME)
    assert list(tmp_path.iterdir()) == []
    assert torch.equal(torch.get_rng_state(), state)


def test_fresh_classifier_and_other_channels(model, folder):
    with pytest.warns(UserWarning, match="fresh classifier for 4 classes"):
        four = zoo.load(folder, num_classes=4)
    assert four(torch.rand(2, 1, 8, 8)).shape == (2, 4) and four.class_names == ("0", "1", "2", "3")
    assert torch.equal(four.network.features[0].weight, model.network.features[0].weight)
    with pytest.warns(UserWarning, match="takes 3 channels, not 1"):
        coloured = zoo.load(folder, in_chans=3)
    assert coloured(torch.rand(2, 3, 8, 8)).shape == (2, 10) and not coloured.training
    assert torch.equal(zoo.load(folder, num_classes=10, in_chans=1).network.fc.weight, model.network.fc.weight)


@pytest.mark.parametrize("number", [0, -1])
def test_no_class_and_no_channel_are_refused(folder, number):
    for load in (zoo.load, zoo.load_untrained):
        with pytest.raises(ValueError, match="a model needs at least one class"):
            load(folder, num_classes=number)
    with pytest.raises(ValueError, match=f"in_chans must be at least 1, got {number}"):
        zoo.load(folder, in_chans=number)


@pytest.mark.parametrize(
    ("operator", "old", "new"),
    [
        ("conv", 1, 3),
        ("conv", 3, 1),
        ("sphere_cosine", 1, 3),
        ("tanh_linear", 1, 4),
        ({"name": "mix_cosine", "weighting": "tanh"}, 1, 3),
    ],
)
def test_grey_images_look_the_same_to_a_network_of_other_channels(tmp_path, operator, old, new):
    torch.manual_seed(0)
    grey = zoo.build("cnn6", operator, in_chans=old, mean=[0.4] * old, std=[0.3] * old).eval()
    zoo.save(grey, tmp_path / NAME)
    with pytest.warns(UserWarning):
        adapted = zoo.load(tmp_path / NAME, in_chans=new)
    images = torch.rand(4, 1, 8, 8)
    expected = grey(images.expand(-1, old, -1, -1))
    torch.testing.assert_close(adapted(images.expand(-1, new, -1, -1)), expected, rtol=1e-5, atol=1e-5)


def test_every_flipped_bit_of_the_weights_is_found(folder):
    path = folder / "model.safetensors"
    data = path.read_bytes()
    for position in range(0, len(data), len(data) // 25):
        path.write_bytes(data[:position] + bytes([data[position] ^ 1]) + data[position + 1 :])
        with pytest.raises(zoo.CheckpointError, match="model.safetensors has sha256 .* damaged or changed; fetch"):
            zoo.load(folder)


@pytest.mark.parametrize("length", [0, 4, 8, 100, -1])
def test_a_truncated_file_is_refused_even_if_its_hash_fits(folder, length):
    replace_weights(folder, (folder / "model.safetensors").read_bytes()[:length])
    with pytest.raises(zoo.CheckpointError, match="safetensors"):
        zoo.load(folder)


def header(text: bytes) -> bytes:
    return len(text).to_bytes(8, "little") + text


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"\x80\x04\x95 a pickle", "header does not fit"),
        (header(b"not json"), "malformed header"),
        (header(b"[1]"), "malformed header"),
        (header(b"[" * 100_000), "malformed header"),
        (header(b'{"a": {}, "a": {}}'), "names 2 tensors, 1 of them different"),
        (header(b"{" + b",".join(b'"%d": {}' % n for n in range(6000)) + b"}"), "names 6000 tensors"),
        (header(b"{}" + b" " * (1 << 20)), "header does not fit"),
        (header(b'{"a": {"dtype": "F32", "shape": [9], "data_offsets": [0, 36]}}'), "not a safetensors file"),
    ],
)
def test_a_malformed_file_is_refused(folder, data, message):
    replace_weights(folder, data)
    with pytest.raises(zoo.CheckpointError, match=message):
        zoo.load(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors: tensors.pop("fc.bias"), "missing fc.bias"),
        (lambda tensors: tensors.update(extra=torch.zeros(1)), "unexpected extra"),
        (lambda tensors: tensors.update({"fc.bias": torch.zeros(11)}), r"fc.bias has shape \(11,\), not \(10,\)"),
        (lambda tensors: tensors.update({"fc.bias": torch.zeros(10).double()}), "fc.bias has dtype torch.float64"),
        (lambda tensors: tensors["fc.bias"].fill_(float("inf")), "fc.bias has values that are not finite"),
    ],
)
def test_tensors_that_do_not_fit_are_named(model, folder, change, message):
    tensors = dict(model.network.state_dict())
    change(tensors)
    replace_weights(folder, safetensors.torch.save(tensors))
    with pytest.raises(zoo.CheckpointError, match=message):
        zoo.load(folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"schema": 99}, "schema 99, this version reads 1; update decoupled-zoo"),
        ({"sha256": None}, "'sha256' is missing or malformed"),
        ({"parameters": None}, "'parameters' is missing or malformed"),
        ({"metrics": [{"name": "accuracy"}]}, "a metric has other fields than dataset, images, name, split, value"),
        (
            {"model_args": {"checkpoint_path": "a", "pretrained": True}},
            r"weights \(checkpoint_path, pretrained\)",
        ),
        ({"architecture": "cnn7"}, "describes no model that can be built: unknown architecture 'cnn7'.*cnn6"),
        ({"operator": {"name": "tanh_cosine", "radiu": 1}}, "unknown operator setting 'radiu'.*radius"),
        ({"mean": [0.5, 0.5]}, "mean needs one number for each"),
        ({"class_names": ["only", "two"]}, r"fc.bias has shape \(10,\), not \(2,\)"),
        ({"in_chans": 10**6, "mean": [0.5] * 10**6, "std": [0.5] * 10**6}, "takes more than 268,435,456 bytes"),
        ({"training": {"command": "x" * (1 << 24)}}, "more than 16,777,216 characters"),
        ({"architecture": "resnet50", "model_args": {"layers": [10**6, 1, 1, 1]}}, "bytes or 5000 tensors"),
    ],
)
def test_a_config_that_is_wrong_is_named(folder, changes, message):
    edit_config(folder, **changes)
    with pytest.raises(zoo.CheckpointError, match=message):
        zoo.load(folder)


def test_missing_files_are_named(folder, tmp_path):
    (folder / "model.safetensors").unlink()
    with pytest.raises(zoo.CheckpointError, match="model.safetensors is missing"):
        zoo.load(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(zoo.CheckpointError, match="config.json is not JSON"):
        zoo.load(folder)
    (folder / "config.json").unlink()
    with pytest.raises(zoo.CheckpointError, match="config.json is missing: .* is no checkpoint folder"):
        zoo.load(folder)


def test_the_code_of_the_card_runs(folder, tmp_path, monkeypatch, capsys):
    shutil.copytree(folder, tmp_path / "path/to" / NAME)
    Image.new("L", (20, 30)).save(tmp_path / "image.png")
    monkeypatch.chdir(tmp_path)
    (code,) = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    names = {}
    exec(code, names)
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == 5 and all(re.fullmatch(r"digit \d: \d+\.\d%", line) for line in printed)


def test_an_unknown_name_lists_the_legal_ones_and_the_nearest():
    with pytest.raises(ValueError, match=f"unknown checkpoint 'digits_cnn6_tan_cosine'. Did you mean '{NAME}'"):
        zoo.load("digits_cnn6_tan_cosine")
    with pytest.raises(ValueError, match="owner/name is not in the Hub's cache, .* no request is made"):
        zoo.load("owner/name")


def test_a_repository_is_taken_from_the_cache_of_the_hub(tmp_path, monkeypatch):
    commit = "1" * 40
    repository = tmp_path / "models--owner--name"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs/main").write_text(commit)
    shutil.copytree(PRETRAINED / NAME, repository / "snapshots" / commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    images = torch.rand(2, 1, 8, 8)
    assert torch.equal(zoo.load("owner/name")(images), zoo.load(NAME)(images))


def test_a_misspelt_path_is_no_repository(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("outputs").mkdir()
    with pytest.raises(ValueError, match="no checkpoint folder outputs/photo; check the path"):
        zoo.load("outputs/photo")


def test_verify_finds_what_is_not_as_claimed(tmp_path):
    folder = shutil.copytree(PRETRAINED / NAME, tmp_path / NAME)
    operator = json.loads((folder / "config.json").read_text())["operator"]
    edit_config(folder, operator={**operator, "eps": 1e-3})
    assert any("fingerprint" in problem for problem in zoo.verify(folder))
    edit_config(folder, operator=operator, fingerprint=[[float("nan")] * 10] * 2)
    assert any("fingerprint" in problem for problem in zoo.verify(folder))
    edit_config(folder, fingerprint=json.loads((PRETRAINED / NAME / "config.json").read_text())["fingerprint"])
    assert zoo.verify(folder) == []
    (folder / "README.md").write_text("another card")
    assert zoo.verify(folder) == [
        f"README.md: not the card that config.json gives; python -m zoo cards {folder} writes it"
    ]


def test_verify_measures_accuracy_on_request(model, folder):
    images = torch.rand(4, 1, 8, 8)
    right = model(images).argmax(1)
    labels = torch.cat([right[:2], (right[2:] + 1) % 10])
    assert zoo.verify(folder, [(images[:3], labels[:3]), (images[3:], labels[3:])]) == []
    assert "accuracy on 4 test images is 1.0000" in zoo.verify(folder, [(images, right)])[0]
    assert "on 3 test images" in zoo.verify(folder, [(images[:3], labels[:3])])[0]
    with pytest.raises(ValueError, match="records no accuracy on the split 'val'"):
        zoo.verify(folder, [(images, labels)], split="val")


@pytest.mark.parametrize("name", zoo.list_checkpoints())
def test_an_embedded_checkpoint_is_what_it_claims(name):
    folder = PRETRAINED / name
    assert zoo.verify(name) == []
    config = json.loads((folder / "config.json").read_text())
    assert config["name"] == name
    assert {metric["split"] for metric in config["metrics"]} == {"val", "test"}
    assert {"command", "seed", "commit", "hardware", "epochs", "data"} <= set(config["training"])
    assert sum(path.stat().st_size for path in folder.iterdir()) <= 4 * 2**20
    model = zoo.load(name)
    assert name.endswith(f"_{model.spec.architecture}_{model.spec.operator_name}")
    assert f"{name.removesuffix(model.spec.operator_name)}conv" in zoo.list_checkpoints()


def test_the_embedded_checkpoints_are_small_and_whole(tmp_path):
    assert set(zoo.list_checkpoints()) >= {"digits_cnn6_tanh_cosine", "digits_cnn6_sphere_cosine", "digits_cnn6_conv"}
    assert sum(path.stat().st_size for path in PRETRAINED.rglob("*") if path.is_file()) <= 40 * 2**20
    copy = shutil.copytree(PRETRAINED / NAME, tmp_path / "elsewhere" / NAME)
    assert zoo.load(copy).spec == zoo.load(NAME).spec


@pytest.mark.parametrize("settings", [{"num_classes": "3"}, {"num_classes": True}, {"in_chans": 2.5}])
def test_numbers_that_are_none_are_refused(settings):
    ((name, value),) = settings.items()
    with pytest.raises(TypeError, match=f"{name} is a whole number, got {value!r}"):
        zoo.load(NAME, **settings)


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ("", "unknown checkpoint ''"),
        ("me/digits@main", "a Hub repository is called owner/name; its revision is an argument of its own"),
        ("https://host/me/digits", "a Hub repository is called owner/name"),
        ("hf-hub:me/digits@main", "names no Hub repository, which is called owner/name; its revision is given apart"),
    ],
)
def test_what_is_no_name_is_told(where, message):
    with pytest.raises(ValueError, match=message):
        zoo.load(where)


def test_a_model_whose_answers_are_not_finite_is_not_saved(tmp_path):
    model = zoo.load(NAME)
    norm = next(module for module in model.modules() if isinstance(module, nn.BatchNorm2d))
    # A negative variance is finite itself.
    norm.running_var.fill_(-1.0)
    for write in (zoo.save, save_built):
        with pytest.raises(ValueError, match="logits on the fingerprint's images are not finite .*nan.*weights are"):
            write(model, tmp_path / NAME)
    assert not any(tmp_path.iterdir())


def test_measuring_leaves_each_module_in_its_mode():
    model = zoo.build("cnn6", "tanh_cosine", in_chans=1, input_size=8)
    next(module for module in model.modules() if isinstance(module, nn.BatchNorm2d)).eval()
    modes = [module.training for module in model.modules()]
    zoo.accuracy(model, [(torch.rand(2, 1, 8, 8), torch.zeros(2, dtype=torch.int64))])
    model.set_input_size(16)
    AdversarialTraining(steps=1).perturb(model, torch.rand(2, 1, 16, 16), torch.zeros(2, dtype=torch.int64))
    assert [module.training for module in model.modules()] == modes and len(set(modes)) == 2
