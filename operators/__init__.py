"""Decoupled convolutions ``h(‖w‖, ‖x‖) · g(θ)`` and the converter that puts them into a network. Needs only torch."""

from operators.angular import ANGULARS
from operators.calibration import CalibrationReport, calibrate
from operators.conv import DecoupledConv2d, OperatorConfig, decoupled_layers
from operators.convert import ConversionReport, convert_decoupled, revert
from operators.diagnosis import DiagnosisReport, diagnose
from operators.distillation import Distillation, DistillationReport, distil
from operators.fold import FoldReport, fold
from operators.functional import decoupled_conv2d, filter_norm, patch_norm
from operators.gradient_parts import gradient_parts
from operators.magnitude import MAGNITUDES, RADIUS_MODES, WEIGHTINGS

__all__ = [
    "ANGULARS",
    "MAGNITUDES",
    "RADIUS_MODES",
    "WEIGHTINGS",
    "CalibrationReport",
    "ConversionReport",
    "DecoupledConv2d",
    "DiagnosisReport",
    "Distillation",
    "DistillationReport",
    "FoldReport",
    "OperatorConfig",
    "calibrate",
    "convert_decoupled",
    "decoupled_conv2d",
    "decoupled_layers",
    "diagnose",
    "distil",
    "filter_norm",
    "fold",
    "gradient_parts",
    "patch_norm",
    "revert",
]
