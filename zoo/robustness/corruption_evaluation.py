"""Measuring checkpoints on corrupted images."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import zoo
from zoo.checkpoints.config import read_config
from zoo.corruptions.corruption import corrupted, corruption_keys, parse_corruption
from zoo.corruptions.kinds import scaled_brightness, scaled_contrast
from zoo.data.measuring import check_data
from zoo.data.module import ImageData
from zoo.models.image_model import ImageModel
from zoo.provenance import origin
from zoo.robustness.corruption_result import CLEAN, CorruptionResult, keys
from zoo.robustness.ledger import Ledger
from zoo.statistics import evenly_spaced

SCALED: Mapping[str, Callable[[Tensor, float], Tensor]] = {"contrast": scaled_contrast, "brightness": scaled_brightness}
BATCH = 250


def evaluate_corruptions(
    names: list[str | Path],
    data: ImageData,
    *,
    limit: int,
    device: str,
    work: Path,
    tell: Callable[[str, int, int], None] = lambda step, done, total: None,
) -> list[CorruptionResult]:
    """Measure checkpoints of the same images on test images that are corrupted in every way; a killed run goes on.

    Each image is corrupted once, and all networks see it.

    Args:
        names: checkpoints' names, folders or Hub repositories.
        limit: so many test images, evenly spaced over the test split.
        work: the folder of what is measured so far.
        tell: is given what is under way, how many steps are done, and how many there are.

    Raises:
        ValueError: no such checkpoint, or images that are not the network's.
    """
    places = evenly_spaced(limit, len(data.split("test")))
    images, labels = data.split("test").__getitems__(places)
    models, abouts, ledgers = [], [], []
    for name in names:
        config = read_config(zoo.find(name))
        model = zoo.load(name, device=device)
        check_data(model.spec, data)
        about = _about(config, data, len(labels), device)
        models.append(model)
        abouts.append(about)
        identity = {field: about[field] for field in ("checkpoint", "sha256", "data", "images")}
        ledgers.append(Ledger(work, f"{about['checkpoint']}_corruptions", identity))
    every = keys()
    for done, key in enumerate(every):
        tell(key, done, len(every))
        pairs = zip(models, ledgers, strict=True)
        missing = [(model, ledger) for model, ledger in pairs if (key, 0) not in ledger.rows]
        if missing:
            changed = changed_images(images, key, corruption_keys(torch.tensor(places)))
            for model, ledger in missing:
                ledger.add(key, 0, _right(model, changed, labels, device).float(), [])
    return [
        CorruptionResult(about, {key: torch.tensor(ledger.rows[key, 0]["values"]).bool() for key in every})
        for about, ledger in zip(abouts, ledgers, strict=True)
    ]


def changed_images(images: Tensor, key: str, drawn: Tensor) -> Tensor:
    """Return uint8 images as floats in [0, 1], changed in the way of a key of :func:`keys`.

    Args:
        drawn: what all that is drawn for an image follows from, int64 (N,).
    """
    if key == CLEAN:
        return images.float() / 255
    scale, _, factor = key.partition(" x ")
    if factor:
        return SCALED[scale](images.float() / 255, float(factor))
    return corrupted(images, *parse_corruption(key), drawn).float() / 255


def _right(model: ImageModel, images: Tensor, labels: Tensor, device: str) -> Tensor:
    with torch.inference_mode():
        answers = [model(batch.to(device)).argmax(1).cpu() for batch in images.split(BATCH)]
    return torch.cat(answers) == labels


def _about(config: Mapping[str, Any], data: ImageData, images: int, device: str) -> dict[str, Any]:
    training = config["training"]
    return {
        "checkpoint": config["name"],
        "sha256": config["sha256"],
        "data": data.title,
        "split": "test",
        "images": images,
        "input_size": data.input_size,
        "grey": data.in_chans == 1,
        "epochs": training.get("epochs"),
        "seed": training.get("seed"),
        **origin(torch.device(device)),
    }
