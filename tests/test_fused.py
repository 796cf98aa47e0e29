"""The hand-written gradients: work in bands, outputs that are overwritten, memory, gains of 0."""

import pytest
import torch
from torch import nn
from torch.autograd import gradcheck
from torch.utils.checkpoint import checkpoint

from operators import DecoupledConv2d, OperatorConfig, decoupled_conv2d, fused, kernels, passes
from operators.angular import cosine
from operators.magnitude import Magnitude

# One operator for each way of computing, and one with everything that a radius can have.
WAYS = {
    "plain": OperatorConfig("linear", "cosine", "tanh"),
    "scaled": OperatorConfig("tanh", "cosine", radius_mode="learned", radius_relative=True),
    "by channel": OperatorConfig("ball", "cosine", "linear", radius_mode="learned_per_channel"),
    "by angle": OperatorConfig("log", "sigmoid", "tanh"),
    "by square": OperatorConfig("mix", "square_cosine"),
    "all": OperatorConfig("seg", "square_cosine", "linear", radius_mode="learned_per_channel", radius_relative=True),
}
GEOMETRIES = {
    "3×3": {"kernel_size": 3, "padding": 1},
    "groups": {"kernel_size": (2, 3), "groups": 2, "stride": (1, 2)},
    "depthwise": {"kernel_size": 3, "groups": 4, "out_channels": 4},
    "more weights than pixels": {"kernel_size": (4, 5), "groups": 2, "out_channels": 4},
    "1×1, more channels": {"kernel_size": 1, "out_channels": 6},
    "1×1, fewer channels": {"kernel_size": 1, "out_channels": 2},
}
needs_a_compiler = pytest.mark.skipif(not kernels.covers(torch.ones(1, 1, 1, 1)), reason="no C++ compiler")
every_way = pytest.mark.parametrize("way", WAYS)


@pytest.fixture(autouse=True, params=[pytest.param("loops", marks=needs_a_compiler), "torch"])
def passes_by(request, monkeypatch):
    """The compiled loops, and torch's own operations in their place."""
    if request.param == "torch":
        monkeypatch.setattr(kernels, "_library", lambda: None)


def make_layer(way, *, kernel_size=3, out_channels=6, **arguments):
    torch.manual_seed(0)
    layer = DecoupledConv2d(4, out_channels, kernel_size, operator=WAYS[way], dtype=torch.float64, **arguments)
    nn.init.normal_(layer.weight, std=0.5)
    return layer


def make_images(*, memory_format=torch.contiguous_format):
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(2, 4, 4, 5, dtype=torch.float64, generator=generator)
    return images.contiguous(memory_format=memory_format)


def answer_and_gradients(network, images):
    """Return the answer, and the gradients of the images and of every parameter."""
    network.zero_grad()
    images = images.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    answer = network(images)
    weights = torch.linspace(-1, 1, answer.numel(), dtype=answer.dtype).view_as(answer)
    (answer * weights).sum().backward()
    gradients = {name: parameter.grad for name, parameter in network.named_parameters()}
    return {"answer": answer.detach(), "images": images.grad, **gradients}


@pytest.mark.parametrize("passes_by", ["torch"], indirect=True)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("geometry", GEOMETRIES)
@pytest.mark.parametrize("band", [1, 24, 100])
@every_way
def test_bands_change_nothing(way, geometry, band, memory_format, monkeypatch):
    """Bands of a row, of some rows and of whole images against the whole, as a function transform computes it."""
    layer = make_layer(way, **GEOMETRIES[geometry]).to(memory_format=memory_format).train()
    images = make_images(memory_format=memory_format)
    with monkeypatch.context() as patch:
        patch.setattr(fused, "eager", lambda: False)
        expected = answer_and_gradients(layer, images)
    monkeypatch.setattr(passes, "BAND", band)
    torch.testing.assert_close(answer_and_gradients(layer, images), expected, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("geometry", GEOMETRIES)
@every_way
def test_gradients_in_bands_are_those_of_finite_differences(way, geometry, monkeypatch):
    monkeypatch.setattr(passes, "BAND", 10)
    layer = make_layer(way, **GEOMETRIES[geometry]).eval()
    names, values = zip(*layer.named_parameters(), strict=True)

    def function(images, *values):
        return torch.func.functional_call(layer, dict(zip(names, values, strict=True)), (images,))

    assert gradcheck(function, (make_images().requires_grad_(), *values))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("geometry", GEOMETRIES)
@every_way
def test_answers_without_gradients_are_those_with_them(way, geometry, mode):
    layer, images = make_layer(way, **GEOMETRIES[geometry]).eval(), make_images()
    expected = layer(images)
    with mode():
        torch.testing.assert_close(layer(images), expected, rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("geometry", ["3×3", "more weights than pixels"])
@every_way
def test_every_gradient_alone_and_twice(way, geometry):
    """Frozen filters, images without a gradient: each gradient is what it is beside the others, also a second time."""
    layer, images = make_layer(way, **GEOMETRIES[geometry]).train(), make_images()
    expected = answer_and_gradients(layer, images)
    operands = {"images": images, **dict(layer.named_parameters())}
    for name, operand in operands.items():
        for other in operands.values():
            other.requires_grad_(other is operand)
        answer = layer(images)
        weights = torch.linspace(-1, 1, answer.numel(), dtype=answer.dtype).view_as(answer)
        for _ in range(2):
            (gradient,) = torch.autograd.grad(answer, operand, weights, retain_graph=True)
            torch.testing.assert_close(gradient, expected[name], rtol=1e-12, atol=1e-13)


@every_way
def test_many_gradients_at_once(way):
    layer, images = make_layer(way, out_channels=2), make_images()[:1]

    def jacobian(vectorize):
        return torch.autograd.functional.jacobian(layer, images, vectorize=vectorize)

    torch.testing.assert_close(jacobian(True), jacobian(False), rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("geometry", GEOMETRIES)
@every_way
def test_half_precision_is_close_to_double(way, geometry, bias):
    layer, images = make_layer(way, bias=bias, **GEOMETRIES[geometry]).train(), make_images()
    expected = answer_and_gradients(layer, images)
    with torch.autocast("cpu", torch.bfloat16):  # the backward pass is called inside, too
        outcome = answer_and_gradients(layer.float(), images.float())
    for name, value in outcome.items():
        # Eight bits, and less where a sum over the batch cancels.
        assert (value - expected[name]).abs().max() <= 2**-4 * expected[name].abs().max(), name


OVERWRITERS = {
    "relu": nn.ReLU(inplace=True),
    "leaky_relu": nn.LeakyReLU(0.2, inplace=True),
    "silu": nn.SiLU(inplace=True),
    "add": lambda answer: answer.add_(3.0),
    "scale": lambda answer: answer.mul_(torch.tensor(2.0)),
}


class Then(nn.Module):
    def __init__(self, layer, function):
        super().__init__()
        self.layer = layer
        self.function = function

    def forward(self, images):
        return self.function(self.layer(images))


class Checkpointed(Then):
    def forward(self, images):
        return checkpoint(super().forward, images, use_reentrant=False)


@pytest.mark.parametrize("overwrite", OVERWRITERS)
@pytest.mark.parametrize("kind", [Then, Checkpointed])
@pytest.mark.parametrize("geometry", ["3×3", "more weights than pixels"])
@every_way
def test_what_overwrites_the_answer_leaves_the_gradient_right(way, geometry, kind, overwrite):
    layer, function = make_layer(way, **GEOMETRIES[geometry]).train(), OVERWRITERS[overwrite]
    expected = answer_and_gradients(Then(layer, lambda answer: function(answer.clone())), make_images())
    outcome = answer_and_gradients(kind(layer, function), make_images())
    torch.testing.assert_close(outcome, expected, rtol=1e-12, atol=1e-13)


def test_an_input_that_is_overwritten_is_an_error_as_for_a_plain_convolution():
    for layer in (make_layer("scaled"), make_layer("by angle"), nn.Conv2d(4, 6, 3, dtype=torch.float64)):
        images = make_images().requires_grad_() * 1
        answer = layer(images)
        images.mul_(2)
        with pytest.raises(RuntimeError, match="modified.* inplace"):
            answer.sum().backward()


def kept_bytes(network, images):
    """Return the bytes of all the tensors that the backward pass will need, each storage counted once."""
    storages = {}

    def pack(tensor):
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        answer = network(images)
    assert answer.requires_grad
    return sum(storage.nbytes() for storage in storages.values())


@pytest.mark.parametrize("operator", ["linear_cosine", "sphere_cosine", "tanh_cosine", "log_cosine"])
def test_a_scaled_convolution_keeps_what_its_plain_twin_keeps(operator):
    """With BatchNorm behind each convolution, as in residual networks, whose input is the answer that is kept."""

    def build(make):
        layers = [
            [make(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()] for width in [64] * 3
        ]
        return nn.Sequential(*(layer for block in layers for layer in block))

    images = torch.randn(4, 64, 16, 16, requires_grad=True)
    plain = kept_bytes(build(nn.Conv2d), images)
    decoupled = kept_bytes(build(lambda *args, **kwargs: DecoupledConv2d(*args, operator=operator, **kwargs)), images)
    assert decoupled <= 1.1 * plain


class DeadZone(Magnitude):
    """``h(n) = max(n - ρ, 0)``: a magnitude that is exactly 0 for weak patches."""

    def gain(self, n, radius):
        return (n - radius).clamp_min(0) / n


def test_a_dead_zone_has_a_finite_and_right_gradient():
    torch.manual_seed(0)
    images, weight = make_images().requires_grad_(), torch.randn(2, 4, 1, 3, dtype=torch.float64, requires_grad=True)
    magnitude = DeadZone(radius=3.0)

    def function(images, weight):
        return decoupled_conv2d(images, weight, magnitude=magnitude, angular=cosine)

    answer = function(images, weight)
    assert 0 < (answer == 0).sum() < answer.numel()
    assert gradcheck(function, (images, weight))
