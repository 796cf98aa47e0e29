"""Identities and invariances of the operators, at initialisation and after three steps of training."""

import numpy as np
import pytest
import torch

from operators import ANGULARS, MAGNITUDES, WEIGHTINGS, DecoupledConv2d, OperatorConfig
from operators.magnitude import Magnitude

OPERATORS = [f"{magnitude}_{angular}" for magnitude in MAGNITUDES for angular in ANGULARS]
BOUNDED = [name for name in OPERATORS if MAGNITUDES[name.split("_")[0]].bounded]
TIGHT = {"rtol": 1e-12, "atol": 1e-12}
EPS = 1e-12  # of every operator here: what it adds to squared norms of 0.1 or more is below 1e-11


@pytest.fixture(params=[0, 3], ids=["init", "trained"])
def make_layer(request):
    """Return a function that makes a float64 layer and trains it by this many steps of plain SGD."""

    def make(operator, **settings):
        torch.manual_seed(0)
        config = OperatorConfig.parse({"name": operator, "eps": EPS} | settings)
        layer = DecoupledConv2d(3, 5, 3, padding=1, operator=config, dtype=torch.float64)
        before = layer.weight.detach().clone()
        optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
        for _ in range(request.param):
            optimizer.zero_grad()
            images, targets = torch.randn(4, 3, 6, 6).double(), torch.randn(4, 5, 6, 6).double()
            (layer(images) - targets).square().mean().backward()
            optimizer.step()
        assert (request.param == 0) == torch.equal(before, layer.weight)
        assert layer.weight.square().sum((1, 2, 3)).min() > 0.1
        return layer.requires_grad_(False)

    return make


@pytest.fixture
def input():
    """Images whose patches have norms from 0.3 to 30."""
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(2, 3, 8, 8, dtype=torch.float64, generator=generator)
    return images * torch.logspace(-1, 0.8, 8, dtype=torch.float64)


def like(layer, operator, **settings):
    """Return a layer with the parameters of ``layer`` and another operator."""
    other = DecoupledConv2d(3, 5, 3, padding=1, dtype=torch.float64, operator={"name": operator, "eps": EPS} | settings)
    other.load_state_dict(layer.state_dict())
    return other.requires_grad_(False)


def without_bias(layer, input):
    return layer(input) - layer.bias[:, None, None]


def test_linear_cosine_weighted_linear_is_the_plain_convolution(make_layer, input):
    for eps in (1e-12, 1e-4, 1.0):  # whatever eps is: neither norm is left in the product
        layer = make_layer("linear_cosine", weighting="linear", eps=eps)
        torch.testing.assert_close(layer(input), torch.nn.Conv2d.forward(layer, input), **TIGHT)
        single, image = layer.float(), input.float()
        torch.testing.assert_close(single(image), torch.nn.Conv2d.forward(single, image), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("weighting", WEIGHTINGS)
@pytest.mark.parametrize("angular", ANGULARS)
@pytest.mark.parametrize("radius", [0.3, 3.0])
def test_seg_without_second_slope_is_ball_times_radius(make_layer, input, angular, weighting, radius):
    seg = make_layer(f"seg_{angular}", radius=radius, beta=0.0, alpha=1.5, weighting=weighting)
    ball = like(seg, f"ball_{angular}", radius=radius, alpha=1.5, weighting=weighting)
    torch.testing.assert_close(without_bias(seg, input), radius * without_bias(ball, input), **TIGHT)


def test_seg_with_equal_slopes_is_linear(make_layer, input):
    seg = make_layer("seg_cosine", alpha=0.7, beta=0.7)
    torch.testing.assert_close(seg(input), like(seg, "linear_cosine", alpha=0.7)(input), **TIGHT)


@pytest.mark.parametrize("magnitude", MAGNITUDES)
@pytest.mark.parametrize(("power", "angular"), [(1.0, "cosine"), (2.0, "square_cosine")])
def test_power_one_is_cosine_and_power_two_is_square_cosine(make_layer, input, magnitude, power, angular):
    """The values and the gradients, at zero patches too."""
    one = make_layer(f"{magnitude}_power", power=power, eps=1e-4)
    two = like(one, f"{magnitude}_{angular}", eps=1e-4)
    input[:, :, :, :4] = 0
    outcomes = []
    for layer in (one, two):
        leaf = input.clone().requires_grad_()
        output = layer.requires_grad_()(leaf)
        gradients = torch.autograd.grad(output.square().sum() + output.sum(), [leaf, *layer.parameters()])
        outcomes.append([output, *gradients])
    for mine, other in zip(*outcomes, strict=True):
        # The floor of 1e-18 under c² makes a slope of 1e-9 of the 0 at zero patches, where n is as small as 0.01.
        torch.testing.assert_close(mine, other, rtol=1e-9, atol=1e-12 if power == 1 else 1e-6)


@pytest.mark.parametrize("operator", OPERATORS)
def test_the_length_of_an_unweighted_filter_does_not_matter(make_layer, input, operator):
    layer = make_layer(operator)
    expected = layer(input)
    for scale in (0.5, 3.0, 100.0):
        scaled = like(layer, operator)
        scaled.weight.mul_(scale)
        torch.testing.assert_close(scaled(input), expected, rtol=1e-10, atol=1e-9)


@pytest.mark.parametrize("operator", OPERATORS)
def test_the_length_of_an_unweighted_filter_matters_less_than_eps(make_layer, input, operator):
    """With the default eps: doubling a filter moves ‖w‖ / sqrt(‖w‖² + eps) by less than eps / (2 ‖w‖²)."""
    layer = make_layer(operator, eps=1e-4)
    doubled = like(layer, operator, eps=1e-4)
    doubled.weight.mul_(2)
    bound = (1e-4 / (2 * layer.weight.square().sum((1, 2, 3)))).max().item()
    steepest = 30.0 if operator.endswith(("linear", "sigmoid")) else 2.0  # of g where patches are not parallel
    largest = without_bias(layer, input).abs().max().item()
    moved = (doubled(input) - layer(input)).abs().max().item()
    assert 0 < moved < bound * steepest * largest


@pytest.mark.parametrize("weighting", [name for name in WEIGHTINGS if name != "none"])
@pytest.mark.parametrize("operator", OPERATORS)
def test_the_length_of_a_weighted_filter_is_a_factor(make_layer, input, operator, weighting):
    layer = make_layer(operator, weighting=weighting)
    norm = layer.weight.square().sum((1, 2, 3)).sqrt()[:, None, None]
    factor = {"linear": norm, "tanh": norm.tanh()}[weighting]
    unweighted = without_bias(like(layer, operator), input)
    torch.testing.assert_close(without_bias(layer, input), factor * unweighted, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("operator", BOUNDED)
def test_bounded_operators_stay_within_alpha(make_layer, input, operator):
    layer = make_layer(operator, alpha=0.8, radius=0.1)
    largest = 0.0
    for scale in (1e-3, 1.0, 1e3, 1e6):
        largest = max(largest, without_bias(layer, input * scale).abs().max().item())
        parallel = layer.weight * scale
        largest = max(largest, without_bias(layer, torch.cat([parallel, -parallel])).abs().max().item())
    assert 0.8 * (1 - 2e-3) < largest <= 0.8 * (1 + 1e-9)


@pytest.mark.parametrize("name", MAGNITUDES)
def test_bounded_and_smooth_are_what_the_classes_say(name):
    """Over n from 1e-3 to 1e7: bounded means within α; smooth means no jump in the slope of h."""
    magnitude: Magnitude = MAGNITUDES[name](alpha=1.5, beta=0.4, radius=2.0)
    one = torch.ones((), dtype=torch.float64)
    n = torch.logspace(-3, 7, 2001, dtype=torch.float64)
    h = magnitude(n, one)
    assert (h >= 0).all() and (h.diff() >= -1e-12).all()
    assert magnitude.bounded == bool((h <= 1.5 * (1 + 1e-12)).all())
    sides = torch.tensor([2.0 - 1e-6, 2.0 + 1e-6], dtype=torch.float64, requires_grad=True)
    (slopes,) = torch.autograd.grad(magnitude(sides, one).sum(), sides)
    assert magnitude.smooth == (abs(slopes.diff().item()) < 1e-3)
    values = magnitude(sides, one)
    assert abs(values.diff().item()) < 1e-5  # continuous at the radius either way


@pytest.mark.parametrize("angular", ANGULARS)
def test_sphere_does_not_feel_the_length_of_the_input(make_layer, angular):
    layer = make_layer(f"sphere_{angular}")
    input = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(2)).double()
    for scale in (0.01, 7.0, 1e5):
        torch.testing.assert_close(layer(input * scale), layer(input), rtol=1e-7, atol=1e-7)  # eps / 0.01² = 1e-8


@pytest.mark.parametrize("operator", OPERATORS)
def test_the_answer_to_the_negative_is_the_negative(make_layer, input, operator):
    layer = make_layer(operator)
    torch.testing.assert_close(without_bias(layer, -input), -without_bias(layer, input), **TIGHT)
    turned = like(layer, operator)
    turned.weight.neg_()
    torch.testing.assert_close(without_bias(turned, input), -without_bias(layer, input), **TIGHT)


@pytest.mark.parametrize("sigmoid_k", [0.02, 0.3, 5.0])
@pytest.mark.parametrize("power", [1.0, 1.7, 4.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", ANGULARS)
def test_angular_functions_are_odd_increasing_and_end_at_one(name, dtype, power, sigmoid_k):
    angular = OperatorConfig("sphere", name, power=power, sigmoid_k=sigmoid_k).build_angular()
    cos = torch.linspace(-1, 1, 4001, dtype=dtype)
    g = angular(cos)
    assert torch.equal(angular(-cos), -g)
    assert angular(torch.zeros((), dtype=dtype)) == 0
    # Rounding alone where g is flat, which a steep sigmoid is from 0.3 on.
    assert (g.diff() >= -4 * torch.finfo(dtype).eps).all()
    # Two functions of the angle scale c by 1 - 1e-6, which costs 9e-4 of θ: 2/π · sqrt(2e-6).
    end = 1 - 2 / np.pi * np.sqrt(2e-6) if name in ("linear", "sigmoid") else 1.0
    assert end * (1 - 2e-5) <= g[-1].item() <= 1 + 1e-6


@pytest.mark.parametrize("operator", OPERATORS)
def test_filters_and_images_may_be_permuted(make_layer, input, operator):
    """No answer depends on the other filters or on the other images of the batch."""
    layer = make_layer(operator)
    order = torch.tensor([3, 1, 4, 0, 2])
    expected = layer(input)
    torch.testing.assert_close(layer(input[1:]), expected[1:], **TIGHT)
    permuted = like(layer, operator)
    permuted.weight.copy_(layer.weight[order])
    permuted.bias.copy_(layer.bias[order])
    torch.testing.assert_close(permuted(input), expected[:, order], **TIGHT)
