"""What a checkpoint claims, recomputed: accuracy, fingerprint and card."""

import copy
import os
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from operators.evaluation_mode import evaluating
from zoo.checkpoints.catalogue import find
from zoo.checkpoints.config import read_config
from zoo.checkpoints.loading import load
from zoo.errors import CheckpointError
from zoo.hub.card import model_card
from zoo.hub.repository import CARD, CONFIG
from zoo.models.image_model import ImageModel

# Logits of the same weights differ by rounding between machines and releases of torch; relative to the largest logit.
FINGERPRINT_TOLERANCE = 1e-4


def verify(
    where: str | os.PathLike[str], batches: Iterable[tuple[Tensor, Tensor]] | None = None, split: str = "test"
) -> list[str]:
    """Recompute what a checkpoint claims and return what does not hold; an empty list is a pass.

    Checked are the schema, the hash and shape of every weight, the fingerprint, the model card, and with ``batches`` of
    (images in [0, 1], labels) the accuracy on that split.

    Raises:
        ValueError: no such checkpoint, or no recorded accuracy to compare with.
        CheckpointError: a folder that cannot be loaded at all.
    """
    folder = find(where)
    config = read_config(folder)
    model = load(folder)
    problems = []
    if not agree(config["fingerprint"], fingerprint(model)):
        problems.append(f"{CONFIG}: the logits on the fingerprint's images are not those recorded")
    card = folder / CARD
    try:
        told = model_card(config)
    # A speed may have other fields, for one.
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{folder / CONFIG}: no card can be made of it ({error!r})") from error
    if not card.is_file() or card.read_text(encoding="utf-8", errors="replace") != told:
        problems.append(f"{CARD}: not the card that {CONFIG} gives; python -m zoo cards {where} writes it")
    if batches is not None:
        problems += _verify_accuracy(model, config, batches, split)
    return problems


def accuracy(model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]]) -> tuple[float, int]:
    """Return the fraction of images whose largest logit is the label's in evaluation mode, and the images' number.

    Raises:
        ValueError: no image.
    """
    correct, total = class_counts(model, batches)
    return int(correct.sum()) / int(total.sum()), int(total.sum())


def class_counts(model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Return how many images of each class have their largest logit there, and how many there are, int64 (classes,).

    Raises:
        ValueError: no image, a label beyond the classes, or answers that are not finite.
    """
    device = next(model.parameters()).device
    counts = torch.zeros(2, 1, dtype=torch.int64)
    with evaluating(model), torch.inference_mode():
        for images, labels in batches:
            logits, labels = model(images.to(device)).cpu(), labels.cpu()
            classes = logits.shape[1]
            if len(labels) and not 0 <= labels.min() <= labels.max() < classes:
                raise ValueError(f"labels are from 0 to {classes - 1}, got {labels.min()} to {labels.max()}")
            if not logits.isfinite().all():
                raise ValueError("the network's answers are not finite (NaN or infinite), so they are not measured")
            right = labels[logits.argmax(1) == labels]
            counts = counts + torch.stack([torch.bincount(found, minlength=classes) for found in (right, labels)])
    correct, total = counts
    if not total.sum():
        raise ValueError("accuracy needs at least one image")
    return correct, total


def fingerprint(model: ImageModel) -> list[list[float]]:
    """Return the logits on two generated images, in evaluation mode on the CPU in float32.

    Pixel i of image m is ``½ + ½ sin(0.37 (m + 1) i)``, counted through channels, rows and columns.
    """
    spec = model.spec
    count = spec.in_chans * spec.input_size**2
    phases = torch.arange(count, dtype=torch.float64) * torch.tensor([[0.37], [0.74]], dtype=torch.float64)
    images = (0.5 + 0.5 * phases.sin()).float().view(2, spec.in_chans, spec.input_size, spec.input_size)
    with torch.inference_mode():
        logits = copy.deepcopy(model).cpu().float().eval()(images)
    return [[round(value, 6) for value in row] for row in logits.tolist()]


def agree(claimed: list[list[float]], measured: list[list[float]]) -> bool:
    """Say whether the logits of two fingerprints are the same but for rounding."""
    first, second = (torch.tensor(logits, dtype=torch.float64) for logits in (claimed, measured))
    return first.shape == second.shape and bool(
        ((first - second).abs() <= FINGERPRINT_TOLERANCE * second.abs().max()).all()
    )


def _verify_accuracy(
    model: ImageModel, config: dict[str, Any], batches: Iterable[tuple[Tensor, Tensor]], split: str
) -> list[str]:
    claims = [metric for metric in config["metrics"] if metric["name"] == "accuracy" and metric["split"] == split]
    if not claims:
        raise ValueError(f"{config['name']} records no accuracy on the split {split!r}")
    measured, images = accuracy(model, batches)
    # One image more or less may turn by rounding on another machine.
    if images != claims[0]["images"] or abs(measured - claims[0]["value"]) * images > 1.5:
        return [
            f"accuracy on {images} {split} images is {measured:.4f}, "
            f"{CONFIG} says {claims[0]['value']:.4f} on {claims[0]['images']}"
        ]
    return []
