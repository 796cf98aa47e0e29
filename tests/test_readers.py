"""Those who read ``config.json`` as timm's, and could build a plain network of a decoupled checkpoint."""

import json
import shutil

import pytest
import timm
import torch
from transformers import AutoModel, AutoModelForImageClassification, pipeline

import zoo
from operators import DecoupledConv2d
from zoo.checkpoints.catalogue import PRETRAINED

DECOUPLED = [name for name in zoo.list_checkpoints() if not name.endswith("_conv")]
READERS = {
    "classifier": AutoModelForImageClassification.from_pretrained,
    "features": AutoModel.from_pretrained,
    "pipeline": lambda folder: pipeline("image-classification", model=folder),
}


def as_written_before(name, folder):
    """Copy a checkpoint as earlier versions wrote it, which gave the architecture's own name."""
    shutil.copytree(PRETRAINED / name, folder)
    config = json.loads((folder / "config.json").read_text())
    config["architecture"] = config["model_args"].pop("architecture")
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("reader", READERS.values(), ids=list(READERS))
@pytest.mark.parametrize("name", DECOUPLED)
def test_transformers_builds_no_plain_network_of_a_decoupled_checkpoint(tmp_path, name, reader):
    for folder in (PRETRAINED / name, as_written_before(name, tmp_path / name)):
        with pytest.raises(ValueError, match="transformers would build a plain .* is decoupled: zoo.load.*loads it"):
            reader(str(folder))


def test_transformers_builds_no_network_of_timm_of_a_folder(tmp_path):
    folder = zoo.save(zoo.build("test_resnet", "sphere_cosine", num_classes=3).eval(), tmp_path / "net")
    for reader in READERS.values():
        with pytest.raises(ValueError, match="is decoupled: zoo.load"):
            reader(str(folder))


def test_transformers_loads_a_plain_network():
    name = "cifar10_resnet20_conv"
    model, images = zoo.load(name), torch.rand(2, 3, 32, 32)
    network = AutoModelForImageClassification.from_pretrained(PRETRAINED / name).eval()
    torch.testing.assert_close(network((images - model.mean) / model.std).logits, model(images))
    assert tuple(network.config.id2label.values()) == model.class_names


@pytest.mark.parametrize("name", DECOUPLED)
def test_a_folder_of_an_earlier_version_is_loaded_by_the_zoo_and_by_timm(tmp_path, name):
    model, folder = zoo.load(name), as_written_before(name, tmp_path / name)
    images = torch.rand(2, model.spec.in_chans, model.spec.input_size, model.spec.input_size)
    assert torch.equal(zoo.load(folder)(images), model(images)) and zoo.verify(folder) == []
    network = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    assert any(isinstance(layer, DecoupledConv2d) for layer in network.modules())
    torch.testing.assert_close(network((images - model.mean) / model.std), model(images))
