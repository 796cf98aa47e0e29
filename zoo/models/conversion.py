"""Converting a trained plain model."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from operators import ConversionReport, OperatorConfig, convert_decoupled
from zoo.models.image_model import ImageModel


def convert(model: ImageModel, operator: OperatorConfig | str | Mapping[str, Any]) -> ConversionReport:
    """Convert a trained plain model in place, and return the report.

    Args:
        operator: as :func:`operators.convert_decoupled` takes it: a bare name means weighting ``"linear"``, a mapping
            or an ``OperatorConfig`` what it says.

    Raises:
        ValueError: a model that is decoupled already, or an unknown operator.
    """
    if model.spec.operator is not None:
        raise ValueError(
            f"the network is {model.spec.operator_name} already, and only a plain one is converted and calibrated: "
            "start from its plain twin (..._conv), or leave out operator and calibrate"
        )
    _, report = convert_decoupled(model, operator)
    model.spec = dataclasses.replace(model.spec, operator=report.operator)
    return report
