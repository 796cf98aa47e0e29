"""timm's own convolutions against their definition, and networks that cover every kind of them."""

import copy

import numpy as np
import pytest
import timm
import torch
from timm.layers import Conv2dSame, ScaledStdConv2d, ScaledStdConv2dSame, StdConv2d, StdConv2dSame
from torch import nn

from benchmarks.timm_sweep import CHECKS, Case
from operators import DecoupledConv2d, OperatorConfig, convert_decoupled, fold, revert
from operators.timm_conv import COUNTERPARTS
from tests.reference import reference_conv

# Among them every kind of convolution and of padding, squeeze-excite and other gates, grouped, depthwise and dilated
# convolutions, patch embeddings, two heads, and networks without BatchNorm.
ARCHITECTURES = {
    "test_byobnet": {"Conv2d"},
    "test_convnext": {"Conv2d"},
    "test_efficientnet": {"Conv2d"},
    "test_mambaout": {"Conv2d"},
    "test_maxvit": {"Conv2d"},
    "test_nfnet": {"ScaledStdConv2d"},
    "test_resnet": {"Conv2d"},
    "test_vit": {"Conv2d"},
    "dla46_c": {"Conv2d"},
    "ghostnetv2_100": {"Conv2d"},
    "mobilenetv3_small_050": {"Conv2d"},
    "regnety_002": {"Conv2d"},
    "repvit_m0_9": {"Conv2d"},
    "skresnet18": {"Conv2d"},
    "tf_mixnet_s": {"Conv2d", "Conv2dSame"},
    "tf_mobilenetv3_small_minimal_100": {"Conv2d", "Conv2dSame"},
    "vit_tiny_r_s16_p8_224": {"Conv2d", "StdConv2dSame"},
}

# The oldest timm that we support lacks one of them.
ARCHITECTURES = {name: kinds for name, kinds in ARCHITECTURES.items() if timm.is_model(name)}

KINDS = [Conv2dSame, StdConv2d, StdConv2dSame, ScaledStdConv2d, ScaledStdConv2dSame]


def layer_of(kind: type[nn.Conv2d], **settings) -> nn.Conv2d:
    torch.manual_seed(0)
    same = {"padding": "same"} if kind.__name__.endswith("Same") else {}
    layer = kind(4, 6, **{"kernel_size": 3, "stride": 2, "groups": 2, "bias": True, **same, **settings})
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return layer


def defined_weight(layer: nn.Conv2d) -> np.ndarray:
    """Return the filters of one of timm's layers, in float64."""
    weight = layer.weight.detach().double().numpy()
    if not isinstance(layer, StdConv2d | StdConv2dSame | ScaledStdConv2d | ScaledStdConv2dSame):
        return weight
    axes = {"axis": (1, 2, 3), "keepdims": True}
    weight = (weight - weight.mean(**axes)) / np.sqrt(weight.var(**axes) + layer.eps)
    if isinstance(layer, ScaledStdConv2d | ScaledStdConv2dSame):
        weight = weight * layer.gain.detach().double().numpy() * weight[0].size ** -0.5
    return weight


def padded(images: np.ndarray, layer: nn.Conv2d) -> np.ndarray:
    """Pad as TensorFlow does: the output has ⌈size / stride⌉ rows and columns, an odd one comes last."""
    if not type(layer).__name__.endswith("Same"):
        return np.pad(images, [(0, 0), (0, 0), *[(p, p) for p in layer.padding]])
    margins = [(0, 0), (0, 0)]
    for size, kernel, stride, dilation in zip(
        images.shape[2:], layer.kernel_size, layer.stride, layer.dilation, strict=True
    ):
        outputs = -(-size // stride)
        total = max((outputs - 1) * stride + (kernel - 1) * dilation + 1 - size, 0)
        margins.append((total // 2, total - total // 2))
    return np.pad(images, margins)


@pytest.mark.parametrize(
    "settings",
    [{}, {"kernel_size": 4}, {"kernel_size": (3, 5), "stride": (1, 2)}, {"dilation": 2, "groups": 1}, {"stride": 1}],
    ids=str,
)
@pytest.mark.parametrize("kind", KINDS)
def test_a_layer_of_timm_answers_as_defined(kind, settings):
    layer = layer_of(kind, **settings)
    images = torch.randn(2, 4, 11, 14)
    x, weight = padded(images.double().numpy(), layer), defined_weight(layer)
    geometry = {"stride": layer.stride, "dilation": layer.dilation, "groups": layer.groups}
    bias = layer.bias.detach().double().numpy()
    before = layer(images)
    operator = OperatorConfig("tanh", "linear", weighting="linear", radius=2.0)
    convert_decoupled(layer, operator)
    expected = reference_conv(
        x, weight, bias, magnitude="tanh", angular="linear", weighting="linear", radius=2.0, **geometry
    )
    np.testing.assert_allclose(layer(images).detach().numpy(), expected, rtol=1e-4, atol=1e-5)
    layer.set_operator(OperatorConfig("linear", "cosine", weighting="linear"))
    torch.testing.assert_close(layer(images), before, rtol=1e-5, atol=1e-5)
    assert torch.equal(revert(layer)(images), before) and type(layer) is kind


@pytest.mark.parametrize("operator", ["tanh_cosine", "linear_cosine", "ball_sigmoid"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_layer_of_timm_is_folded(kind, operator):
    layer, norm = layer_of(kind), nn.BatchNorm2d(6)
    norm(torch.randn(8, 6, 5, 5))
    model, _ = convert_decoupled(nn.Sequential(layer, norm).eval(), operator)
    images = torch.randn(2, 4, 11, 14)
    folded, report = fold(model, images)
    assert report.layers[0].norm == "1" and [name for name, _ in folded.named_parameters()] == ["0.weight", "0.bias"]
    torch.testing.assert_close(folded(images), model(images), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_of_a_layer_of_timm_are_those_of_double_precision(kind):
    layer = layer_of(kind)
    convert_decoupled(layer, "tanh_cosine")
    exact = copy.deepcopy(layer).double()
    images = torch.randn(2, 4, 11, 14)
    layer(images).square().sum().backward()
    exact(images.double()).square().sum().backward()
    for single, double in zip(layer.parameters(), exact.parameters(), strict=True):
        torch.testing.assert_close(single.grad.double(), double.grad, rtol=1e-3, atol=1e-3)


def test_every_counterpart_names_a_class_of_this_timm_or_torch():
    kinds = [layer_of(kind) for kind in KINDS] + [nn.Conv2d(4, 4, 1)]
    converted = {type(convert_decoupled(layer, "tanh_cosine")[0]) for layer in kinds}
    assert converted == set(COUNTERPARTS.values()) and DecoupledConv2d in converted


@pytest.fixture(scope="module", params=ARCHITECTURES)
def case(request) -> Case:
    return Case.create(request.param)


def test_the_kinds_of_convolution_are_those_expected(case):
    _, report = case.converted("tanh_cosine")
    assert {layer.kind for layer in report.converted} == ARCHITECTURES[case.architecture]


@pytest.mark.parametrize("check", CHECKS.values(), ids=list(CHECKS))
def test_a_timm_network(case, check):
    check(case)
