"""The network that a training begins with: built afresh, or made of a trained one."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning as L
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
    teacher_of,
)


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
    for name, given, what in (
        ("distil", settings["distil"], "lets a network that is just converted learn from the one it was made of"),
        ("calibrate", quantile not in (None, "auto"), "fits a trained plain network that is just converted"),
    ):
        if given and (not source or plain):
            raise ValueError(
                f"{name} {what}: it needs init_from, a plain network, and operator, got init_from {source} and "
                f"operator {settings['operator']}; of a network that is decoupled already, leave out {name}"
            )
    if (settings["depthwise"] or settings["keep"]) and (settings["operator"] == PLAIN or (source and plain)):
        raise ValueError(
            "depthwise and keep say which convolutions stay plain when a network is built or converted; without "
            "operator, or with operator conv, leave them out"
        )
    if source and (ignored := [name for name in ("architecture", "architecture_args") if settings[name]]):
        raise ValueError(
            f"init_from {source} has an architecture already; leave out {' and '.join(ignored)}, or leave out "
            "init_from to train a new network (--model.init_from null, where a recipe has it)"
        )
    if settings["adversarial"] and settings["mixup"]:
        raise ValueError("mixed images have no class to be attacked; leave out mixup or adversarial")


@dataclasses.dataclass(frozen=True)
class Beginning:
    """What a training, or a measurement, begins with.

    Attributes:
        model: the network.
        teacher: the trained network that it learns from before training, None if it does not.
        source: the name and licence of the weights that a training starts from, None if it starts from none.
    """

    model: ImageModel
    teacher: ImageModel | None = None
    source: dict[str, str] | None = None


def first_networks(settings: Mapping[str, Any], data: ImageData, stage: str) -> Beginning:
    """Build the network for the images, or fetch the one that training starts from, as it is, and its teacher.

    Args:
        stage: "fit", or "validate", "test" or "predict", which take a trained network as it is.

    Raises:
        ValueError: no such network, or settings that do not go with it.
    """
    if not (source := settings["init_from"]):
        return Beginning(_fresh(settings, data))
    if stage == "fit":
        model = start_from(source, in_chans=data.in_chans, input_size=data.input_size)
        teacher = teacher_of(model, settings["teacher"]) if settings["distil"] else None
        return Beginning(model, teacher, {"name": source, "licence": licence_of(source)})
    begins = [name for name in ("operator", "calibrate", "distil", "depthwise", "keep") if settings[name]]
    if begins := [name for name in begins if settings[name] != "auto"]:
        raise ValueError(
            f"{stage} measures a network as it is, but these say how training begins: {', '.join(begins)}; leave them "
            "out, or make the converted network first (python -m zoo convert)"
        )
    return Beginning(start_from(source))


def distillation_of(trainer: L.Trainer) -> Path | None:
    """Return the file, beside the checkpoints of a run, in which its distillation is saved while it goes on."""
    folder = getattr(trainer.checkpoint_callback, "dirpath", None)
    return Path(folder) / "distillation.ckpt" if folder else None


def adapted(beginning: Beginning, settings: Mapping[str, Any], data: ImageData, trainer: L.Trainer) -> ImageModel:
    """Convert and recover the network that training starts from, as is asked for, and give it the images' classes.

    Each process does so by itself, and one of them saves how far a distillation has come.

    Raises:
        ValueError: settings that do not go with the network.
    """
    model, operator = beginning.model, settings["operator"]
    if operator not in (None, PLAIN):
        report = convert(model, operator, depthwise=settings["depthwise"], keep=settings["keep"] or ())
        rank_zero_info(report.summary())
        if settings["calibrate"] is not None:
            calibration = calibrated(model, data.sample(CALIBRATION_IMAGES), settings["calibrate"])
            rank_zero_info(calibration.summary())
        if beginning.teacher is not None:
            distillation = distilled(
                model,
                beginning.teacher,
                data.sample(DISTILLATION_IMAGES),
                settings["distil"],
                seed=max(run_seed(), 0),
                device=trainer.strategy.root_device,
                work=distillation_of(trainer),
                saves=trainer.is_global_zero,
            )
            rank_zero_info(str(distillation))
    elif operator == PLAIN and model.spec.operator is not None:
        source = settings["init_from"]
        raise ValueError(f"{source} is {model.spec.operator_name}; to train a plain network, start from its twin")
    if model.class_names != tuple(map(composed, data.class_names)):
        model.reset_classifier(data.class_names)
    return model.train()


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
