"""Training the classifier alone while the backbone rests, in a way that survives a resume."""

from collections.abc import Iterable

import torch
from lightning.pytorch.strategies import SingleDeviceStrategy, Strategy
from torch import nn

from operators.batch_norms import norms_of, set_movements
from operators.selection import classifier_layers
from zoo.architectures.network import UncentredBatchNorm2d
from zoo.models.image_model import ImageModel


def backbone(model: ImageModel) -> list[nn.Parameter]:
    """Return the parameters of all but the classifier."""
    layers = classifier_layers(model)
    head = {id(parameter) for layer in layers for parameter in layer.parameters(recurse=False)}
    return [parameter for parameter in model.parameters() if id(parameter) not in head]


def freeze(model: ImageModel, frozen: bool, strategy: Strategy) -> None:
    """Let the backbone rest, or train again.

    BatchNorm's statistics rest with it. Processes that exchange gradients have agreed at the start on which these are:
    there the backbone's are computed all the same, and :func:`drop_gradients` drops them after the exchange.
    """
    model.network.train(not frozen)
    for layer in classifier_layers(model):
        layer.train()
    if isinstance(strategy, SingleDeviceStrategy):
        for parameter in backbone(model):
            parameter.requires_grad_(not frozen)


def freeze_norms(model: ImageModel) -> None:
    """Let BatchNorm normalise by its running statistics, which stay what they are, until the model is told to train."""
    # The network is trained, so reverting it does not move them back.
    set_movements(model, {})
    uncentred = (module for module in model.modules() if isinstance(module, UncentredBatchNorm2d))
    for norm in (*norms_of(model), *uncentred):
        norm.eval()


def drop_gradients(parameters: Iterable[torch.Tensor]) -> None:
    """Leave an optimiser nothing to change these by."""
    for parameter in parameters:
        parameter.grad = None
