"""``zoo.explain``: contributions and bias are those of the definition, add up to the logit, and leave no trace."""

import copy
import re
import threading
from functools import partial
from itertools import product

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

import zoo
from operators import (
    ANGULARS,
    MAGNITUDES,
    WEIGHTINGS,
    DecoupledConv2d,
    OperatorConfig,
    convert_decoupled,
    decoupled_conv2d,
    fold,
    gradient_parts,
    linear_map,
)
from operators.signal import RULES, Signal
from tests.command_line import run  # noqa: F401
from tests.reference import reference_conv, reference_patches
from zoo.commands.console import main
from zoo.explanations.layer_maps import recording_signals
from zoo.explanations.picture import explain_image

OPERATORS = [f"{magnitude}_{angular}" for magnitude in MAGNITUDES for angular in ANGULARS]
TIMM = ["resnet18", "tf_efficientnet_lite0", "mobilenetv3_small_100", "convnextv2_atto", "regnety_002", "test_nfnet"]


@pytest.fixture(scope="module")
def sphere():
    return zoo.load("cifar10_resnet20_sphere_cosine")


def images_for(model, count=3):
    size, channels = model.spec.input_size, model.spec.in_chans
    return torch.rand(count, channels, size, size, generator=torch.Generator().manual_seed(0))


def completeness(explanation):
    total = explanation.contributions.double().sum((1, 2, 3)) + explanation.bias.double()
    return ((total - explanation.logit) / explanation.logits.abs().amax(1)).abs().max().item()


@pytest.mark.parametrize("name", zoo.list_checkpoints())
def test_contributions_and_bias_of_every_checkpoint_add_up(name):
    model = zoo.load(name)
    images = images_for(model)
    explanation = zoo.explain(model, images)
    assert completeness(explanation) < 1e-5
    assert explanation.contributions.shape == images.shape and explanation.contributions.dtype == torch.float32
    with torch.no_grad():
        assert torch.equal(explanation.logits, model(images))
    assert torch.equal(explanation.target, explanation.logits.argmax(1))


@pytest.mark.parametrize("architecture", TIMM)
@pytest.mark.parametrize("operator", [None, "tanh_cosine", "sphere_square_cosine"])
def test_contributions_of_converted_and_plain_timm_networks_add_up(architecture, operator):
    torch.manual_seed(0)
    model = timm.create_model(architecture, num_classes=5)
    if operator:
        convert_decoupled(model, operator)
    # Fresh BatchNorms and classifiers have no shift that could be forgotten.
    with torch.no_grad():
        for module in model.modules():
            if getattr(module, "bias", None) is not None:
                module.bias.normal_(0, 0.1)
    explanation = zoo.explain(model, torch.randn(2, 3, 96, 96), target=[1, 4])
    assert completeness(explanation) < 1e-5 and explanation.target.tolist() == [1, 4]


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_a_layer_is_the_linear_map_of_the_definition(operator, weighting):
    magnitude, _, angular = operator.partition("_")
    settings = {"magnitude": magnitude, "angular": angular, "weighting": weighting, "radius": 1.3, "beta": 0.4}
    torch.manual_seed(0)
    layer = DecoupledConv2d(4, 6, 3, stride=2, padding=1, groups=2, operator=OperatorConfig(**settings)).double()
    x, one = torch.randn(1, 4, 5, 5).double().requires_grad_(), torch.ones(1).double().requires_grad_()
    answer = layer(Signal.of(x, one)).as_subclass(torch.Tensor)
    w, bias = layer.weight.detach().numpy(), layer.bias.detach().numpy()
    truth = reference_conv(x.detach(), w, stride=2, padding=1, groups=2, **settings)
    patches = reference_patches(x.detach(), (3, 3), 2, 1, 1, "zeros")
    for k, row, column in product(range(6), range(3), range(3)):
        first = k // 3 * 2
        patch = patches[0, row, column, first : first + 2]
        # y = a <w, x>, so the map's row is a w at the place of the patch.
        expected = torch.zeros(1, 4, 7, 7).double()
        factor = truth[0, k, row, column] / (patch * w[k]).sum()
        expected[0, first : first + 2, 2 * row : 2 * row + 3, 2 * column : 2 * column + 3] = torch.from_numpy(
            factor * w[k]
        )
        row_of_map, of_one = torch.autograd.grad(answer[0, k, row, column], [x, one], retain_graph=True)
        # The definition's linear and sigmoid are scaled off the ends by 1e-6.
        assert torch.allclose(row_of_map, expected[..., 1:-1, 1:-1], rtol=3e-6, atol=1e-9)
        assert of_one.item() == pytest.approx(bias[k])


@pytest.mark.parametrize("name", ["cifar10_resnet20_conv", "mnist_cnn6_conv"])
def test_a_plain_network_is_explained_by_gradient_times_input(name):
    model = zoo.load(name)
    images = images_for(model).requires_grad_()
    explanation = zoo.explain(model, images, 3)
    gradient = torch.autograd.grad(model(images)[:, 3].sum(), images)[0]
    expected = gradient * (images - model.mean)
    assert torch.allclose(explanation.contributions, expected, atol=1e-5 * expected.abs().max().item())


def test_linear_convolutions_are_explained_as_plain_ones():
    plain = zoo.load("mnist_cnn6_conv")
    images, decoupled = images_for(plain), copy.deepcopy(plain)
    convert_decoupled(decoupled.network, OperatorConfig("linear", "cosine", weighting="linear", eps=1e-12))
    first, second = zoo.explain(plain, images), zoo.explain(decoupled, images)
    assert torch.allclose(first.contributions, second.contributions, atol=1e-4)
    assert torch.allclose(first.bias, second.bias, atol=1e-3)


def test_what_an_activation_says_of_nothing_is_bias():
    """A pixel of almost nothing contributes almost nothing, whatever the activation adds."""
    x, one = torch.full((1, 1), 1e-7).requires_grad_(), torch.ones(1).requires_grad_()
    answer = F.hardtanh(Signal.of(x, one), 0.2, 0.6).as_subclass(torch.Tensor)
    weight, bias = torch.autograd.grad(answer.sum(), [x, one])
    assert (weight * x).abs().item() < 1e-6 and bias.item() == pytest.approx(0.2)


BENT = [nn.SiLU, nn.GELU, nn.Hardswish, nn.Mish, nn.ReLU6, nn.ELU, nn.CELU, nn.SELU, nn.Tanh, nn.ReLU, nn.Softsign]
BENT += [partial(nn.LeakyReLU, 0.1), partial(nn.GELU, approximate="tanh"), nn.PReLU, partial(nn.Hardtanh, -2, 2)]


@pytest.mark.parametrize("activation", BENT, ids=str)
def test_an_activation_multiplies_its_input(activation):
    layer = activation()
    x = torch.tensor([[-9.0, -1.5, -1e-6, 0.0, 1e-6, 0.7, 9.0]]).requires_grad_()
    answer = layer(Signal.of(x, torch.ones(1)))
    slopes = torch.autograd.grad(answer.as_subclass(torch.Tensor).sum(), x)[0]
    assert torch.allclose(slopes * x, layer(x), rtol=1e-6, atol=1e-12)


class Apply(nn.Module):
    def __init__(self, function, name=""):
        super().__init__()
        self.function = function
        self.name = name

    def extra_repr(self):
        return self.name

    def forward(self, x):
        return self.function(x)


class GlobalResponseNorm(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.full((4, 1, 1), 0.3)), nn.Parameter(torch.full((4, 1, 1), 0.2))

    def forward(self, x):
        length = x.norm(p=2, dim=(2, 3), keepdim=True)
        return x + torch.addcmul(self.bias, self.weight, x * (length / (length.mean(1, keepdim=True) + 1e-6)))


NORMS = [partial(nn.GroupNorm, 2, 4), partial(nn.LayerNorm, [6, 6]), partial(nn.RMSNorm, [6, 6]), GlobalResponseNorm]
NORMS += [partial(nn.BatchNorm2d, 4), partial(nn.BatchNorm2d, 4, affine=False), partial(nn.AvgPool2d, 2)]
NORMS += [partial(nn.MaxPool2d, 2), partial(nn.AdaptiveMaxPool2d, 2), partial(nn.Upsample, scale_factor=2)]
FUNCTIONS = {
    "gated": lambda x: x * x.mean((2, 3), keepdim=True).sigmoid(),
    "squeeze and excite, in place": lambda x: x.clone().mul_(F.hardsigmoid(x.mean((2, 3), keepdim=True))),
    "attention": lambda x: F.scaled_dot_product_attention(x, x, x),
    "manual attention": lambda x: (x @ x.transpose(2, 3)).softmax(-1) @ x,
    "star": lambda x: x[:, :2] * x[:, 2:],
    "star, in place": lambda x: x[:, :2].clone().mul_(x[:, 2:]),
    "manual norm": lambda x: x / (x.pow(2).mean(1, keepdim=True) + 1e-6).sqrt(),
    "constants": lambda x: 1 - (2 + x) - 0.5,
    "joined": lambda x: torch.cat([x, torch.ones(2, 1, 6, 6)], 1),
    "divided": lambda x: x / x.flatten(1).std(1)[:, None, None, None],
    "moved": lambda x: x.permute(0, 2, 3, 1).flatten(1, 2).mT.roll(1, 2).chunk(2, 1)[0][..., ::2],
    "threshold": lambda x: x.clamp(-0.5, 0.5) + x.abs().amax((2, 3), keepdim=True),
    "bounded away from zero": lambda x: x.clamp(min=0.3) + F.hardtanh(x, 0.2, 0.6) + x.clip(max=-0.1),
    "the larger of two": lambda x: torch.max(x, torch.full((), 0.2)) + torch.minimum(x, x.flip(2)),
    "the first": lambda x: x.max(1, keepdim=True).values - x.min(1, keepdim=True)[0],
}


@pytest.mark.parametrize(
    "function",
    [*(kind() for kind in NORMS), *(Apply(function, name) for name, function in FUNCTIONS.items())],
    ids=str,
)
def test_what_networks_hold_is_linear_for_one_image(function):
    torch.manual_seed(0)
    with torch.no_grad():
        for tensor in (*function.parameters(), *function.buffers()):
            if tensor.is_floating_point():
                tensor.uniform_(0.5, 1.5)
    function.eval()
    x = torch.randn(2, 4, 6, 6).double()
    one = torch.ones(2).double()
    function.double()
    with torch.no_grad():
        truth = function(x)
    answer = function(Signal.of(x.requires_grad_(), one.requires_grad_())).as_subclass(torch.Tensor)
    assert torch.allclose(answer, truth, rtol=1e-9)
    projection = torch.randn(answer.shape).double()
    # By each image: what the map says of it, and of its constants, is what the function answers.
    for image in range(2):
        total = (answer * projection)[image].sum()
        weights, of_one = torch.autograd.grad(total, [x, one], retain_graph=True, allow_unused=True)
        of_one = torch.zeros(2).double() if of_one is None else of_one
        assert ((weights * x).sum() + of_one.sum()).item() == pytest.approx(total.item(), rel=1e-9)
        assert weights[1 - image].abs().max() == 0 and of_one[1 - image] == 0


def test_a_network_without_biases_is_the_whole_logit():
    torch.manual_seed(0)
    model = zoo.build("resnet20", "sphere_cosine", batch_norm_bias=False)
    model(torch.rand(8, 3, 32, 32))
    explanation = zoo.explain(model, torch.rand(2, 3, 32, 32))
    assert explanation.bias.abs().max() == 0 and completeness(explanation) < 1e-5


@pytest.mark.parametrize(
    ("module", "told"),
    [(nn.Softplus(), "1 (Softplus) computes softplus"), (Apply(torch.exp), "1 (Apply) computes exp")],
    ids=str,
)
def test_an_unknown_function_is_named_and_not_guessed(module, told):
    network = nn.Sequential(nn.Conv2d(3, 4, 3), module, nn.AdaptiveAvgPool2d(1), nn.Flatten())
    with pytest.raises(TypeError) as error:
        zoo.explain(network, torch.rand(1, 3, 8, 8))
    assert told in str(error.value) and "RULES" in str(error.value)


def test_batch_statistics_are_refused():
    network = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, track_running_stats=False), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    )
    with pytest.raises(TypeError, match="statistics of the batch"):
        zoo.explain(network, torch.rand(2, 3, 8, 8))


def hidden_exp(x):
    """Return ``exp(x)``, computed where no rule sees it."""
    answer = x.as_subclass(torch.Tensor).exp()
    return Signal.of(answer, x.one) if isinstance(x, Signal) else answer


@pytest.mark.parametrize("count", [1, 2])
def test_contributions_that_do_not_add_up_are_refused(count):
    network = nn.Sequential(nn.Conv2d(3, 4, 3), Apply(hidden_exp), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    with pytest.raises(ArithmeticError, match="differ from the logit by"):
        zoo.explain(network, torch.rand(count, 3, 8, 8))


def assigned(x, value):
    x[:, :1] = value
    return x


@pytest.mark.parametrize(
    ("function", "told"),
    [
        (lambda x: torch.zeros(1, 4, 6, 6).add_(x), "add_, which changes a constant in place"),
        (lambda x: x.clone().index_fill_(1, torch.tensor([0]), 0.5), "index_fill_"),
        (lambda x: assigned(x.clone(), 0.5), "an assignment to a part of a tensor"),
        (lambda x: assigned(torch.zeros(1, 4, 6, 6), x[:, :1]), "an assignment to a part of a tensor"),
        (lambda x: torch.pow(2.0, x), "a power whose exponent is a tensor"),
    ],
    ids=["constant in place", "fill", "assigned constant", "assigned signal", "exponent"],
)
def test_what_would_be_lost_is_named(function, told):
    network = nn.Sequential(nn.Conv2d(3, 4, 3), Apply(function), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    with pytest.raises(TypeError, match=told):
        zoo.explain(network, torch.rand(1, 3, 8, 8))


def windows(x):
    """Return the mean of the halves of each image, which were images of their own and changed meanwhile."""
    return x.unflatten(3, (2, -1)).permute(0, 3, 1, 2, 4).flatten(0, 1).add(1).unflatten(0, (-1, 2)).mean(1)


def doubled(x):
    """Return the mean of each image and its mirror image, which stand in another order than windows."""
    return torch.cat([x, x.flip(3)]).add(1).unflatten(0, (2, -1)).mean(0)


@pytest.mark.parametrize("function", [windows, doubled])
def test_a_network_that_mixes_rows_is_explained_image_by_image(function):
    torch.manual_seed(0)
    network = nn.Sequential(DecoupledConv2d(3, 4, 3, padding=1), Apply(function), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    images = torch.rand(3, 3, 8, 8)
    together = zoo.explain(network, images, layers=["0"])
    assert completeness(together) < 1e-5 and together.bias.abs().min() > 0.1
    for place in range(3):
        alone = zoo.explain(network, images[place : place + 1], together.target[place].item(), layers=["0"])
        assert torch.allclose(alone.bias, together.bias[place : place + 1], rtol=1e-4)
        assert torch.allclose(alone.layers["0"].angular[0], together.layers["0"].angular[place], atol=1e-5)


def test_a_first_layer_in_place_changes_no_images_of_the_caller():
    network = nn.Sequential(Apply(lambda x: x.mul_(0.5)), nn.ReLU(inplace=True), nn.Conv2d(3, 4, 8), nn.Flatten())
    images = torch.rand(2, 3, 8, 8)
    before = images.clone()
    assert completeness(zoo.explain(network, images)) < 1e-5
    assert torch.equal(images, before)


def test_explain_works_in_inference_mode(sphere):
    expected = zoo.explain(sphere, images_for(sphere))
    with torch.inference_mode():
        found = zoo.explain(sphere, images_for(sphere))
    assert torch.equal(found.contributions, expected.contributions)


class WithSpare(nn.Module):
    def __init__(self):
        super().__init__()
        self.used, self.spare = DecoupledConv2d(3, 4, 8), DecoupledConv2d(3, 4, 8)

    def forward(self, x):
        return self.used(x).flatten(1)


def test_layers_that_are_not_used_are_told():
    with pytest.raises(ValueError, match="does not use its layers spare"):
        zoo.explain(WithSpare(), torch.rand(1, 3, 8, 8), layers=["spare", "used"])


def test_other_threads_may_use_the_network_meanwhile(sphere):
    images, failures, done = images_for(sphere), [], threading.Event()
    with torch.no_grad():
        expected = sphere(images)

    def use():
        try:
            with torch.no_grad():
                while not done.is_set():
                    assert torch.allclose(sphere(images), expected, atol=1e-4)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=use)]
    explained = []
    threads += [
        threading.Thread(target=lambda: explained.append(zoo.explain(sphere, images, layers=["conv1"])))
        for _ in range(4)
    ]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads[1:]]
    done.set()
    threads[0].join()
    assert not failures and len(explained) == 4
    first = explained[0].layers["conv1"].angular
    assert first.min() > 0 and all(torch.allclose(each.layers["conv1"].angular, first, rtol=1e-3) for each in explained)


def test_probabilities_are_no_logits():
    network = nn.Sequential(nn.Conv2d(3, 4, 8), nn.Flatten(), nn.Softmax(1))
    with pytest.raises(TypeError, match="explain takes logits"):
        zoo.explain(network, torch.rand(1, 3, 8, 8))


def test_nothing_of_a_model_is_changed(sphere):
    model = copy.deepcopy(sphere).train()
    model.network.bn1.eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    images = images_for(model)

    def check():
        assert [module.training for module in model.modules()] == modes
        assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
        assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())
        assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
        assert not images.requires_grad and not any("forward" in vars(module) for module in model.modules())

    zoo.explain(model, images, layers=["conv1"])
    check()
    with pytest.raises(ValueError):
        zoo.explain(model, images * 9, layers=["conv1"])
    check()
    model.network.act1 = nn.Softplus()
    modes = [module.training for module in model.modules()]
    with pytest.raises(TypeError):
        zoo.explain(model, images, layers=["conv1"])
    check()


def test_an_image_is_explained_alike_in_any_batch_and_thread(sphere):
    images = images_for(sphere, 4)
    together = zoo.explain(sphere, images)
    found = {}

    def work(place):
        found[place] = zoo.explain(sphere, images[place : place + 1])

    threads = [threading.Thread(target=work, args=(place,)) for place in range(4)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    largest = together.contributions.abs().max().item()
    for place in range(4):
        assert torch.allclose(found[place].contributions[0], together.contributions[place], atol=1e-4 * largest)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_explained_in_float32(dtype, sphere):
    images = images_for(sphere).to(dtype)
    half = copy.deepcopy(sphere).to(dtype)
    explanation = zoo.explain(half, images)
    assert explanation.contributions.dtype == explanation.logits.dtype == torch.float32
    assert completeness(explanation) < 1e-5 and half.network.conv1.weight.dtype == dtype
    expected = zoo.explain(sphere, images.float())
    with torch.autocast("cpu", torch.bfloat16):
        found = zoo.explain(sphere, images.float())
    assert torch.equal(found.logits, expected.logits) and torch.equal(found.contributions, expected.contributions)


def test_float64_stays(sphere):
    explanation = zoo.explain(copy.deepcopy(sphere).double(), images_for(sphere))
    assert explanation.contributions.dtype == torch.float64 and completeness(explanation) < 1e-12


def test_classes_are_told_by_name_or_index(sphere):
    images = images_for(sphere, 2)
    for target in ("cat", 3, [3, "cat"], torch.tensor([3, 3]), ("cat", 3), np.int64(3), [np.int64(3), 3]):
        assert zoo.explain(sphere, images, target).target.tolist() == [3, 3]
    with pytest.raises(ValueError, match="unknown class 'cst'. Did you mean 'cat'"):
        zoo.explain(sphere, images, "cst")
    for wrong in (10, -1, True, 1.5, [3, 99], [3, None]):
        with pytest.raises(ValueError, match="a class is an index from 0 to 9 or a name, got"):
            zoo.explain(sphere, images, wrong)
    with pytest.raises(ValueError, match="one for each of 2 images, got 3"):
        zoo.explain(sphere, images, [1, 2, 3])
    with pytest.raises(ValueError, match="give 'cat' as an index"):
        zoo.explain(sphere.network, images, "cat")


def test_other_networks_than_these_are_refused_with_what_to_use_instead(sphere):
    images = images_for(sphere, 1)
    exported = torch.export.export(sphere, (images,))
    in_part = copy.deepcopy(sphere)
    next(in_part.network.children()).compile()
    for model, told in (
        (torch.compile(sphere), "before torch.compile"),
        (nn.Sequential(torch.compile(sphere)), "before torch.compile"),
        (in_part, "before torch.compile"),
        (fold(sphere)[0], "before operators.fold"),
        (exported, "before torch.export"),
        (exported.module(), "before it was exported"),
        ("cifar10_resnet20_conv", "takes a network, got str"),
        (nn.Flatten(), "no parameters"),
    ):
        with pytest.raises(TypeError, match=told):
            zoo.explain(model, images)


@pytest.mark.parametrize(
    ("images", "told"),
    [
        (np.zeros((1, 3, 32, 32), np.float32), "got ndarray"),
        (torch.zeros(1, 3, 32, 32, dtype=torch.uint8), "got torch.uint8"),
        (torch.zeros(3, 32, 32), r"got \(3, 32, 32\)"),
        (torch.zeros(0, 3, 32, 32), "at least one image"),
        (torch.full((1, 3, 32, 32), 9.0), r"must be in \[0, 1\]"),
    ],
    ids=["array", "bytes", "single", "none", "range"],
)
def test_wrong_images_are_refused(images, told, sphere):
    with pytest.raises((TypeError, ValueError), match=told):
        zoo.explain(sphere, images)


@pytest.mark.parametrize("groups", [1, 2])
def test_layer_maps_are_those_of_the_definition(groups):
    torch.manual_seed(0)
    operator = OperatorConfig("tanh", "square_cosine", weighting="linear", radius=1.5)
    layer = DecoupledConv2d(4, 6, 3, stride=2, padding=1, groups=groups, operator=operator)
    network = nn.Sequential(layer, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 3)).double()
    images = torch.randn(2, 4, 8, 8).double()
    maps = zoo.explain(network, images, [0, 2], layers=["0"]).layers["0"]
    w = layer.weight.detach()
    length = (w.square().sum((1, 2, 3)) + 1e-4).sqrt()
    x = F.unfold(images, 3, padding=1, stride=2).view(2, groups, -1, 16)
    n = (x.square().sum(2) + 1e-4).sqrt()
    filters = (w.flatten(1) / length[:, None]).view(groups, 6 // groups, -1)
    cosines = (torch.einsum("gkd,ngdl->ngkl", filters, x) / n[:, :, None]).flatten(1, 2)
    h = (torch.tanh(n / 1.5)[:, :, None] * length.view(groups, -1, 1)).flatten(1, 2)
    # By the average pooling, the logit changes by the classifier's weight over 16 positions.
    matters = network[3].weight.detach()[[0, 2]].abs().unsqueeze(2) / 16
    expected = {"norm": n.mean(1), "magnitude": (matters * h).sum(1), "angular": (matters * cosines.square()).sum(1)}
    for name, values in expected.items():
        enlarged = F.interpolate(values.view(2, 1, 4, 4), (8, 8), mode="bilinear")[:, 0]
        assert torch.allclose(getattr(maps, name), enlarged, rtol=1e-8), name


def test_layers_are_told_by_their_names(sphere):
    maps = zoo.explain(sphere, images_for(sphere, 2), layers=["blocks.3.conv1", "conv1"]).layers
    assert list(maps) == ["blocks.3.conv1", "conv1"] and maps["conv1"].norm.shape == (2, 32, 32)
    with pytest.raises(ValueError, match="unknown decoupled layer 'conv9'"):
        zoo.explain(sphere, images_for(sphere, 2), layers=["conv9"])


def test_a_recorded_layer_has_the_gradient_of_the_logit():
    torch.manual_seed(0)
    network = nn.Sequential(DecoupledConv2d(2, 3, 3, operator="tanh_cosine"), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    x, one = torch.randn(1, 2, 6, 6).requires_grad_(), torch.ones(1).requires_grad_()
    with recording_signals({"conv": network[0]}, one) as found:
        answer = network(Signal.of(x, one)).as_subclass(torch.Tensor)
    gradient = torch.autograd.grad(answer[0, 1], found["conv"].output)[0]
    assert torch.allclose(gradient[0, 1], torch.full((4, 4), 1 / 16)) and gradient[0, [0, 2]].abs().max() == 0


@pytest.mark.parametrize("operator", OPERATORS)
def test_the_gradient_has_a_part_along_the_patch_and_one_across_it(operator):
    magnitude, _, angular = operator.partition("_")
    config = OperatorConfig(magnitude, angular, weighting="linear", radius=2.0, eps=1e-12)
    torch.manual_seed(0)
    layer = DecoupledConv2d(3, 5, 3, operator=config).double()
    patches = torch.randn(7, 3, 3, 3).double()
    along, across = gradient_parts(layer, patches)
    x = patches.clone().requires_grad_()
    settings = {"magnitude": layer.magnitude, "angular": layer.angular, "eps": 1e-12}
    for k in range(5):
        answer = decoupled_conv2d(x, layer.weight, **settings)[:, k].sum()
        gradient = torch.autograd.grad(answer, x)[0]
        assert torch.allclose(along[:, k] + across[:, k], gradient, rtol=1e-9, atol=1e-12)
        lengths = along[:, k].flatten(1).norm(dim=1) * across[:, k].flatten(1).norm(dim=1)
        assert (along[:, k] * across[:, k]).sum((1, 2, 3)).abs().max() <= 1e-11 * (1 + lengths.max())
    if magnitude == "sphere":
        # By Euler's theorem: an answer that does not depend on the norm has no gradient along the patch.
        assert along.abs().max() < 1e-15 * across.abs().max()
    with pytest.raises(ValueError, match="patches must be"):
        gradient_parts(layer, patches[:, :2])


def test_the_command_draws_what_it_prints(run, tmp_path):  # noqa: F811
    for name, colour in (("light", (250, 220, 90)), ("dark", (10, 40, 60))):
        image = Image.effect_noise((50, 40), 90).convert("RGB")
        Image.blend(image, Image.new("RGB", image.size, colour), 0.5).save(tmp_path / f"{name}.png")
    words = ["explain", "cifar10_resnet20_sphere_cosine", "light.png", "dark.png", "--twin", "--output", "out/why.png"]
    status, printed, errors = run(*words, main=main)
    assert status == 0, errors
    lines = printed.splitlines()
    assert len(lines) == 9 and lines[-1] == "picture: out/why.png"
    assert [line.split(",")[0].split(" by ")[0] for line in lines[:8]] == ["light.png"] * 4 + ["dark.png"] * 4
    for line in lines[:8]:
        logit, pixels, bias = (float(number) for number in re.findall(r"-?\d+\.\d\d", line))
        assert logit == pytest.approx(pixels + bias, abs=0.02)
    with Image.open("out/why.png") as picture:
        # Four rows of three square pictures.
        assert picture.height > 1.2 * picture.width
    model = zoo.load("cifar10_resnet20_sphere_cosine")
    best, probability = model.classify("light.png", top=1)[0]
    assert f"sphere_cosine: {best}, logit" in lines[0]


@pytest.mark.parametrize("target", ["truck", "9"])
def test_the_other_class_is_named_or_numbered(target, run, tmp_path):  # noqa: F811
    Image.effect_noise((32, 32), 90).convert("RGB").save(tmp_path / "y.png")
    status, printed, errors = run("explain", "cifar10_resnet20_sphere_cosine", "y.png", "--target", target, main=main)
    assert status == 0, errors
    assert "sphere_cosine: truck, logit" in printed.splitlines()[1]


def test_the_likeliest_class_is_not_drawn_twice(sphere):
    image = images_for(sphere, 1)[0]
    first, second = (name for name, _ in sphere.classify(image, top=2))
    names = [name for name, *_ in explain_image("", "", sphere, image, first).sums()]
    assert names == [first, second]


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["cifar10_resnet20_sphere", "x.png"], "Did you mean 'cifar10_resnet20_sphere_cosine'"),
        (["cifar10_resnet20_sphere_cosine", "nothing.png"], "no image file nothing.png"),
        (["cifar10_resnet20_sphere_cosine", "x.png"], "x.png"),
        (["cifar10_resnet20_sphere_cosine", "y.png", "--target", "cta"], "unknown class 'cta'. Did you mean 'cat'"),
        (["cifar10_resnet20_conv", "y.png", "--twin"], "is plain itself"),
        (["cifar10_resnet20_sphere_cosine", "y.png", "--twin", "cifar10"], "unknown checkpoint 'cifar10'"),
        (["cifar10_resnet20_sphere_cosine", "y.png", "--target", "10"], "unknown class '10'"),
        (["cifar10_resnet20_sphere_cosine", "y.png", "--twin", "digits_cnn6_conv"], "has other classes"),
        (["cifar10_resnet20_sphere_cosine", "y.png", "--output", "out"], "ends in .png, got out"),
        (["cifar10_resnet20_sphere_cosine", "y.png", "--ouput", "z.png"], "unknown argument '--ouput'"),
    ],
    ids=["name", "no file", "text", "class", "plain", "twin", "number", "other classes", "output", "option"],
)
def test_wrong_words_are_told_and_nothing_is_drawn(words, told, run, tmp_path):  # noqa: F811
    (tmp_path / "x.png").write_text("no image")
    Image.new("RGB", (32, 32)).save(tmp_path / "y.png")
    status, _, errors = run("explain", *words, main=main)
    assert status == 1 and told in errors and "Traceback" not in errors
    assert not (tmp_path / "outputs").exists()


def test_every_name_of_a_rule_stands_for_a_function():
    names = [name for names in linear_map.NAMES.values() for name in names.split()]
    assert len(names) == len(set(names)) and decoupled_conv2d in RULES
    for name in names:
        assert linear_map.functions_of(name), name


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("name", ["cifar10_resnet20_sphere_cosine", "cifar10_resnet20_conv"])
def test_a_gpu_explains_alike(name):
    model = zoo.load(name)
    images = images_for(model)
    expected = zoo.explain(model, images)
    found = zoo.explain(model.cuda(), images)
    assert found.contributions.is_cuda and completeness(found) < 1e-5
    largest = expected.contributions.abs().max().item()
    assert torch.allclose(found.contributions.cpu(), expected.contributions, atol=1e-3 * largest)
