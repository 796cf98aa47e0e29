"""First and second derivatives of the layer against finite differences, in float64."""

import itertools

import pytest
import torch
from reference import reference_norm
from torch.autograd import gradcheck, gradgradcheck

from operators import ANGULARS, MAGNITUDES, RADIUS_MODES, WEIGHTINGS, DecoupledConv2d, OperatorConfig

RADIUS = 2.35
OPERATORS = [f"{magnitude}_{angular}" for magnitude in MAGNITUDES for angular in ANGULARS]
WITH_RADIUS = [name for name in MAGNITUDES if MAGNITUDES[name].uses_radius]


def make_layer(operator, *, in_channels=2, kernel_size=3, **arguments):
    torch.manual_seed(0)
    layer = DecoupledConv2d(in_channels, 2, kernel_size, operator=operator, dtype=torch.float64, **arguments)
    with torch.no_grad():
        layer.weight.copy_(torch.randn_like(layer.weight))
        for name, parameter in layer.named_parameters():
            if name.endswith("radius"):
                parameter.mul_(torch.linspace(1.0, 1.2, parameter.numel(), dtype=torch.float64).view_as(parameter))
    return layer


def make_input():
    """Return an image whose four 3 x 3 patches have norms on both sides of the radius."""
    generator = torch.Generator().manual_seed(1)
    input = torch.randn(1, 2, 4, 4, dtype=torch.float64, generator=generator)
    return input * torch.tensor([1.0, 0.4, 0.4, 0.4], dtype=torch.float64)


def check_gradients(layer, input, **tolerance):
    """Run gradcheck and gradgradcheck with respect to the input and every parameter of the layer."""
    names = [name for name, _ in layer.named_parameters()]
    values = [parameter.detach().clone().requires_grad_() for parameter in layer.parameters()]

    def function(input, *values):
        return torch.func.functional_call(layer, dict(zip(names, values, strict=True)), (input,))

    arguments = (input.clone().requires_grad_(), *values)
    assert gradcheck(function, arguments, **tolerance)
    assert gradgradcheck(function, arguments, fast_mode=True, **tolerance)
    return names


def test_the_points_lie_on_both_sides_of_the_radius_and_not_on_it():
    norms = reference_norm(make_input().numpy(), 3)
    assert (norms < 0.95 * RADIUS).any() and (norms > 1.05 * RADIUS).any()
    assert abs(norms - RADIUS).min() > 0.01  # finite differences of 1e-6 do not cross it


@pytest.mark.parametrize("operator", OPERATORS)
def test_every_operator_at_random_points(operator):
    names = check_gradients(make_layer({"name": operator, "radius": RADIUS, "power": 2.5}), make_input())
    assert names == ["weight", "bias"]


@pytest.mark.parametrize("eps", [1e-2, 1e-4])
@pytest.mark.parametrize("operator", OPERATORS)
def test_every_operator_at_zero_patches(operator, eps):
    """Steps are a millionth of a zero patch's norm, for the first derivative of ``c|c|`` has a kink at 0."""
    layer = make_layer({"name": operator, "radius": RADIUS, "power": 3.0, "eps": eps})
    input = make_input()
    input[:, :, :3, 1:] = 0
    assert reference_norm(input.numpy(), 3, eps=eps).min() == pytest.approx(eps**0.5)
    check_gradients(layer, input, eps=1e-6 * eps**0.5, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("operator", OPERATORS)
def test_every_operator_at_a_zero_image_and_a_zero_filter(operator):
    layer = make_layer({"name": operator, "radius": RADIUS, "power": 3.0, "eps": 1e-2})
    with torch.no_grad():
        layer.weight[0] = 0
    check_gradients(layer, torch.zeros(1, 2, 4, 4, dtype=torch.float64), eps=1e-7, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("power", [1.0, 1.3, 2.0, 4.5])
def test_every_power(power):
    check_gradients(make_layer({"name": "linear_power", "power": power}), make_input())


@pytest.mark.parametrize("weighting", WEIGHTINGS)
@pytest.mark.parametrize("operator", ["tanh_cosine", "log_linear"])
def test_every_weighting(operator, weighting):
    check_gradients(make_layer({"name": operator, "weighting": weighting}), make_input())


GEOMETRIES = [
    {"groups": 2},
    {"padding": "same", "padding_mode": "reflect"},
    {"padding": 1, "stride": 2},
    {"kernel_size": 2, "dilation": 2, "padding_mode": "circular", "padding": (1, 0)},
]


@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
@pytest.mark.parametrize("operator", ["tanh_cosine", "ball_linear"])
def test_every_geometry(operator, geometry):
    norms = reference_norm(
        make_input().numpy(),
        geometry.get("kernel_size", 3),
        **{key: value for key, value in geometry.items() if key != "kernel_size"},
    )
    assert abs(norms - RADIUS).min() > 1e-3
    check_gradients(make_layer({"name": operator, "radius": RADIUS}, **geometry), make_input())


@pytest.mark.parametrize("relative", [False, True])
@pytest.mark.parametrize("radius_mode", RADIUS_MODES)
@pytest.mark.parametrize(("magnitude", "angular"), list(itertools.product(WITH_RADIUS, ["cosine", "sigmoid"])))
def test_every_radius_mode(magnitude, angular, radius_mode, relative):
    """The gradient reaches a learned radius and, in training, flows through the batch's mean norm."""
    radius = 0.95 if relative else RADIUS
    config = OperatorConfig(magnitude, angular, radius=radius, radius_mode=radius_mode, radius_relative=relative)
    names = check_gradients(make_layer(config).train(), make_input())
    assert any(name.endswith("radius") for name in names) == (radius_mode != "fixed")


@pytest.mark.parametrize("angular", ["linear", "sigmoid"])
@pytest.mark.parametrize("sign", [1, -1])
def test_the_gradient_of_the_angle_at_parallel_patches(angular, sign):
    """At c = ±1 the slope of ``asin`` in ``c`` is finite and alive: 1 / sqrt(2e-6), not infinite and not 0."""
    cos = torch.tensor([sign * 1.0], dtype=torch.float64, requires_grad=True)
    layer = make_layer({"name": f"sphere_{angular}", "sigmoid_k": 1.0})
    (slope,) = torch.autograd.grad(layer.angular(cos), cos)
    elevation = {"linear": 2 / torch.pi, "sigmoid": 0.5 / torch.tanh(torch.tensor(torch.pi / 4)).item()}[angular]
    if angular == "sigmoid":
        elevation /= torch.cosh(torch.tensor(torch.pi / 4)).item() ** 2
    assert slope.item() == pytest.approx(elevation / (2e-6) ** 0.5, rel=2e-3)
