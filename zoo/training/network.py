"""The network that a training begins with: built afresh, or made of a trained one."""

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch.utilities import rank_zero_info

from zoo.checkpoints.starting_points import licence_of, start_from
from zoo.data.module import ImageData
from zoo.models.building import build
from zoo.models.conversion import convert
from zoo.models.image_model import ImageModel
from zoo.models.spec import PLAIN, ModelSpec, composed
from zoo.randomness import run_seed
from zoo.training.recovery import (
    CALIBRATION_IMAGES,
    DISTILLATION_IMAGES,
    calibrated,
    check_quantile,
    distilled,
    refuse_other_teacher,
)

# A distillation under way, beside the checkpoints of its run.
DISTILLATION = "distillation.ckpt"


def check_network_settings(settings: Mapping[str, Any]) -> None:
    """Refuse settings of ``Classifier`` that describe no network.

    Raises:
        ValueError: a number outside its range, or settings that exclude each other.
    """
    quantile, source, plain = settings["calibrate"], settings["init_from"], settings["operator"] in (None, PLAIN)
    check_quantile(quantile)
    if settings["distil"] < 0:
        raise ValueError(f"distil is a number of epochs, at least 0, got {settings['distil']}")
    if settings["teacher"] and not settings["distil"]:
        raise ValueError(f"teacher {settings['teacher']} is whom a network learns from, which needs distil, its epochs")
    if settings["distil"] and (not source or plain):
        given = f"init_from {source} and operator {settings['operator']}"
        raise ValueError(
            "distil lets a network that is just converted learn from the one it was made of: it needs init_from, a "
            f"plain network, and operator, got {given}"
        )
    if settings["operator"] == PLAIN and (settings["depthwise"] or settings["keep"]):
        raise ValueError("depthwise and keep say which convolutions stay plain, and with operator conv all do")
    if quantile not in (None, "auto") and (not source or plain):
        given = f"init_from {source} and operator {settings['operator']}"
        raise ValueError(
            "calibrate fits a trained plain network that is just converted: it needs init_from, a plain network, "
            f"and operator, got {given}; of a network that is decoupled already, leave out calibrate"
        )
    if source and (ignored := [name for name in ("architecture", "architecture_args") if settings[name]]):
        raise ValueError(
            f"init_from {source} has an architecture already; leave out {' and '.join(ignored)}, or leave out "
            "init_from to train a new network (--model.init_from null, where a recipe has it)"
        )
    if settings["adversarial"] and settings["mixup"]:
        raise ValueError("mixed images have no class to be attacked; leave out mixup or adversarial")


def first_network(
    settings: Mapping[str, Any], data: ImageData, stage: str, folder: Path | None = None
) -> tuple[ImageModel, dict[str, str] | None]:
    """Return the network for the images, and the name and licence of the weights that a training starts from, if any.

    Args:
        folder: of the run, where a distillation is saved while it goes on.
        stage: "fit", or "validate", "test" or "predict", which take a trained network as it is.

    Raises:
        ValueError: no such network, or settings that do not go with it.
    """
    if not (source := settings["init_from"]):
        return _fresh(settings, data), None
    if stage == "fit":
        return _adapted(settings, data, folder), {"name": source, "licence": licence_of(source)}
    if begins := [name for name in ("operator", "calibrate", "distil", "depthwise", "keep") if settings[name]]:
        raise ValueError(
            f"{stage} measures a network as it is, but these say how training begins: {', '.join(begins)}; leave them "
            "out, or make the converted network first (python -m zoo convert)"
        )
    return start_from(source), None


def described(spec: ModelSpec) -> str:
    """Return a network in words: its architecture, its operator and how many classes it has."""
    settings = f" {dict(spec.model_args)}" if spec.model_args else ""
    return f"{spec.architecture}{settings} with {spec.operator or PLAIN} and {len(spec.class_names)} classes"


def _fresh(settings: Mapping[str, Any], data: ImageData) -> ImageModel:
    return build(
        settings["architecture"] or "cnn6",
        settings["operator"] or "tanh_cosine",
        class_names=data.class_names,
        in_chans=data.in_chans,
        input_size=data.input_size,
        mean=data.mean,
        std=data.std,
        depthwise=settings["depthwise"],
        keep=settings["keep"] or (),
        **(settings["architecture_args"] or {}),
    )


def _teacher(settings: Mapping[str, Any], model: ImageModel) -> ImageModel | None:
    """Return the trained network that a plain model, once it is converted, learns from; None if it does not."""
    if not settings["distil"]:
        return None
    if not settings["teacher"]:
        return copy.deepcopy(model)
    teacher = start_from(settings["teacher"], input_size=model.spec.input_size)
    refuse_other_teacher(model, teacher)
    return teacher


def _adapted(settings: Mapping[str, Any], data: ImageData, folder: Path | None) -> ImageModel:
    """Return a trained network, converted and recovered as is asked for, with the classes of the images."""
    source, operator = settings["init_from"], settings["operator"]
    model = start_from(source, in_chans=data.in_chans, input_size=data.input_size)
    if operator not in (None, PLAIN):
        teacher = _teacher(settings, model)
        report = convert(model, operator, depthwise=settings["depthwise"], keep=settings["keep"] or ())
        rank_zero_info(report.summary())
        if settings["calibrate"] is not None:
            found = calibrated(model, data.sample(CALIBRATION_IMAGES), settings["calibrate"])
            rank_zero_info(found.summary())
        if teacher is not None:
            images = data.sample(DISTILLATION_IMAGES)
            work = folder / DISTILLATION if folder else None
            found = distilled(model, teacher, images, settings["distil"], seed=max(run_seed(), 0), work=work)
            rank_zero_info(str(found))
    elif operator == PLAIN and model.spec.operator is not None:
        raise ValueError(f"{source} is {model.spec.operator_name}; to train a plain network, start from its twin")
    if model.class_names != tuple(map(composed, data.class_names)):
        model.reset_classifier(data.class_names)
    return model.train()
