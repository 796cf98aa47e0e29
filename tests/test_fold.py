"""Folding: the answers stay, BatchNorm goes where it can, the report says why where it cannot."""

import copy

import pytest
import timm
import torch
from torch import nn

import zoo
from operators import ANGULARS, MAGNITUDES, WEIGHTINGS, DecoupledConv2d, OperatorConfig, convert_decoupled, fold
from operators.fold import FoldedConv2d

OPERATORS = [f"{magnitude}_{angular}" for magnitude in MAGNITUDES for angular in ANGULARS]


def train_a_little(network, shape):
    """Give every BatchNorm and running norm statistics of their own, and every affine parameter a value of its own."""
    torch.manual_seed(0)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d) and module.affine:
            nn.init.uniform_(module.weight, -1.5, 1.5)
            nn.init.normal_(module.bias)
    network.train()
    with torch.no_grad():
        for _ in range(3):
            network(torch.rand(shape, dtype=next(network.parameters()).dtype) * 1.4 - 0.2)
    return network.eval()


def check_fold(network, shape, tolerance=1e-5):
    """Fold a trained copy of ``network`` and compare the answers, relative to the largest; return model and report."""
    network = train_a_little(network, shape)
    state = copy.deepcopy(network.state_dict())
    folded, report = fold(network)
    torch.manual_seed(1)
    images = torch.rand(shape, dtype=next(network.parameters()).dtype)
    with torch.no_grad():
        expected, answer = network(images), folded(images)
    assert (answer - expected).abs().max() <= tolerance * expected.abs().max()
    torch.testing.assert_close(network.state_dict(), state, rtol=0, atol=0)
    assert not any(isinstance(module, DecoupledConv2d) for module in folded.modules())
    assert not folded.training and not any(parameter.requires_grad for parameter in folded.parameters())
    return folded, report


def conv_and_norm(operator, *, bias=True, norm=None, dtype=torch.float64, **arguments):
    torch.manual_seed(0)
    layer = DecoupledConv2d(4, 6, 3, bias=bias, operator=operator, **arguments)
    return nn.Sequential(layer, norm or nn.BatchNorm2d(6), nn.ReLU()).to(dtype)


@pytest.mark.parametrize("weighting", WEIGHTINGS)
@pytest.mark.parametrize("operator", OPERATORS)
def test_every_operator(operator, weighting):
    for bias in (True, False):
        network = conv_and_norm({"name": operator, "weighting": weighting}, bias=bias)
        folded, report = check_fold(network, (3, 4, 6, 7), tolerance=1e-12)
        (layer,) = report.layers
        assert layer.norm == "1" and isinstance(folded[1], nn.Identity)


@pytest.mark.parametrize("operator", OPERATORS)
def test_every_operator_in_single_precision(operator):
    check_fold(conv_and_norm(operator, dtype=torch.float32), (3, 4, 6, 7))


@pytest.mark.parametrize("angular", ["cosine", "power"])
@pytest.mark.parametrize("geometry", [{"groups": 2, "stride": 2}, {"padding": 2, "padding_mode": "circular"}], ids=str)
def test_geometries_and_a_relative_radius(geometry, angular):
    operator = OperatorConfig("tanh", angular, radius_mode="learned_per_channel", radius_relative=True)
    folded, _ = check_fold(conv_and_norm(operator, **geometry), (3, 4, 6, 7), tolerance=1e-12)
    before = copy.deepcopy(folded.state_dict())
    folded.train()(torch.rand(3, 4, 6, 7, dtype=torch.float64))
    torch.testing.assert_close(folded.state_dict(), before, rtol=0, atol=0)


@pytest.mark.parametrize("norm", [nn.BatchNorm2d(6, affine=False), nn.BatchNorm2d(6, eps=0.1, momentum=None)], ids=str)
def test_every_kind_of_batch_norm(norm):
    for operator in ("log_cosine", "sphere_linear"):
        check_fold(conv_and_norm(operator, norm=copy.deepcopy(norm)), (3, 4, 6, 7), tolerance=1e-12)


def test_linear_cosine_becomes_a_plain_convolution():
    folded, _ = check_fold(conv_and_norm("linear_cosine"), (3, 4, 6, 7), tolerance=1e-12)
    assert type(folded[0]) is nn.Conv2d
    assert set(folded.state_dict()) == {"0.weight", "0.bias"}


@pytest.mark.parametrize("operator", ["tanh_cosine", "linear_square_cosine"])
@pytest.mark.parametrize("architecture", zoo.list_architectures(own=True))
def test_every_architecture(architecture, operator):
    """All decoupled convolutions of ours stand before a BatchNorm, if any; the model's own checks cannot be traced."""
    model = zoo.build(architecture, operator, input_size=64 if architecture == "resnet18_modified" else 32)
    _, report = check_fold(model, (2, 3, 64, 64) if architecture == "resnet18_modified" else (2, 3, 32, 32))
    normalised = any(isinstance(module, nn.BatchNorm2d) for module in model.modules())
    assert all(bool(layer.norm) == normalised for layer in report.layers), str(report)
    assert normalised == (architecture != "cnn9_no_batchnorm")


def test_a_network_of_timm():
    model, _ = convert_decoupled(timm.create_model("resnet18", num_classes=3), "sphere_cosine")
    folded, report = check_fold(model, (2, 3, 64, 64))
    assert len(report.layers) == sum(bool(layer.norm) for layer in report.layers) == 20
    assert not any(isinstance(module, nn.BatchNorm2d) for module in folded.modules())
    assert str(report).startswith("20 convolutions folded, 20 with the BatchNorm that follows\n  conv1 ")


class Untraceable(nn.Module):
    def __init__(self, body):
        super().__init__()
        self.body = body

    def forward(self, images):
        if images.mean() > 1e6:
            raise ValueError("too bright")
        return self.body(images)


class Branching(nn.Module):
    """A convolution whose answer goes to a BatchNorm and past it."""

    def __init__(self):
        super().__init__()
        self.conv = DecoupledConv2d(4, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)

    def forward(self, images):
        answer = self.conv(images)
        return self.norm(answer) + answer


class Repeating(Branching):
    def forward(self, images):
        return self.norm(self.conv(self.norm(self.conv(images))))


class SharedNorm(Branching):
    def forward(self, images):
        return self.norm(self.norm(self.conv(images)))


class SharedBetweenParts(nn.Module):
    """A BatchNorm with two names, of which only the second is called."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm2d(4)
        self.body = nn.Sequential(DecoupledConv2d(4, 4, 3), self.norm)

    def forward(self, images):
        return self.body(images)


class Optional(Branching):
    """What stands between convolution and BatchNorm depends on an argument with a default."""

    def forward(self, images, shift=None):
        answer = self.conv(images)
        return self.norm(answer.relu() if shift is None else answer + shift)


def hooked(place):
    network = nn.Sequential(DecoupledConv2d(4, 4, 3), nn.BatchNorm2d(4))
    network[place].register_forward_hook(lambda module, inputs, output: output * 2)
    return network


def tied():
    layer = DecoupledConv2d(4, 4, 3)
    return nn.Sequential(layer, nn.BatchNorm2d(4), layer, nn.BatchNorm2d(4))


KEPT = {
    "no BatchNorm alone follows it": lambda: nn.Sequential(DecoupledConv2d(4, 4, 3), nn.ReLU(), nn.BatchNorm2d(4)),
    "no BatchNorm alone follows": Branching,
    "used several times": Repeating,
    "norm is used several times": SharedNorm,
    "1 has hooks": lambda: hooked(1),
    "it has hooks": lambda: hooked(0),
    "norm is used in several places": SharedBetweenParts,
    "no BatchNorm alone": Optional,
    "used in several places": tied,
    "cannot be traced": lambda: Untraceable(DecoupledConv2d(4, 4, 3)),
    "no running statistics": lambda: nn.Sequential(
        DecoupledConv2d(4, 4, 3), nn.BatchNorm2d(4, track_running_stats=False)
    ),
    "does more than normalise": lambda: nn.Sequential(DecoupledConv2d(4, 4, 3), timm.layers.BatchNormAct2d(4)),
}


@pytest.mark.parametrize("reason", KEPT)
def test_what_cannot_be_folded_is_kept_and_reported(reason):
    folded, report = check_fold(KEPT[reason]().double(), (3, 4, 8, 8), tolerance=1e-12)
    assert [layer.norm for layer in report.layers] == [""]
    assert reason in report.layers[0].reason and reason in str(report)
    assert any(isinstance(module, nn.BatchNorm2d) for module in folded.modules()) == (reason != "cannot be traced")


def test_the_parts_of_an_untraceable_network_are_folded():
    folded, report = check_fold(Untraceable(conv_and_norm("ball_cosine")), (3, 4, 8, 8), tolerance=1e-12)
    assert [layer.norm for layer in report.layers] == ["body.1"]
    assert isinstance(folded.body[0], FoldedConv2d)


class CalledInParts(Untraceable):
    def forward(self, images):
        if images.mean() > 1e6:
            raise ValueError("too bright")
        answer = self.body[0](images)
        return self.body[1](answer) + answer


def test_an_example_shows_where_folding_went_wrong():
    images = torch.rand(2, 4, 8, 8, dtype=torch.float64)
    fold(train_a_little(Untraceable(conv_and_norm("ball_cosine")), images.shape), example=images)
    with pytest.raises(ValueError, match="answers differ by .* probably not called as a whole"):
        fold(train_a_little(CalledInParts(conv_and_norm("ball_cosine")), images.shape), example=images)


def test_pre_hooks_are_refused():
    network = conv_and_norm("ball_cosine")
    network[0].register_forward_pre_hook(lambda module, inputs: None)
    with pytest.raises(ValueError, match="0 has pre-hooks, which may make its filters anew"):
        fold(network)


def test_a_folded_network_survives_copies_compilers_and_exporters():
    network = train_a_little(conv_and_norm("tanh_square_cosine", dtype=torch.float32), (3, 4, 6, 7))
    folded, _ = fold(network)
    images = torch.rand(3, 4, 6, 7)
    expected = network(images)
    program = torch.export.export(folded, (images,))
    compiled = torch.compile(folded, backend="aot_eager", fullgraph=True)
    for other in (copy.deepcopy(folded), program.module(), compiled):
        torch.testing.assert_close(other(images), expected, rtol=1e-5, atol=1e-5)
    other, _ = fold(train_a_little(conv_and_norm("tanh_square_cosine", dtype=torch.float32), (2, 4, 9, 9)))
    other.load_state_dict(folded.state_dict())
    torch.testing.assert_close(other(images), expected, rtol=1e-5, atol=1e-5)


def test_nothing_to_fold_is_an_error():
    with pytest.raises(ValueError, match="Sequential is folded already; fold the network that it was made of"):
        fold(fold(conv_and_norm("ball_cosine"))[0])
    with pytest.raises(TypeError, match="fold takes a network, got 'resnet18'"):
        fold("resnet18")
    with pytest.raises(ValueError, match="Sequential has no DecoupledConv2d; see convert_decoupled"):
        fold(nn.Sequential(nn.Conv2d(1, 1, 1)))
