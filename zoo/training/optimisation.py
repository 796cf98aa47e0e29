"""The optimiser, its schedule and the penalty on filters."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from operators import DecoupledConv2d, decoupled_layers, filter_norm
from zoo.models.image_model import ImageModel
from zoo.training.freezing import backbone

# Settings that stay what they are while a run goes on, since the optimiser goes on with the state that it had.
LASTING = (
    "optimizer",
    "learning_rate",
    "backbone_learning_rate",
    "freeze_epochs",
    "weight_decay",
    "decay_decoupled_filters",
)
# The values that settings had in effect before they existed: earlier versions' runs do not record them.
UNUSED = {"freeze_epochs": 0}


def check_optimiser_settings(settings: Mapping[str, Any]) -> None:
    """Refuse settings of ``Classifier`` with which nothing can be trained.

    Raises:
        ValueError: a number outside its range.
    """
    for name in ("warmup", "label_smoothing"):
        if not 0 <= settings[name] < 1:
            raise ValueError(f"{name} is a share in [0, 1), got {settings[name]}")
    for name in ("weight_decay", "orthogonality", "freeze_epochs", "mixup"):
        if not settings[name] >= 0:
            raise ValueError(f"{name} must not be negative, got {settings[name]}")
    for name in ("learning_rate", "backbone_learning_rate"):
        if settings[name] is not None and not settings[name] > 0:
            raise ValueError(f"{name} must be more than 0, got {settings[name]}")
    for name in ("learning_rate", "backbone_learning_rate", "weight_decay", "orthogonality", "mixup"):
        if settings[name] == math.inf:
            raise ValueError(f"{name} must be finite, got inf")
    if (ema := settings["ema"]) is not None and not 0 < ema < 1:
        raise ValueError(f"ema is the share that the average keeps in a step, in (0, 1), got {ema}")


def refuse_changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Refuse to go on with settings of the optimiser that would have no effect.

    Raises:
        ValueError: they are not those that the run was begun with.
    """
    if changed := [name for name in LASTING if before.get(name, UNUSED.get(name)) != now[name]]:
        raise ValueError(
            f"{', '.join(changed)} cannot change when a run goes on (--ckpt_path); to start from its weights, "
            "export it (python -m zoo export) and train with --model.init_from"
        )


def with_schedule(model: ImageModel, settings: Mapping[str, Any], steps: float) -> dict[str, Any]:
    """Return the optimiser of a training of so many steps, and its schedule, as Lightning wants them.

    Raises:
        ValueError: a schedule that needs an end, and training has none.
    """
    if not math.isfinite(steps) and (settings["schedule"] != "constant" or settings["warmup"]):
        raise ValueError(
            "training without an end (max_epochs, max_steps) needs --model.schedule constant --model.warmup 0"
        )
    groups, rate = parameter_groups(model, settings), settings["learning_rate"]
    if settings["optimizer"] == "sgd":
        optimizer = torch.optim.SGD(groups, lr=rate, momentum=0.9, nesterov=True)
    else:
        optimizer = torch.optim.AdamW(groups, lr=rate)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: learning_rate_factor(step / steps, settings["schedule"], settings["warmup"])
    )
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def parameter_groups(model: ImageModel, settings: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the parameters by learning rate and weight decay, the highest rate first."""
    decayed = {
        id(module.weight)
        for module in model.modules()
        if isinstance(module, nn.Conv2d | nn.Linear)
        and (settings["decay_decoupled_filters"] or not isinstance(module, DecoupledConv2d))
    }
    backbone_rate = settings["backbone_learning_rate"] or settings["learning_rate"]
    in_backbone = {id(parameter) for parameter in backbone(model)}
    parameters: dict[tuple[float, float], list[nn.Parameter]] = {}
    for parameter in model.parameters():
        rate = backbone_rate if id(parameter) in in_backbone else settings["learning_rate"]
        decay = settings["weight_decay"] if id(parameter) in decayed else 0.0
        parameters.setdefault((rate, decay), []).append(parameter)
    return [
        {"params": members, "lr": rate, "weight_decay": decay}
        for (rate, decay), members in sorted(parameters.items(), key=lambda item: item[0], reverse=True)
    ]


def learning_rate_factor(progress: float, schedule: str, warmup: float) -> float:
    """Return the learning rate as a share of the highest, after ``progress`` (0 to 1) of training."""
    if progress < warmup:
        return progress / warmup
    if schedule == "cosine":
        return 0.5 * (1 + math.cos(math.pi * min(1.0, (progress - warmup) / (1 - warmup))))
    if schedule == "step":
        return 1.0 if progress < 0.5 else 0.1 if progress < 0.75 else 0.01
    return 1.0


def orthogonality_penalty(model: nn.Module) -> Tensor:
    """Return the sum over decoupled layers of ``½ ‖ŴᵀŴ - I‖²``, Ŵ's columns being the layer's normalised filters."""
    total = torch.zeros((), device=next(model.parameters()).device)
    for layer in decoupled_layers(model).values():
        weight = layer.effective_weight()
        filters = (weight / filter_norm(weight, eps=layer.operator.eps)).flatten(1)
        gram = filters @ filters.T
        total = total + 0.5 * (gram - torch.eye(len(gram), device=gram.device)).square().sum()
    return total
