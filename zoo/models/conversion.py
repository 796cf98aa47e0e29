"""Converting a trained plain model."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from operators import ConversionReport, OperatorConfig, convert_decoupled
from operators.selection import Filter, plain_convolutions
from zoo.models.image_model import ImageModel


def convert(
    model: ImageModel,
    operator: OperatorConfig | str | Mapping[str, Any],
    *,
    filter_fn: Filter | None = None,
    depthwise: bool = False,
    keep: Sequence[str] = (),
) -> ConversionReport:
    """Convert a trained plain model in place, and return the report. What stays plain is part of its spec.

    Args:
        operator, filter_fn, depthwise, keep: as :func:`operators.convert_decoupled` takes them: a bare name means
            weighting ``"linear"``, a mapping or an ``OperatorConfig`` what it says.

    Raises:
        ValueError, TypeError: a model that is decoupled already, or what :func:`operators.convert_decoupled` refuses.
    """
    if model.spec.operator is not None:
        raise ValueError(
            f"the network is {model.spec.operator_name} already, and only a plain one is converted and calibrated: "
            "start from its plain twin (..._conv), or leave out operator and calibrate"
        )
    _, report = convert_decoupled(model.network, operator, filter_fn=filter_fn, depthwise=depthwise, keep=keep)
    plain = plain_convolutions(model.network)
    model.spec = dataclasses.replace(model.spec, operator=report.operator, plain_layers=plain)
    return report
