"""Values of the decoupled convolution against the literal float64 definition in ``reference.py``."""

import numpy as np
import pytest
import torch
from reference import reference_conv, reference_norm

from operators import ANGULARS, MAGNITUDES, WEIGHTINGS, DecoupledConv2d, OperatorConfig, decoupled_conv2d, patch_norm

# Float64 rounding: outputs are below 100, and asin multiplies the rounding of the cosine by at most 707.
EXACT = {"rtol": 1e-11, "atol": 1e-12}
# Float32 rounding of sums of at most 36 products; the slope of asin near ±1 is not met at random points.
SINGLE = {"rtol": 2e-5, "atol": 5e-6}

OPERATORS = [f"{magnitude}_{angular}" for magnitude in MAGNITUDES for angular in ANGULARS]
# One that is computed as a scaled inner product, one by its angle; both with a radius on both sides of which norms lie.
TWO_OPERATORS = [
    OperatorConfig("tanh", "cosine", "linear", radius=2.0),
    OperatorConfig("ball", "linear", "tanh", radius=2.0),
]

GEOMETRIES = {
    "plain": {},
    "stride": {"stride": 2},
    "stride_pair": {"stride": (2, 3)},
    "padding": {"padding": 2},
    "padding_pair": {"padding": (2, 1)},
    "same": {"padding": "same"},
    "valid": {"padding": "valid"},
    "same_even_kernel": {"kernel_size": 2, "padding": "same"},
    "same_dilated": {"kernel_size": (2, 4), "padding": "same", "dilation": (3, 1)},
    "dilation": {"dilation": 2},
    "dilation_pair": {"dilation": (1, 3)},
    "all_at_once": {"kernel_size": (3, 2), "stride": (1, 2), "padding": (2, 1), "dilation": (2, 1), "groups": 2},
    "groups": {"groups": 2, "padding": 1},
    "depthwise": {"groups": 4, "out_channels": 4, "padding": 1},
    "depthwise_multiplier": {"groups": 4, "out_channels": 8},
    "kernel_1x1": {"kernel_size": 1},
    "kernel_5x3": {"kernel_size": (5, 3), "padding": (2, 1)},
    "kernel_2x2": {"kernel_size": 2},
    "kernel_1x7": {"kernel_size": (1, 7), "padding": (0, 3)},
    "kernel_is_image": {"kernel_size": (7, 8)},
    "no_bias": {"bias": False},
}


def make_layer(operator, *, dtype=torch.float64, in_channels=4, out_channels=6, kernel_size=3, **arguments):
    """Return a layer whose filters have norms from 0.6 to 3, and an input with patches of very different norms."""
    torch.manual_seed(0)
    layer = DecoupledConv2d(in_channels, out_channels, kernel_size, operator=operator, dtype=dtype, **arguments)
    with torch.no_grad():
        layer.weight.copy_(torch.randn_like(layer.weight))
        lengths = torch.linspace(0.6, 3, out_channels, dtype=dtype)[:, None, None, None]
        layer.weight.mul_(lengths / layer.weight.square().sum((1, 2, 3), keepdim=True).sqrt())
        if layer.bias is not None:
            layer.bias.copy_(torch.randn_like(layer.bias))
    input = torch.randn(2, in_channels, 7, 8, dtype=dtype) * torch.logspace(-1, 0.5, 8, dtype=dtype)
    return layer, input


def truth(layer, input, **overrides):
    """Return the definition's answer for ``layer`` (with a fixed radius) as a float64 tensor."""
    settings = layer.operator.to_dict()
    for setting in ("radius_mode", "radius_relative"):
        settings.pop(setting)
    settings |= {key: getattr(layer, key) for key in ("stride", "padding", "dilation", "groups", "padding_mode")}
    bias = None if layer.bias is None else layer.bias.detach().double().numpy()
    weight = layer.weight.detach().double().numpy()
    return torch.from_numpy(reference_conv(input.double().numpy(), weight, bias, **(settings | overrides)))


def check(layer, input, **tolerance):
    with torch.no_grad():
        torch.testing.assert_close(layer(input).double(), truth(layer, input), **(tolerance or EXACT))


@pytest.mark.parametrize("weighting", WEIGHTINGS)
@pytest.mark.parametrize("angular", ANGULARS)
@pytest.mark.parametrize("magnitude", MAGNITUDES)
def test_every_operator(magnitude, angular, weighting):
    settings = {"radius": 1.7, "alpha": 1.3, "beta": 0.4, "sigmoid_k": 0.45, "power": 2.6, "eps": 1e-3}
    layer, input = make_layer(OperatorConfig(magnitude, angular, weighting, **settings), padding=1)
    check(layer, input)
    norms = reference_norm(input.numpy(), 3, padding=1, eps=1e-3)
    assert (norms < 1.7).any() and (norms > 1.7).any()


@pytest.mark.parametrize("operator", OPERATORS)
def test_every_operator_with_default_settings(operator):
    check(*make_layer(operator, padding=1))


@pytest.mark.parametrize("operator", OPERATORS)
def test_every_operator_in_float32(operator):
    check(*make_layer(operator, dtype=torch.float32, padding=1), **SINGLE)


@pytest.mark.parametrize("operator", TWO_OPERATORS, ids=lambda operator: operator.name)
@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_every_geometry(geometry, operator):
    layer, input = make_layer(operator, **GEOMETRIES[geometry])
    check(layer, input)


@pytest.mark.parametrize("operator", TWO_OPERATORS, ids=lambda operator: operator.name)
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("padding", [1, (2, 3), "same", "valid"], ids=str)
@pytest.mark.parametrize("padding_mode", ["zeros", "reflect", "replicate", "circular"])
def test_every_padding_mode(padding_mode, padding, groups, operator):
    check(*make_layer(operator, kernel_size=(4, 3), padding=padding, padding_mode=padding_mode, groups=groups))


# torch's own advice on speed; it is about the plain convolution that the truth is compared with.
@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@pytest.mark.parametrize("settings", GEOMETRIES.values(), ids=GEOMETRIES)
@pytest.mark.parametrize("padding_mode", ["zeros", "reflect", "replicate", "circular"])
def test_reference_has_the_geometry_of_torch(settings, padding_mode):
    """The definition itself, as a plain inner product, is ``nn.Conv2d``: its patches are those of torch."""
    layer, input = make_layer(OperatorConfig("linear", "cosine", "linear"), padding_mode=padding_mode, **settings)
    plain = torch.nn.Conv2d.forward(layer, input)
    torch.testing.assert_close(truth(layer, input), plain.detach(), **EXACT)


FIELDS = {
    "radius": [0.05, 1.0, 30.0],
    "alpha": [0.1, 7.0],
    "beta": [0.0, 0.2, 1.0, 3.0],
    "sigmoid_k": [0.05, 1.0, 20.0],
    "power": [1.0, 1.5, 2.0, 3.0, 6.5],
    "eps": [1e-8, 0.5],
}


@pytest.mark.parametrize(("field", "value"), [(field, value) for field in FIELDS for value in FIELDS[field]])
@pytest.mark.parametrize(("magnitude", "angular"), [("seg", "sigmoid"), ("mix", "power"), ("tanh", "cosine")])
def test_every_setting(magnitude, angular, field, value):
    check(*make_layer(OperatorConfig(magnitude, angular, "linear", **{field: value})))


@pytest.mark.parametrize("operator", OPERATORS)
def test_zero_patches_and_zero_filters_answer_the_bias(operator):
    layer, input = make_layer(operator, padding=1)
    input[:, :, :5, :5] = 0
    with torch.no_grad():
        layer.weight[2] = 0
        output = layer(input)
    bias = layer.bias.detach()[:, None, None]
    assert (output[:, :, :4, :4] == bias).all()
    assert (output[:, 2] == bias[2]).all()
    assert (output != bias)[:, [0, 1, 3, 4, 5], 5:, 5:].all()
    check(layer, input)


@pytest.mark.parametrize("length", [0.01, 1.0, 40.0])
@pytest.mark.parametrize("operator", OPERATORS)
def test_parallel_and_antiparallel_patches(operator, length):
    layer, _ = make_layer({"name": operator, "eps": 1e-10}, bias=False)
    patches = layer.weight.detach() * length
    check(layer, torch.cat([patches, -patches]), rtol=1e-9, atol=1e-11)  # at ±1 the rounding of c grows 707-fold
    output = layer(torch.cat([patches, -patches])).detach()[..., 0, 0]
    own = output[:6].diagonal()
    assert (own > 0).all()
    assert (output[:6] <= own[:, None] * (1 + 1e-9)).all()  # no filter likes a patch better than the one parallel to it
    torch.testing.assert_close(output[6:], -output[:6], **EXACT)


@pytest.mark.parametrize("operator", OPERATORS)
def test_unbatched_input(operator):
    layer, input = make_layer(operator, padding=1, padding_mode="reflect", groups=2)
    with torch.no_grad():
        torch.testing.assert_close(layer(input[1]), truth(layer, input)[1], **EXACT)


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("operator", OPERATORS)
def test_channels_last(operator, groups):
    layer, input = make_layer(operator, padding=1, groups=groups, out_channels=8)
    layer = layer.to(memory_format=torch.channels_last)
    check(layer, input.to(memory_format=torch.channels_last))


@pytest.mark.parametrize("batch", [0, 1])
def test_batches_of_none_and_one(batch):
    layer, input = make_layer("tanh_linear")
    torch.testing.assert_close(layer(input[:batch]).detach(), truth(layer, input)[:batch], **EXACT)


def test_the_function_alone_has_the_arguments_of_conv2d():
    layer, input = make_layer(TWO_OPERATORS[1], stride=(1, 2), padding=(1, 2), dilation=(2, 1), groups=2)
    parts = {"magnitude": layer.magnitude, "angular": layer.angular}
    output = decoupled_conv2d(input, layer.weight, layer.bias, (1, 2), (1, 2), (2, 1), 2, **parts)
    torch.testing.assert_close(output.detach(), truth(layer, input), **EXACT)
    output = decoupled_conv2d(
        input, layer.weight[:, :, :1, :1], groups=2, eps=0.1, padding=1, padding_mode="circular", **parts
    )
    expected = reference_conv(
        input.numpy(), layer.weight[:, :, :1, :1].detach().numpy(), groups=2, padding=1, padding_mode="circular",
        magnitude="ball", angular="linear", weighting="tanh", radius=2.0, eps=0.1,
    )  # fmt: skip
    torch.testing.assert_close(output.detach(), torch.from_numpy(expected), **EXACT)


@pytest.mark.parametrize("padding_mode", ["zeros", "reflect", "replicate", "circular"])
@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_patch_norm(geometry, padding_mode):
    _, input = make_layer("tanh_cosine")
    settings = {key: value for key, value in GEOMETRIES[geometry].items() if key not in ("bias", "out_channels")}
    settings = {"kernel_size": 3, "eps": 1e-3, "padding_mode": padding_mode} | settings
    norm = patch_norm(input, **settings)
    torch.testing.assert_close(norm, torch.from_numpy(reference_norm(input.numpy(), **settings)), **EXACT)
    torch.testing.assert_close(patch_norm(input[0], **settings), norm[0], rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_patch_norm_is_at_least_float32(dtype):
    """576 squares of 30 overflow float16; their norm does not."""
    input = (torch.randn(1, 64, 5, 5, generator=torch.Generator().manual_seed(0)) * 30).to(dtype)
    norm = patch_norm(input, 3)
    assert norm.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    expected = torch.from_numpy(reference_norm(input.double().numpy(), 3))
    torch.testing.assert_close(norm.double(), expected, rtol=1e-6, atol=0)


def test_the_reference_refuses_what_it_does_not_define():
    """A new row in a table fails here until its formula stands in the reference."""
    for settings in ({"magnitude": "cube"}, {"angular": "cube"}, {"weighting": "cube"}):
        settings = {"magnitude": "sphere", "angular": "cosine"} | settings
        with pytest.raises(NotImplementedError, match="'cube'"):
            reference_conv(np.ones((1, 1, 2, 2)), np.ones((1, 1, 1, 1)), **settings)


def test_the_reference_on_a_hand_made_example():
    """The patch (3, 4) under the filter (1, 0): n = 5, c = 3/5."""
    x, w = np.array([[[[3.0, 4.0]]]]), np.array([[[[1.0, 0.0]]]])
    hand = {
        ("sphere", "cosine"): 0.6,
        ("ball", "cosine"): 0.6,
        ("tanh", "square_cosine"): 0.36 * np.tanh(2.5),
        ("linear", "cosine"): 3.0,
        ("linear", "power"): 5 * 0.6**3,
        ("seg", "cosine"): (0.5 * 5 + 0.5 * 2) * 0.6,
        ("log", "cosine"): np.log(6) * 0.6,
        ("mix", "cosine"): (5 + 0.5 * np.log(6)) * 0.6,
        ("sphere", "linear"): 1 - 2 * np.arctan2(4, 3) / np.pi,
        ("sphere", "sigmoid"): np.tanh((np.pi / 2 - np.arctan2(4, 3)) / 0.6) / np.tanh(np.pi / 1.2),
    }
    for (magnitude, angular), expected in hand.items():
        settings = {"magnitude": magnitude, "angular": angular, "radius": 2.0, "power": 3.0, "eps": 0.0}
        np.testing.assert_allclose(reference_conv(x, w, **settings).item(), expected, rtol=2e-6)
