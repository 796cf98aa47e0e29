"""The compiled loops: how they are built and kept, what they compute, and half precision with and without them."""

import os
import subprocess
import sys
import warnings

import pytest
import torch
from torch import nn

from operators import ANGULARS, MAGNITUDES, DecoupledConv2d, decoupled_conv2d, functional, kernels, patch_norm
from operators.kernels import Windows

OPERATORS = [f"{magnitude}_{angular}" for magnitude in MAGNITUDES for angular in ANGULARS]
HALVES = {"bfloat16": torch.bfloat16, "float16": torch.float16}


@pytest.fixture
def unbuilt(monkeypatch, tmp_path):
    """An empty cache, and nothing built in this process."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    kernels._library.cache_clear()
    yield tmp_path / "decoupled-zoo"
    kernels._library.cache_clear()


def built() -> bool:
    return kernels.covers(torch.ones(1, 1, 1, 1))


needs_a_compiler = pytest.mark.skipif(not built(), reason="no C++ compiler")


def both_ways(monkeypatch, function):
    """Return what a function returns with the loops and without."""
    looped = function()
    with monkeypatch.context() as patch:
        patch.setattr(kernels, "_library", lambda: None)
        return looped, function()


def outcome(layer, images, autocast=None):
    """Return the answer, and the gradients of images and parameters."""
    images = images.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    layer.zero_grad()
    with torch.autocast("cpu", autocast, enabled=autocast is not None):
        answer = layer(images)
    weights = torch.linspace(-1, 1, answer.numel()).view_as(answer)
    (answer.double() * weights).sum().backward()
    return {
        "answer": answer.detach(),
        "images": images.grad,
        **{name: parameter.grad.clone() for name, parameter in layer.named_parameters()},
    }


@needs_a_compiler
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("groups", [1, 4, 16, 48])
@pytest.mark.parametrize("mode", ["fixed", "learned", "learned_per_channel"])
@pytest.mark.parametrize("operator", OPERATORS)
def test_every_operator_is_what_torch_computes(operator, mode, groups, memory_format, monkeypatch):
    """In float64, so that a wrong formula cannot hide; channels that are no multiple of what a loop takes at once."""
    torch.manual_seed(0)
    config = {"name": operator, "weighting": "tanh", "radius": 3.0, "radius_mode": mode}
    layer = DecoupledConv2d(48, 48, (3, 2), (2, 1), (1, 1), groups=groups, operator=config, dtype=torch.float64)
    layer.to(memory_format=memory_format)
    images = torch.randn(2, 48, 9, 7, dtype=torch.float64).contiguous(memory_format=memory_format)
    looped, plain = both_ways(monkeypatch, lambda: outcome(layer, images))
    torch.testing.assert_close(looped, plain, rtol=1e-10, atol=1e-12)


@needs_a_compiler
@pytest.mark.parametrize("groups", [1, 4, 48])
@pytest.mark.parametrize("operator", ["tanh_cosine", "log_sigmoid", "seg_power"])
def test_sums_do_not_depend_on_the_number_of_threads(operator, groups):
    torch.manual_seed(0)
    config = {"name": operator, "radius_mode": "learned_per_channel"}
    layer, images = DecoupledConv2d(48, 48, 3, groups=groups, operator=config), torch.randn(8, 48, 20, 20)
    threads = torch.get_num_threads()
    try:
        outcomes = []
        for number in (1, 2, 3):
            torch.set_num_threads(number)
            total = kernels.window_sum(kernels.squares(images, groups), Windows((3, 3), (1, 1), (0, 0), (1, 1)), False)
            answer = torch.randn(8, 48, 18, 18, generator=torch.Generator().manual_seed(1))
            settings = functional._known_operator(layer.magnitude, layer.angular, 1e-4)
            radius = torch.as_tensor(layer.magnitude.radius).detach().flatten()
            outcomes.append(kernels.respond_backward(answer, answer, total, radius, None, settings, groups, True))
    finally:
        torch.set_num_threads(threads)
    for other in outcomes[1:]:
        torch.testing.assert_close(other, outcomes[0], rtol=0, atol=0)


@pytest.mark.parametrize("loops", [True, False], ids=["loops", "torch"])
@pytest.mark.parametrize("precision", HALVES)
@pytest.mark.parametrize("operator", OPERATORS)
def test_half_precision_errs_at_most_twice_as_much_as_a_plain_convolution(operator, precision, loops, monkeypatch):
    """Convolved in half precision, as on processors that are fast at it, against the definition in float64."""
    monkeypatch.setattr(functional, "SLOW_ON_CPUS", frozenset())
    if not loops:
        monkeypatch.setattr(kernels, "_library", lambda: None)
    torch.manual_seed(0)
    images = torch.randn(4, 64, 12, 12).to(HALVES[precision])
    layer = DecoupledConv2d(64, 32, 3, bias=False, operator={"name": operator, "radius": 20.0})
    errors = {}
    for network in (layer, nn.Conv2d(64, 32, 3, bias=False)):
        network.weight.data = layer.weight.data.float()
        with torch.no_grad(), torch.autocast("cpu", HALVES[precision]):
            answer = network(images)
        assert answer.dtype == HALVES[precision]
        expected = network.double()(images.double())
        errors[network] = ((answer - expected).square().mean() / expected.square().mean()).sqrt().item()
    mine, plain = errors.values()
    assert mine <= 2 * plain


def script(path, text):
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o700)
    return str(path)


@needs_a_compiler
def test_the_loops_are_built_once_and_kept(unbuilt, tmp_path, monkeypatch):
    assert built()
    kept, seal = sorted(unbuilt.iterdir(), reverse=True)
    assert (kept.suffix, seal.suffix) == (".so", ".sha256")
    # Without a compiler, too.
    for compiler in (script(tmp_path / "compiler", "exit 1"), "no-such-compiler"):
        kernels._library.cache_clear()
        monkeypatch.setenv("CXX", compiler)
        assert built()


@needs_a_compiler
def test_a_truncated_file_is_not_loaded_but_built_again(unbuilt, tmp_path, monkeypatch):
    assert built()
    kept, seal = sorted(unbuilt.iterdir(), reverse=True)
    broken = tmp_path / "another cache/decoupled-zoo" / kept.name
    broken.parent.mkdir(parents=True)
    broken.write_bytes(kept.read_bytes()[:3000])
    (broken.parent / seal.name).write_bytes(seal.read_bytes())
    monkeypatch.setenv("XDG_CACHE_HOME", str(broken.parent.parent))
    kernels._library.cache_clear()
    assert built() and broken.stat().st_size > 3000 and len(list(broken.parent.iterdir())) == 2


@needs_a_compiler
def test_without_a_place_to_keep_them_the_loops_are_built_each_time(unbuilt):
    unbuilt.write_text("no folder")
    assert built()


def test_a_failing_compiler_is_told_once(unbuilt, tmp_path, monkeypatch):
    monkeypatch.setenv(
        "CXX", script(tmp_path / "compiler", "echo In function f: >&2; echo error: out of registers >&2; exit 1")
    )
    layer, images = DecoupledConv2d(4, 4, 3, groups=4), torch.randn(1, 4, 5, 5)
    with pytest.warns(
        UserWarning, match=r"costs speed alone: .*compiler failed \(error: out of registers\); DECOUPLED_ZOO_KER"
    ):
        answer = layer(images)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        torch.testing.assert_close(layer(images), answer)
    assert not unbuilt.exists()


@pytest.mark.parametrize("setting", [{"PATH": "/nowhere"}, {kernels.SWITCH: "off"}, {kernels.SWITCH: "OFF"}], ids=str)
def test_without_a_compiler_or_a_wish_nothing_is_said(unbuilt, setting, monkeypatch):
    monkeypatch.delenv("CXX", raising=False)
    for name, value in setting.items():
        monkeypatch.setenv(name, value)
    assert not built() and not unbuilt.exists()


def test_a_compiler_that_is_not_there_but_was_named_is_told(unbuilt, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.warns(UserWarning, match=r"no-such-compiler failed \(FileNotFoundError\)"):
        assert not built()


@needs_a_compiler
def test_processes_that_begin_together_build_whole_files(tmp_path):
    program = "import torch; from operators import kernels; assert kernels.covers(torch.ones(1, 1, 1, 1))"
    command = [sys.executable, "-c", program]
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path)}
    processes = [subprocess.Popen(command, env=environment) for _ in range(2)]
    assert [process.wait() for process in processes] == [0, 0]
    assert sorted(file.suffix for file in (tmp_path / "decoupled-zoo").iterdir()) == [".sha256", ".so"]


class Subclass(torch.Tensor):
    pass


LEFT_TO_TORCH = {
    "float16": torch.randn(2, 8, 6, 6).half(),
    "a slice": torch.randn(2, 8, 6, 9)[..., ::2],
    "expanded": torch.randn(1, 8, 6, 6).expand(2, -1, -1, -1),
    "a subclass": torch.randn(2, 8, 6, 6).as_subclass(Subclass),
    "no images": torch.randn(0, 8, 6, 6),
}


@pytest.mark.parametrize("groups", [1, 2, 8])
@pytest.mark.parametrize("operator", ["tanh_cosine", "mix_square_cosine", "ball_linear"])
@pytest.mark.parametrize("kind", LEFT_TO_TORCH)
def test_what_the_loops_do_not_cover_is_computed_all_the_same(kind, operator, groups):
    images = LEFT_TO_TORCH[kind]
    layer = DecoupledConv2d(8, 8, 3, groups=groups, operator=operator, dtype=images.dtype)
    expected = layer.double()(torch.Tensor(images.float()).double().clone())
    answer = layer.to(images.dtype)(images)
    assert answer.dtype == images.dtype
    torch.testing.assert_close(torch.Tensor(answer.float()).double(), expected, rtol=2e-3, atol=2e-3)
    gradients = []
    for precision in (images.dtype, torch.float64):
        leaf = torch.Tensor(images.float()).to(precision).requires_grad_()
        layer.to(precision)(leaf).double().sum().backward()
        gradients.append(leaf.grad.double())
    torch.testing.assert_close(*gradients, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize(
    "part", [lambda x: x.chunk(2, 1)[1], lambda x: x[..., ::2], lambda x: x[:1].expand(3, -1, -1, -1)]
)
@pytest.mark.parametrize("groups", [1, 2, 8])
@pytest.mark.parametrize("operator", ["tanh_cosine", "mix_square_cosine", "ball_linear"])
def test_the_gradient_of_a_part_is_that_of_its_copy(operator, groups, part):
    """A part of a tensor is not dense in memory, though the gradient that comes to it is."""
    layer = DecoupledConv2d(8, 8, 3, groups=groups, operator=operator)
    images = torch.randn(2, 16 if part(torch.ones(2, 16, 1, 1)).shape[1] == 8 else 8, 7, 7)
    gradients = []
    for copy in (lambda x: x, torch.clone):
        leaf = images.clone().requires_grad_()
        layer(copy(part(leaf))).square().sum().backward()
        gradients.append(leaf.grad)
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("autocast", [None, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("weights", "input"), [(torch.float32, torch.float64), (torch.float64, torch.float32)], ids=str
)
@pytest.mark.parametrize("operator", ["sphere_cosine", "mix_square_cosine", "ball_linear"])
def test_filters_of_another_precision_than_the_images(operator, weights, input, autocast):
    layer, images = DecoupledConv2d(4, 6, 3, operator=operator), torch.randn(2, 4, 7, 7)
    expected = outcome(layer.double(), images.double())
    found = outcome(layer.to(weights), images.to(input), autocast)
    tolerance = 0.03 if autocast else 1e-5
    for name, value in found.items():
        torch.testing.assert_close(
            value.double(), expected[name], rtol=tolerance, atol=tolerance * expected[name].abs().max().item()
        )


@needs_a_compiler
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize(
    ("channels", "groups", "size", "geometry"),
    [
        (4, 1, (40, 41), {"kernel_size": 3, "stride": (1, 2), "dilation": (1, 2)}),
        (4, 4, (40, 41), {"kernel_size": 3, "stride": (2, 1), "padding": (4, 5)}),
        (1500, 3, (2, 3), {"kernel_size": 1}),
        (1500, 1500, (2, 3), {"kernel_size": 2, "padding": 1}),
        (6, 2, (40, 41), {"kernel_size": 1}),
    ],
)
@pytest.mark.parametrize("operator", ["tanh_cosine", "mix_square_cosine", "ball_sigmoid"])
def test_images_and_widths_beyond_one_block(operator, channels, groups, size, geometry, memory_format, monkeypatch):
    torch.manual_seed(0)
    config = {"name": operator, "radius": 2.0, "radius_mode": "learned"}
    layer = DecoupledConv2d(channels, channels, groups=groups, operator=config, dtype=torch.float64, **geometry)
    images = torch.randn(2, channels, *size, dtype=torch.float64).contiguous(memory_format=memory_format)
    assert kernels.covers(images)
    looped, plain = both_ways(monkeypatch, lambda: outcome(layer, images))
    torch.testing.assert_close(looped, plain, rtol=1e-9, atol=1e-11)


@needs_a_compiler
@pytest.mark.parametrize("groups", [1, 4, 16])
@pytest.mark.parametrize("operator", ["tanh_cosine", "mix_square_cosine", "ball_linear"])
def test_gradients_in_bfloat16_are_as_near_with_loops_as_without(operator, groups, monkeypatch):
    monkeypatch.setattr(functional, "SLOW_ON_CPUS", frozenset())
    torch.manual_seed(0)
    layer = DecoupledConv2d(
        16,
        16,
        3,
        groups=groups,
        operator={"name": operator, "radius_mode": "learned", "radius": 3.5 if groups == 16 else 12.0 / groups**0.5},
    )
    images = torch.randn(2, 16, 12, 12)
    looped, plain = both_ways(monkeypatch, lambda: outcome(layer, images.bfloat16(), torch.bfloat16))
    exact = outcome(layer.double(), images.bfloat16().double())
    for name, value in exact.items():
        errors = [(found[name].double() - value).norm() / value.norm() for found in (looped, plain)]
        assert errors[0] <= max(1.1 * errors[1], 2**-7), name


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"bias": torch.zeros(5)}, "bias must be one number for each of 6 filters, got shape \\(5,\\)"),
        ({"magnitude": MAGNITUDES["tanh"](radius_mode="learned_per_channel", channels=4)}, "one for each of 6 filters"),
    ],
    ids=["bias", "radius"],
)
def test_constants_of_another_number_than_the_filters_are_refused(arguments, message):
    settings = {"magnitude": MAGNITUDES["tanh"](), "angular": ANGULARS["linear"], **arguments}
    with pytest.raises(ValueError, match=message):
        decoupled_conv2d(torch.randn(1, 4, 5, 5), torch.randn(6, 4, 3, 3), **settings)


def test_a_bias_with_gaps_in_memory_is_read_as_it_is():
    bias, images, weight = torch.randn(12)[::2], torch.randn(1, 4, 5, 5), torch.randn(6, 4, 3, 3)
    for angular in (ANGULARS["cosine"], ANGULARS["linear"]):
        settings = {"magnitude": MAGNITUDES["tanh"](), "angular": angular}
        answers = [decoupled_conv2d(images, weight, constant, **settings) for constant in (bias, bias.clone())]
        torch.testing.assert_close(*answers, rtol=0, atol=0)


def test_groups_that_do_not_divide_the_channels_are_refused():
    with pytest.raises(ValueError, match="8 channels do not make 3 groups"):
        patch_norm(torch.randn(1, 8, 5, 5), 3, groups=3)


@pytest.mark.parametrize("operator", ["tanh_cosine", "log_sigmoid"])
def test_a_compiled_depthwise_layer_is_the_eager_one(operator):
    """The compiler's loops in place of ours, with gradients."""
    torch.compiler.reset()
    config = {"name": operator, "weighting": "tanh", "radius_mode": "learned"}
    layer = DecoupledConv2d(8, 8, 3, stride=2, padding=1, groups=8, operator=config)
    images = torch.randn(2, 8, 9, 9).contiguous(memory_format=torch.channels_last)
    expected = outcome(layer, images)
    layer.compile(fullgraph=True)
    torch.testing.assert_close(outcome(layer, images), expected, rtol=1e-4, atol=1e-5)
