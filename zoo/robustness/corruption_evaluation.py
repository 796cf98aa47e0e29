"""Measuring checkpoints on corrupted images."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import zoo
from zoo.arithmetic import exact_arithmetic
from zoo.checkpoints.config import read_config
from zoo.corruptions.corruption import corruption_keys
from zoo.corruptions.ways import WAYS
from zoo.corruptions.weather import require_photographs
from zoo.data.measuring import check_data
from zoo.data.module import ImageData
from zoo.models.image_model import ImageModel
from zoo.provenance import origin
from zoo.robustness.corruption_result import CorruptionResult
from zoo.robustness.ledger import Ledger, content_of
from zoo.statistics import evenly_spaced

BATCH = 250
# Changes whenever what is measured does, so that numbers of before are measured again.
PROTOCOL = 1


def evaluate_corruptions(
    names: Sequence[str | Path],
    data: ImageData,
    *,
    limit: int,
    device: str,
    work: Path,
    tell: Callable[[str, int, int], None] = lambda step, done, total: None,
) -> list[CorruptionResult]:
    """Measure checkpoints of the same images on test images that are changed in every way; a killed run goes on.

    Each image is changed once, and all networks see it, in evaluation mode and float32.

    Args:
        names: checkpoints' names, folders or Hub repositories.
        limit: so many test images, evenly spaced over the test split.
        work: the folder of what is measured so far.
        tell: is given what is under way, how many steps are done, and how many there are.

    Raises:
        ValueError: no such checkpoint, images that are not the network's, or two checkpoints of one name.
        ImportError: the photographs of frost are missing, see the extra ``corruptions``.
    """
    require_photographs()
    places = evenly_spaced(limit, len(data.split("test")))
    images, labels = data.split("test").__getitems__(places)
    networks: list[tuple[ImageModel, dict[str, Any], Ledger]] = []
    for name in names:
        config = read_config(zoo.find(name))
        model = zoo.load(name, device=device)
        try:
            check_data(model.spec, data)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
        about = _about(config, model, data, images, labels) | origin(torch.device(device))
        if any(about["checkpoint"] == other["checkpoint"] for _, other, _ in networks):
            raise ValueError(f"two checkpoints are called {about['checkpoint']}; measure each into a folder of its own")
        identity = {field: about[field] for field in ("sha256", "content")} | {"device": device, "protocol": PROTOCOL}
        networks.append((model, about, Ledger(work, f"{about['checkpoint']}_corruptions", identity)))
    keys = corruption_keys(torch.tensor(places))
    with exact_arithmetic(device):
        for done, (key, way) in enumerate(WAYS.items()):
            tell(key, done, len(WAYS))
            missing = [(model, ledger) for model, _, ledger in networks if (key, 0) not in ledger.rows]
            changed = way(images, keys) if missing else None
            for model, ledger in missing:
                ledger.add(key, 0, _right(model, changed, labels, device).float(), [])
    return [
        CorruptionResult(about, {key: torch.tensor(ledger.rows[key, 0]["values"]).bool() for key in WAYS})
        for _, about, ledger in networks
    ]


def _right(model: ImageModel, images: Tensor, labels: Tensor, device: str) -> Tensor:
    """Return which images (N, C, H, W) a network names right, bool (N,)."""
    with torch.inference_mode():
        answers = [model(batch.to(device)).argmax(1).cpu() for batch in images.split(BATCH)]
    return torch.cat(answers) == labels


def _about(
    config: Mapping[str, Any], model: ImageModel, data: ImageData, images: Tensor, labels: Tensor
) -> dict[str, Any]:
    training = config["training"]
    return {
        "checkpoint": config["name"],
        "sha256": config["sha256"],
        "operator": model.spec.operator_name,
        "data": data.title,
        "split": "test",
        "content": content_of(images, labels),
        "images": len(labels),
        "epochs": training.get("epochs"),
        "seed": training.get("seed"),
    }
