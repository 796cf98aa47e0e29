"""Finite answers and gradients at every scale, and what autocast does to them."""

import contextlib
import itertools

import pytest
import torch
from reference import reference_conv, reference_norm

from operators import ANGULARS, MAGNITUDES, WEIGHTINGS, DecoupledConv2d, OperatorConfig, functional, patch_norm

OPERATORS = [f"{magnitude}_{angular}" for magnitude in MAGNITUDES for angular in ANGULARS]
SCALES = [0.0, 1e-30, 1e-8, 1.0, 1e4, 3e4]
# Float16 ends at 65,504, for the inner product of the plain convolution, too.
CASES = [
    *((scale, precision) for precision in ("float32", "bfloat16") for scale in SCALES),
    *((scale, "float16") for scale in (0.0, 1e-8, 1.0, 100.0)),
]
AUTOCAST = {"float32": None, "bfloat16": torch.bfloat16, "float16": torch.float16}


def autocast(name):
    return torch.autocast("cpu", AUTOCAST[name]) if AUTOCAST[name] else contextlib.nullcontext()


def make_layer(operator, in_channels=64, out_channels=8, kernel_size=3, **arguments):
    torch.manual_seed(0)
    return DecoupledConv2d(in_channels, out_channels, kernel_size, operator=operator, **arguments)


def check_finite(layer, input):
    """Run forward and backward; output, input gradient and every parameter's gradient must be finite."""
    input = input.detach().requires_grad_()
    output = layer(input)
    assert output.isfinite().all()
    output.float().sum().backward()
    for name, tensor in [("input", input), *layer.named_parameters()]:
        assert tensor.grad.isfinite().all(), name
    return output


@pytest.mark.parametrize(("scale", "precision"), CASES)
@pytest.mark.parametrize("operator", OPERATORS)
def test_every_scale(operator, scale, precision):
    config = {"name": operator, "weighting": "linear", "radius_mode": "learned_per_channel"}
    layer = make_layer(config, padding=1)
    for draw in (torch.randn, torch.rand):
        with autocast(precision):
            output = check_finite(layer, draw(2, 64, 5, 5) * scale)
        if scale == 0:
            bias = layer.bias.to(AUTOCAST[precision] or torch.float32)
            assert (output == bias[:, None, None]).all()


@pytest.mark.parametrize(("scale", "precision"), CASES)
@pytest.mark.parametrize("weighting", WEIGHTINGS)
@pytest.mark.parametrize(
    "magnitude", [name for name, magnitude in MAGNITUDES.items() if magnitude.uses_radius], ids=str
)
def test_every_scale_with_a_relative_radius(magnitude, weighting, scale, precision):
    config = OperatorConfig(magnitude, "sigmoid", weighting, radius_mode="learned", radius_relative=True)
    with autocast(precision):
        check_finite(make_layer(config), torch.randn(2, 64, 5, 5) * scale)


@pytest.mark.parametrize("precision", AUTOCAST)
@pytest.mark.parametrize("operator", OPERATORS)
def test_zero_patches_answer_exactly_zero(operator, precision):
    """Zero patches beside others, zero filters beside others: 0, with finite gradients for all."""
    layer = make_layer(operator, bias=False)
    with torch.no_grad():
        layer.weight[3] = 0
    input = torch.randn(2, 64, 8, 8)
    input[:, :, :5] = 0
    with autocast(precision):
        output = check_finite(layer, input)
    assert (output[:, :, :3] == 0).all()
    assert (output[:, 3] == 0).all()
    assert (output[:, :3, 3:] != 0).all()


@pytest.mark.parametrize("slow", [True, False], ids=["convolved in float32", "convolved in float16"])
@pytest.mark.parametrize("operator", OPERATORS)
def test_float16_inputs_whose_squares_overflow(operator, slow, monkeypatch):
    """Activations of RMS 100: the squared norms of their patches, 6e6, are far beyond float16."""
    if not slow:
        monkeypatch.setattr(functional, "SLOW_ON_CPUS", frozenset())
    layer = make_layer(operator)
    input = (torch.randn(1, 64, 4, 4) * 100).half()
    with torch.autocast("cpu", torch.float16):
        output = check_finite(layer, input)
    expected = layer(input.float())
    torch.testing.assert_close(output.float(), expected, rtol=0, atol=2**-8 * expected.abs().max().item())


# The cosine of half-precision operands errs by at most the 2 · 2^-9 (2^-12) of their rounding; sums stay far below.
TOLERANCES = {
    "bfloat16": {"rtol": 2**-7, "atol": 2**-7},
    "float16": {"rtol": 2**-10, "atol": 2**-10},
    "float32": {"rtol": 2e-5, "atol": 5e-6},
}


@pytest.mark.parametrize("precision", AUTOCAST)
@pytest.mark.parametrize(("magnitude", "angular"), list(itertools.product(MAGNITUDES, ANGULARS)))
def test_values_under_autocast(magnitude, angular, precision):
    layer = make_layer(OperatorConfig(magnitude, angular, "tanh"), in_channels=8, bias=False)
    input = torch.randn(2, 8, 6, 6)
    with autocast(precision), torch.no_grad():
        output = layer(input)
    weight = layer.weight.detach().double().numpy()
    expected = reference_conv(input.double().numpy(), weight, magnitude=magnitude, angular=angular, weighting="tanh")
    largest = abs(expected).max()
    expected = torch.from_numpy(expected) / largest
    torch.testing.assert_close(output.double() / largest, expected, **TOLERANCES[precision])


@pytest.mark.parametrize("precision", AUTOCAST)
@pytest.mark.parametrize("scale", [1e-8, 1.0, 3e4])
def test_the_norm_is_accurate_under_autocast(scale, precision):
    input = torch.randn(1, 512, 4, 4, generator=torch.Generator().manual_seed(0)) * scale
    with autocast(precision):
        norm = patch_norm(input, 3)
    assert norm.dtype == torch.float32
    expected = torch.from_numpy(reference_norm(input.double().numpy(), 3))
    torch.testing.assert_close(norm.double(), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("precision", AUTOCAST)
@pytest.mark.parametrize("operator", ["tanh_cosine", "tanh_linear"])
def test_the_norm_that_the_magnitude_sees_is_accurate_under_autocast(operator, precision):
    """Even where the input of the convolution is rounded to half precision; the running norm keeps what it saw."""
    layer = make_layer({"name": operator, "radius_relative": True})
    input = torch.randn(2, 64, 5, 5) * 30
    with autocast(precision):
        layer(input)
    expected = reference_norm(input.double().numpy(), 3).mean()
    assert layer.magnitude.running_norm.average.item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("angular", ANGULARS)
@pytest.mark.parametrize(
    ("precision", "input_dtype", "expected"),
    [
        ("float32", torch.float64, torch.float64),
        ("float32", torch.float32, torch.float32),
        ("bfloat16", torch.float32, torch.bfloat16),
        ("bfloat16", torch.bfloat16, torch.bfloat16),
        ("float16", torch.float32, torch.float16),
        ("float16", torch.float16, torch.float16),
    ],
    ids=str,
)
def test_the_dtype_of_the_result(angular, precision, input_dtype, expected):
    layer = make_layer(f"tanh_{angular}", in_channels=4)
    if input_dtype == torch.float64:
        layer = layer.double()
    with autocast(precision):
        assert layer(torch.randn(1, 4, 5, 5).to(input_dtype)).dtype == expected


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("operator", OPERATORS)
def test_a_network_in_half_precision_without_autocast(operator, dtype):
    layer = make_layer({"name": operator, "radius_mode": "learned"}, in_channels=8, dtype=dtype)
    output = check_finite(layer, torch.randn(2, 8, 5, 5, dtype=dtype))
    assert output.dtype == dtype


def test_double_precision_survives_autocast():
    layer = make_layer("tanh_linear", in_channels=4).double()
    input = torch.randn(1, 4, 5, 5, dtype=torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(layer(input), layer(input.float().double()), rtol=1e-5, atol=1e-6)
        output = layer(input)
    torch.testing.assert_close(output, layer(input), rtol=0, atol=0)


def filters_like(draw, shape):
    return torch.full(shape, 0.1) if draw == "constant" else getattr(torch, draw)(shape)


@pytest.mark.parametrize("draw", ["randn", "rand", "constant"])
@pytest.mark.parametrize(("channels", "kernel_size"), [(3, 3), (64, 3), (512, 1), (512, 3), (2048, 1)])
@pytest.mark.parametrize("angular", ANGULARS)
def test_self_products_are_never_nan(angular, channels, kernel_size, draw):
    """A filter on its own patch: rounding puts the float32 cosine above 1, for long or even patches above 1 + 1e-6."""
    layer = make_layer({"name": f"sphere_{angular}", "eps": 1e-12}, channels, 16, kernel_size, bias=False)
    with torch.no_grad():
        layer.weight.copy_(filters_like(draw, layer.weight.shape))
    patches = torch.cat([layer.weight.detach(), -layer.weight.detach()])
    output = check_finite(layer, patches)[..., 0, 0]
    own = torch.cat([output[:16].diagonal(), -output[16:].diagonal()])
    torch.testing.assert_close(own, torch.ones_like(own), rtol=0, atol=1e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize("angular", ANGULARS)
def test_the_gradient_at_parallel_patches_is_finite_and_alive(angular, sign, dtype):
    """No dead spot at c = ±1, and none just beyond, where float32 rounding may put the cosine of a patch."""
    layer = make_layer(f"sphere_{angular}")
    for beyond in (0.0, 1e-7, 1e-6, 2e-6, 1e-4) if dtype == torch.float32 else (0.0,):
        cos = torch.tensor(sign * (1 + beyond), dtype=dtype, requires_grad=True)
        (slope,) = torch.autograd.grad(layer.angular(cos), cos)
        assert slope.isfinite() and slope > 0.01, beyond


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("operator", OPERATORS)
def test_nan_goes_no_further_than_in_the_plain_convolution(operator, groups):
    layer = make_layer(operator, in_channels=4, groups=groups, padding=1).eval()
    images = torch.randn(3, 4, 6, 7)
    images[1, 0, 2, 3] = float("nan")
    expected = torch.nn.Conv2d.forward(layer, images).isnan()
    assert 0 < expected.sum() < expected.numel() / 4
    torch.testing.assert_close(layer(images).isnan(), expected)


@pytest.mark.parametrize("operator", OPERATORS)
def test_an_answer_does_not_depend_on_the_other_images(operator):
    """Across the batch sizes at which filters or answers are multiplied by the filters' factors."""
    layer = make_layer({"name": operator, "radius_relative": True}, in_channels=8).eval()
    images = torch.randn(40, 8, 5, 5)
    together = layer(images)
    for index in (0, 17):
        torch.testing.assert_close(layer(images[index : index + 1])[0], together[index], rtol=1e-5, atol=1e-5)
