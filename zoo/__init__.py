"""A model zoo of decoupled networks. Importing it, and loading a model, never imports lightning."""

from zoo.checkpoints import (
    CheckpointError,
    Metric,
    accuracy,
    find,
    list_checkpoints,
    load,
    load_untrained,
    record_speed,
    round_weights,
    save,
    verify,
)
from zoo.models import ImageModel, build, list_architectures

__all__ = [
    "CheckpointError",
    "ImageModel",
    "Metric",
    "accuracy",
    "build",
    "find",
    "list_architectures",
    "list_checkpoints",
    "load",
    "load_untrained",
    "record_speed",
    "round_weights",
    "save",
    "verify",
]
