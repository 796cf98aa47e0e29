"""A model zoo of decoupled networks. Importing it, and loading a model, never imports lightning."""

from zoo.checkpoints import timm_entry_points
from zoo.checkpoints.loading import (
    Metric,
    accuracy,
    find,
    list_checkpoints,
    list_published,
    load,
    load_untrained,
    record,
    round_weights,
    save,
    verify,
)
from zoo.errors import CheckpointError, HubError
from zoo.models.building import ImageModel, build, list_architectures

__all__ = [
    "CheckpointError",
    "HubError",
    "ImageModel",
    "Metric",
    "accuracy",
    "build",
    "find",
    "list_architectures",
    "list_checkpoints",
    "list_published",
    "load",
    "load_untrained",
    "record",
    "round_weights",
    "save",
    "verify",
]

timm_entry_points.register()
