"""The network that a training begins with: built afresh, or made of a trained one."""

from collections.abc import Mapping
from typing import Any

from lightning.pytorch.utilities import rank_zero_info

from operators import calibrate
from zoo.checkpoints.starting_points import licence_of, start_from
from zoo.data.module import ImageData
from zoo.models.building import build
from zoo.models.conversion import convert
from zoo.models.image_model import ImageModel
from zoo.models.spec import PLAIN, ModelSpec, composed

# Training images to whose norms a converted network is fitted.
CALIBRATION_IMAGES = 256


def check_network_settings(settings: Mapping[str, Any]) -> None:
    """Refuse settings of ``Classifier`` that describe no network.

    Raises:
        ValueError: a number outside its range, or settings that exclude each other.
    """
    quantile, source = settings["calibrate"], settings["init_from"]
    if quantile is not None and not 0 < quantile <= 1:
        raise ValueError(f"calibrate is a quantile in (0, 1], got {quantile}")
    if quantile is not None and (not source or settings["operator"] in (None, PLAIN)):
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


def first_network(settings: Mapping[str, Any], data: ImageData, stage: str) -> tuple[ImageModel, dict[str, str] | None]:
    """Return the network for the images, and the name and licence of the weights that a training starts from, if any.

    Args:
        stage: "fit", or "validate", "test" or "predict", which take a trained network as it is.

    Raises:
        ValueError: no such network, or settings that do not go with it.
    """
    if not (source := settings["init_from"]):
        return _fresh(settings, data), None
    if stage == "fit":
        return _adapted(settings, data), {"name": source, "licence": licence_of(source)}
    if settings["operator"] or settings["calibrate"] is not None:
        raise ValueError(
            f"{stage} measures a network as it is, but operator and calibrate say how training begins; leave them out, "
            "or make the converted network first (python -m zoo convert)"
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
        **(settings["architecture_args"] or {}),
    )


def _adapted(settings: Mapping[str, Any], data: ImageData) -> ImageModel:
    """Return a trained network, converted and calibrated if that is asked for, with the classes of the images."""
    source, operator = settings["init_from"], settings["operator"]
    model = start_from(source, in_chans=data.in_chans, input_size=data.input_size)
    if operator not in (None, PLAIN):
        report = convert(model, operator)
        done, left = len(report.converted), len(report.skipped)
        rank_zero_info(f"{report.operator}: {done} convolutions converted, {left} left as they are")
        if settings["calibrate"] is not None:
            _, calibration = calibrate(model, [data.sample(CALIBRATION_IMAGES)], settings["calibrate"])
            rank_zero_info(str(calibration))
    elif operator == PLAIN and model.spec.operator is not None:
        raise ValueError(f"{source} is {model.spec.operator_name}; to train a plain network, start from its twin")
    if model.class_names != tuple(map(composed, data.class_names)):
        model.reset_classifier(data.class_names)
    return model.train()
