"""``torch.hub`` from any folder, in processes of their own, with a local and with a fetched repository."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import zoo
from zoo.architectures import ARCHITECTURES

ROOT = Path(__file__).resolve().parent.parent
# torch.hub finds a repository that it has fetched before under this name, and then asks no network.
FETCHED = "ORG/decoupled-zoo:main"
NO_LIGHTNING = """
import sys
sys.modules.update(dict.fromkeys(["lightning", "pytorch_lightning", "jsonargparse", "sklearn", "matplotlib"]))
"""


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """Return a folder of torch.hub that holds this checkout as fetched."""
    folder = tmp_path_factory.mktemp("hub")
    checkout = folder / "ORG_decoupled-zoo_main"
    for name in ("operators", "zoo"):
        shutil.copytree(ROOT / name, checkout / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "hubconf.py", checkout)
    return folder


def run(code, folder, *, check=True):
    """Run code in another folder; the checkout is found by torch.hub alone."""
    # Without the editable install, which makes `zoo` importable from anywhere.
    prelude = f"import sys; sys.path[:] = [p for p in sys.path if p != {str(ROOT)!r}]; import torch\n"
    command = [sys.executable, "-c", prelude + code]
    result = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert not check or result.returncode == 0, result.stderr
    return result


def test_the_entries_are_the_checkpoints_and_the_architectures(hub, tmp_path):
    listing = f"torch.hub.list({FETCHED!r}, skip_validation=True, trust_repo=True, verbose=False)"
    entries = json.loads(
        run(f"import json; torch.hub.set_dir({str(hub)!r}); print(json.dumps({listing}))", tmp_path).stdout
    )
    assert set(entries) == {*zoo.list_checkpoints(), *ARCHITECTURES, "checkpoint"}


@pytest.mark.parametrize("name", ["digits_cnn6_tanh_cosine", "resnet20", "checkpoint"])
def test_help_tells_what_an_entry_takes(hub, tmp_path, name):
    text = f"torch.hub.help({FETCHED!r}, {name!r}, skip_validation=True, trust_repo=True)"
    text = run(f"torch.hub.set_dir({str(hub)!r}); print({text})", tmp_path).stdout
    arguments = {"resnet20": ["operator", "num_classes"], "checkpoint": ["where", "num_classes"]}
    for argument in [*arguments.get(name, ["pretrained", "num_classes"]), "device"]:
        assert f"{argument}:" in text
    if name.startswith("digits"):
        assert "on Digits, test split, 360 images" in text and "(N, 1, 8, 8)" in text


def test_a_fetched_repository_loads(hub, tmp_path):
    load = f"torch.hub.load({FETCHED!r}, 'digits_cnn6_conv', skip_validation=True, trust_repo=True, verbose=False)"
    assert (
        "(1, 10)"
        in run(f"torch.hub.set_dir({str(hub)!r}); print(tuple({load}(torch.rand(1, 1, 8, 8)).shape))", tmp_path).stdout
    )


def test_every_entry_loads_from_another_folder_without_lightning(tmp_path):
    code = f"""{NO_LIGHTNING}
for name in {[*zoo.list_checkpoints()]!r}:
    model = torch.hub.load({str(ROOT)!r}, name, source="local")
    images = torch.rand(2, model.spec.in_chans, model.spec.input_size, model.spec.input_size)
    assert not model.training and model(images).shape == (2, 10)
    fresh = torch.hub.load({str(ROOT)!r}, name, source="local", pretrained=False, num_classes=3, device="cpu")
    assert fresh.training and fresh(images).shape == (2, 3)
for name in {sorted(ARCHITECTURES)!r}:
    model = torch.hub.load({str(ROOT)!r}, name, source="local", operator="ball_cosine", num_classes=4, in_chans=1)
    assert model.spec.architecture == name and model.spec.operator.name == "ball_cosine"
"""
    run(code, tmp_path)


def test_an_entry_gives_what_load_gives(tmp_path):
    name = "digits_cnn6_tanh_cosine"
    images = torch.rand(3, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    torch.save(images, tmp_path / "images.pt")
    code = f"torch.save(torch.hub.load({str(ROOT)!r}, {name!r}, source='local')(torch.load('images.pt')), 'logits.pt')"
    run(code, tmp_path)
    torch.testing.assert_close(torch.load(tmp_path / "logits.pt"), zoo.load(name)(images), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("foreign", ["zoo", "operators"])
@pytest.mark.parametrize("kind", ["module", "package"])
def test_a_foreign_module_of_our_name_is_named_with_the_cure(tmp_path, foreign, kind):
    path = tmp_path / (f"{foreign}.py" if kind == "module" else f"{foreign}/__init__.py")
    path.parent.mkdir(exist_ok=True)
    path.write_text("")
    load = f"torch.hub.load({str(ROOT)!r}, 'resnet20', source='local')"
    result = run(f"import sys; sys.path.insert(0, ''); import {foreign}\n{load}", tmp_path, check=False)
    assert result.returncode != 0
    message = result.stderr.strip().splitlines()[-1]
    assert f"another module named {foreign!r} was imported first, from {path}" in message
    cure = message[message.index("import sys; ") :]
    cured = f"import sys; sys.path.insert(0, ''); import {foreign}\n{cure}\nsys.path.remove('')\n{load}"
    run(cured, tmp_path)


def test_wrong_arguments_are_named(tmp_path):
    for arguments, message in (
        ("'resnet20', operator='tanh_cosin'", "Did you mean 'tanh_cosine'"),
        ("'checkpoint', where='digits_cnn6_con'", "Did you mean 'digits_cnn6_conv'"),
        ("'resnet20', bogus=1", "unknown argument of resnet20 'bogus'"),
    ):
        result = run(f"torch.hub.load({str(ROOT)!r}, {arguments}, source='local')", tmp_path, check=False)
        assert message in result.stderr.strip().splitlines()[-1]
