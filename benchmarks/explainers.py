"""Explainers that are compared: the network's own linear map, and captum's. Each gives a map (N, H, W) of the images.

All work on normalised images, whose mean colour, 0, is the baseline of those that need one.
"""

from collections.abc import Callable

import torch
from captum.attr import InputXGradient, IntegratedGradients, LayerAttribution, LayerGradCam, Occlusion
from torch import Tensor, nn

import zoo
from zoo.models.image_model import ImageModel

# An explainer: images (N, C, H, W) in [0, 1] and the class of each, int64 (N,), to a map (N, H, W).
Explainer = Callable[[ImageModel, Tensor, Tensor], Tensor]
OWN = "W(x) · x"
IG_STEPS = 32
# An eighth of the side of the images that the network was trained on is moved at a time, and a quarter is covered.
WINDOWS, STRIDES = 4, 8


def own(model: ImageModel, images: Tensor, target: Tensor) -> Tensor:
    """Return the contributions of ``zoo.explain``."""
    return zoo.explain(model, images, target).contributions.sum(1)


def gradient_times_input(model: ImageModel, images: Tensor, target: Tensor) -> Tensor:
    x = _normalised(model, images).requires_grad_()
    return InputXGradient(model.network).attribute(x, target=target).sum(1)


def integrated_gradients(model: ImageModel, images: Tensor, target: Tensor) -> Tensor:
    explainer = IntegratedGradients(model.network)
    settings = {"n_steps": IG_STEPS, "internal_batch_size": len(images)}
    return explainer.attribute(_normalised(model, images), target=target, **settings).sum(1).float()


def grad_cam(model: ImageModel, images: Tensor, target: Tensor) -> Tensor:
    x = _normalised(model, images)
    maps = LayerGradCam(model.network, _last_maps(model, x[:1])).attribute(x, target=target, relu_attributions=True)
    return LayerAttribution.interpolate(maps, x.shape[-2:], "bilinear")[:, 0]


def occlusion(model: ImageModel, images: Tensor, target: Tensor) -> Tensor:
    size = model.spec.input_size
    window, stride = max(1, size // WINDOWS), max(1, size // STRIDES)
    shape, strides = (model.spec.in_chans, window, window), (model.spec.in_chans, stride, stride)
    with torch.no_grad():
        explainer = Occlusion(model.network)
        return explainer.attribute(_normalised(model, images), shape, strides, target=target).sum(1)


EXPLAINERS: dict[str, Explainer] = {
    OWN: own,
    "gradient × input": gradient_times_input,
    "integrated gradients": integrated_gradients,
    "Grad-CAM": grad_cam,
    "occlusion": occlusion,
}


def _normalised(model: ImageModel, images: Tensor) -> Tensor:
    return (images - model.mean) / model.std


def _last_maps(model: ImageModel, x: Tensor) -> nn.Module:
    """Return the last module whose answer is maps of more than one pixel, which Grad-CAM reads."""
    last: list[nn.Module] = []

    def look(module: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
        if isinstance(output, Tensor) and output.dim() == 4 and output.shape[-1] > 1:
            last.append(module)

    hooks = [module.register_forward_hook(look) for module in model.network.modules() if module is not model.network]
    try:
        with torch.no_grad():
            model.network(x)
    finally:
        for hook in hooks:
            hook.remove()
    return last[-1]
