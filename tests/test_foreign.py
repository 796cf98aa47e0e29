"""What others have saved: old names of timm, timm's own folders, and weights under other names."""

import contextlib
import json
import re
from pathlib import Path

import pytest
import safetensors.torch
import timm
import torch
from timm.models import save_for_hf

import zoo
from operators import convert_decoupled
from tests.command_line import fit, make_photos, run  # noqa: F401
from tests.hub_fixture import put
from zoo.checkpoints.foreign_weights import prefixes
from zoo.checkpoints.starting_points import licence_of, shape_of, start_from
from zoo.commands import console as command_line

pytestmark = pytest.mark.filterwarnings("ignore:The number of training batches")

NAME = "test_resnet"
RENAMED = timm.models.get_deprecated_models()
IMAGES = torch.rand(2, 3, 64, 64)


@pytest.fixture
def network():
    torch.manual_seed(0)
    return timm.create_model(NAME, num_classes=3).eval()


def answers(model, network):
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (model.spec.mean, model.spec.std))
    torch.testing.assert_close(model(IMAGES), network((IMAGES - mean) / std))


@pytest.mark.parametrize("old", RENAMED)
def test_every_old_name_is_that_of_today(old):
    architecture, _, tag = RENAMED[old].partition(".")
    # timm itself forgot to bring two of its names up to date.
    known = not tag or RENAMED[old] in timm.list_pretrained(f"{architecture}.*")
    refused = pytest.raises(ValueError, match=f"unknown tag of {architecture} '{tag}'. Did you mean '{tag}_")
    with pytest.warns(UserWarning, match=f"timm calls {old} {RENAMED[old]} today, which is taken"):
        with contextlib.nullcontext() if known else refused:
            assert shape_of(f"timm:{old}") == shape_of(f"timm:{RENAMED[old]}")


def test_a_network_by_its_old_name_is_built_and_recorded_by_that_of_today(tmp_path):
    for make in (zoo.build, lambda old, **settings: start_from(f"timm:{old}", weights=tmp_path / "weights.pth")):
        torch.save(timm.create_model("resnet18", num_classes=2).state_dict(), tmp_path / "weights.pth")
        with pytest.warns(UserWarning, match="timm calls gluon_resnet18_v1b resnet18.gluon_in1k today"):
            model = make("gluon_resnet18_v1b", num_classes=2)
        assert model.spec.architecture == "resnet18" and len(model.class_names) == 2


def test_a_network_that_timm_has_no_more_is_refused(monkeypatch):
    monkeypatch.setattr(timm.models, "get_deprecated_models", lambda: {"resnet51": None})
    for make in (zoo.build, lambda old: start_from(f"timm:{old}")):
        with pytest.raises(ValueError, match="timm has it no more.* 'resnet51'. Did you mean 'resnet5"):
            make("resnet51")


def saved_by_timm(folder, network, **config):
    save_for_hf(network, folder, model_config=config, safe_serialization=True)
    return folder


def test_a_folder_of_timm_is_a_plain_network_to_start_from(tmp_path, network):
    folder = saved_by_timm(tmp_path / "mine", network, label_names=["ant", "bee", "cat"], license="mit")
    model = start_from(folder, input_size=64)
    answers(model, network)
    assert model.class_names == ("ant", "bee", "cat") and model.spec.architecture == NAME
    assert shape_of(folder) == (3, 160) and model.spec.operator is None
    for function in (zoo.load, zoo.verify):
        with pytest.raises(zoo.CheckpointError, match=f"plain network of timm, {NAME}: start from it .--model.init_fr"):
            function(folder)


def test_an_old_folder_of_timm_with_arguments_is_understood(tmp_path):
    network = timm.create_model(NAME, num_classes=3, in_chans=1, act_layer="gelu").eval()
    config = {"architecture": NAME, "num_classes": 3, "input_size": [1, 64, 64], "mean": [0.4], "std": [0.2]}
    config |= {"first_conv": "conv1", "classifier": "fc", "license": "mit", "model_args": {"act_layer": "gelu"}}
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/config.json").write_text(
        json.dumps(config | {"model_args": {"act_layer": "gelu", "in_chans": 1}})
    )
    torch.save(network.state_dict(), tmp_path / "mine/pytorch_model.bin")
    model, images = start_from(tmp_path / "mine"), IMAGES[:, :1]
    torch.testing.assert_close(model(images), network((images - 0.4) / 0.2))
    assert licence_of(tmp_path / "mine") == "mit" and model.spec.model_args == {"act_layer": "gelu"}
    assert model.class_names == ("0", "1", "2") and model.spec.input_size == 64


def test_a_folder_of_timm_is_converted_and_fine_tuned(run, network):  # noqa: F811
    make_photos(Path("photos"), count=8, size=40)
    saved_by_timm("mine", network)
    status, _, errors = run("convert", "mine", f"mine_{NAME}_tanh_cosine", main=command_line.main)
    assert status == 0, errors
    assert zoo.load(f"outputs/mine_{NAME}_tanh_cosine").spec.operator.weighting == "linear"
    words = ["--data=ImageFolder", "--data.root=photos", "--data.input_size=48", "--model.operator", "tanh_cosine"]
    path = fit(run, "--model.init_from", "mine", *words)
    assert torch.load(path, weights_only=True)["decoupled_zoo"]["source"]["name"] == "mine"


def test_a_repository_of_timm_is_started_from(server, tmp_path, network):
    folder = saved_by_timm(tmp_path / "mine", network)
    put(server, {file: (folder / file).read_bytes() for file in ("config.json", "model.safetensors")}, "timm/mine")
    answers(start_from("timm/mine", input_size=64), network)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"architecture": "resnet51", "num_classes": 3}, "unknown network of timm 'resnet51'"),
        (
            {"model_type": "resnet", "architectures": ["X"]},
            r"is of a network of transformers \(resnet\), which the zoo c",
        ),
        ({"a": 1}, "is of another program, which the zoo cannot build"),
        ([1], "is no description of a network, but list"),
        ({"schema": 99}, "has schema 99, this version reads 1; update decoupled-zoo"),
        ({"architecture": NAME, "num_classes": 3}, "no file .*model.safetensors"),
        ({"architecture": NAME, "num_classes": 3, "model_args": {"layers": [10**6, 1, 1, 1]}}, "bytes or 5000 tensors"),
        ({"architecture": NAME, "model_args": {"checkpoint_path": "/etc/passwd"}}, "no file .*model.safetensors"),
    ],
)
def test_folders_of_others_are_told_what_they_are(run, config, message):  # noqa: F811
    Path("mine").mkdir()
    Path("mine/config.json").write_text(json.dumps(config))
    status, _, errors = run("convert", "./mine", f"mine_{NAME}_tanh_cosine", main=command_line.main)
    assert status == 1 and re.search(message, errors) and not Path("outputs").exists()


@pytest.mark.parametrize("prefix", ["model.", "net.", "backbone.", "module.", "_orig_mod.", "model.network.", "a.b.c."])
@pytest.mark.parametrize("container", [None, "state_dict", "net", "my_weights"])
def test_a_prefix_of_all_names_is_taken_off_and_told(tmp_path, network, prefix, container, recwarn):
    tensors = {f"{prefix}{name}": tensor for name, tensor in network.state_dict().items()}
    torch.save({container: tensors, "epoch": 3} if container else tensors, tmp_path / "weights.pth")
    answers(start_from(f"timm:{NAME}", weights=tmp_path / "weights.pth", input_size=64), network)
    told = [str(warning.message) for warning in recwarn]
    understood = prefix in ("module.", "_orig_mod.")
    assert len(told) == (0 if understood else 1) and all(f"the prefix {prefix!r} of all names is ta" in t for t in told)


def test_a_prefix_is_taken_off_only_if_all_else_fits(tmp_path, network):
    tensors = {f"model.{name}": tensor for name, tensor in network.state_dict().items()}
    for spoilt in (
        tensors | {"criterion.weight": torch.ones(3)},
        {name: tensor for name, tensor in tensors.items() if "fc.bias" not in name},
        tensors | {"model.fc.weight": torch.ones(3, 7)},
    ):
        safetensors.torch.save_file(spoilt, tmp_path / "weights.safetensors")
        with pytest.raises(ValueError, match=f"weights.safetensors does not fit {NAME}: "):
            start_from(f"timm:{NAME}", weights=tmp_path / "weights.safetensors")


def test_prefixes_end_at_dots():
    assert prefixes(["model.net.a", "model.net.b"]) == ["model.", "model.net."]
    assert (
        prefixes(["models.a", "model.a"]) == [] == prefixes(["a.b", "c.d"]) and prefixes(["layer1.x", "layer2.x"]) == []
    )


@pytest.mark.parametrize(
    ("saved", "message"),
    [
        ({"class_weights": torch.ones(3), "ema": {}}, "holds no weights by their names, but class_weights, ema"),
        ({"weights": torch.ones(3), "epoch": 1}, "holds no weights by their names, but weights, epoch"),
        ({"epoch": 3, "loss": 0.1}, "holds no weights by their names, but epoch, loss; save network.state_dict"),
        ([torch.ones(3)], "holds no weights by their names, but list"),
        (
            {"decoupled_zoo": {}, "state_dict": {}},
            "is of a training of the zoo; python -m zoo export .*weights.pth NAME",
        ),
    ],
)
def test_files_without_weights_are_told(tmp_path, saved, message):
    torch.save(saved, tmp_path / "weights.pth")
    with pytest.raises(ValueError, match=message):
        start_from(f"timm:{NAME}", weights=tmp_path / "weights.pth")


def test_weights_of_a_decoupled_checkpoint_are_not_taken_for_plain_ones(tmp_path):
    folder = zoo.save(zoo.build(NAME, "sphere_cosine", num_classes=3).eval(), tmp_path / "mine")
    with pytest.raises(ValueError, match="model.safetensors is of a decoupled network, .* zoo.load.'.*mine'. loads"):
        start_from(f"timm:{NAME}", weights=folder / "model.safetensors")
    network, _ = convert_decoupled(timm.create_model(NAME, num_classes=3), "sphere_cosine")
    for is_safe, file in ((True, "model.safetensors"), (False, "pytorch_model.bin")):
        save_for_hf(network, tmp_path / file, safe_serialization=is_safe)
        with pytest.raises(ValueError, match=f"{file} is of a decoupled network"):
            start_from(f"timm:{NAME}", weights=tmp_path / file / file)
    plain = zoo.build(NAME, num_classes=3, input_size=64).eval()
    folder = zoo.save(plain, tmp_path / "plain")
    answers(start_from(f"timm:{NAME}", weights=folder / "model.safetensors", input_size=64), plain.network)
