"""A model zoo of decoupled networks. Importing it, and loading a model, never imports lightning."""

from zoo.checkpoints import timm_entry_points
from zoo.checkpoints.catalogue import find, list_checkpoints, list_published
from zoo.checkpoints.config import Metric
from zoo.checkpoints.loading import load, load_untrained
from zoo.checkpoints.saving import record, round_weights, save
from zoo.checkpoints.verification import accuracy, verify
from zoo.errors import CheckpointError, HubError
from zoo.explanations.explanation import Explanation, explain
from zoo.models.building import build, list_architectures
from zoo.models.image_model import ImageModel

__all__ = [
    "CheckpointError",
    "Explanation",
    "HubError",
    "ImageModel",
    "Metric",
    "accuracy",
    "build",
    "explain",
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

__version__ = "0.2.0"

timm_entry_points.register()
