"""``distil``: what a converted network learns from its teacher, what stays, and what is refused."""

import copy

import pytest
import timm
import torch
from torch import nn

import zoo
from operators import (
    Distillation,
    blocks,
    calibrate,
    convert_decoupled,
    decoupled_layers,
    distil,
    distillation,
    imitation,
    revert,
)
from zoo.data import Digits
from zoo.models.conversion import convert


class Small(nn.Module):
    """Two blocks and a classifier, with BatchNorm and dropout."""

    def __init__(self, classes: int = 3) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU())
        self.body = nn.Sequential(nn.Conv2d(6, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(0.5))
        self.head = nn.Linear(8, classes)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(self.stem(images)).mean((2, 3)))

    def get_classifier(self) -> nn.Module:
        return self.head


def pair(name: str = "sphere_cosine") -> tuple[nn.Module, nn.Module]:
    """Return a calibrated network and the one that it was made of."""
    torch.manual_seed(0)
    teacher = Small().eval()
    model, _ = convert_decoupled(copy.deepcopy(teacher), name)
    return calibrate(model, batches())[0], teacher


def batches(count: int = 3) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(8, 3, 9, 9, generator=generator) for _ in range(count)]


def state_of(model: nn.Module) -> dict[str, torch.Tensor]:
    return copy.deepcopy(model.state_dict())


def same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


@pytest.mark.parametrize("name", ["sphere_cosine", "tanh_square_cosine"])
def test_a_trained_network_gets_back_what_it_knew(name):
    digits, teacher = Digits(), zoo.load("digits_cnn6_conv")
    model = copy.deepcopy(teacher)
    convert(model, name)
    images = torch.cat([batch for batch, _ in digits.evaluation_batches("train")])[:256]
    calibrate(model, [images])
    test = list(digits.evaluation_batches("test"))
    before = zoo.accuracy(model, test)[0]
    _, report = distil(model, teacher, images.split(32), epochs=6)
    assert report.kept and report.divergences[report.kept] < 0.5 * report.divergences[0]
    assert zoo.accuracy(model, test)[0] >= max(before, 0.97)


def test_a_run_that_goes_on_ends_as_one_that_was_never_stopped():
    model, teacher = pair()
    other, states = copy.deepcopy(model), []
    _, report = distil(
        model, teacher, batches(), epochs=3, after_step=lambda run: states.append(copy.deepcopy(run.state_dict()))
    )
    assert len(states) == 9
    _, again = distil(other, teacher, batches(), epochs=3, state=states[4])
    assert again == report and same(model.state_dict(), other.state_dict())


def test_only_filters_and_norms_learn_and_nothing_else_is_left_behind():
    model, teacher = pair("tanh_cosine")
    model.train()
    model.stem[1].eval()
    model.body[0].bias.requires_grad_(False)
    modes = [module.training for module in model.modules()]
    before, theirs = state_of(model), state_of(teacher)
    distil(model, teacher, batches(), epochs=1)
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    # Statistics move while the layers learn one by one, and not afterwards.
    assert {name for name in changed if "running" not in name} == {
        *("stem.0.weight", "stem.0.bias", "stem.1.weight", "stem.1.bias"),
        *("body.0.weight", "body.1.weight", "body.1.bias"),
    }
    assert same(theirs, teacher.state_dict()) and [module.training for module in model.modules()] == modes
    assert all(parameter.grad is None for parameter in [*model.parameters(), *teacher.parameters()])
    assert not any(module._forward_hooks for network in (model, teacher) for module in network.modules())


def test_a_distillation_that_makes_it_worse_leaves_the_network_as_it_was():
    model, teacher = pair("tanh_cosine")
    before = state_of(model)
    _, report = distil(model, teacher, batches(), epochs=2, learning_rate=10.0)
    assert report.kept < 2 and min(report.divergences[2:]) > report.divergences[0]
    assert report.kept or same(before, model.state_dict())


def test_a_distillation_that_never_makes_it_better_leaves_the_network_as_it_was(monkeypatch):
    model, teacher = pair("tanh_square_cosine")
    before, operators = state_of(model), {name: layer.operator for name, layer in decoupled_layers(model).items()}
    distances = iter([1.0, 2.0, 1.5, float("nan")])
    monkeypatch.setattr(distillation, "divergence", lambda *_: (0.5, next(distances)))
    _, report = distil(model, teacher, batches(), epochs=2, held_out=batches(1))
    assert report.kept == 0 and same(before, model.state_dict())
    assert {name: layer.operator for name, layer in decoupled_layers(model).items()} == operators
    assert "it became no better, and is left as it was" in str(report)


def test_the_best_of_the_states_is_kept(monkeypatch):
    model, teacher = pair()
    states, distances = [], iter([3.0, 2.5, 2.0, 1.0, 4.0])
    monkeypatch.setattr(distillation, "divergence", lambda *_: (0.5, distances_of_epoch()))

    def distances_of_epoch() -> float:
        states.append(state_of(model))
        return next(distances)

    _, report = distil(model, teacher, batches(), epochs=3, held_out=batches(1))
    assert report.kept == 3 and report.divergences == (3.0, 2.5, 2.0, 1.0, 4.0)
    assert same(states[3], model.state_dict()) and "it was best after epoch 2" in str(report)


def test_a_loss_that_is_not_finite_is_an_error_and_the_network_is_as_it_was():
    model, teacher = pair()
    before, bad = state_of(model), [*batches(1), torch.full((8, 3, 9, 9), float("nan"))]
    with pytest.raises(FloatingPointError, match="the loss of step 2 is nan: distil again with a lower learning rate"):
        distil(model, teacher, bad, epochs=1, held_out=batches(1))
    assert same(before, model.state_dict())


def test_of_a_teacher_of_another_architecture_the_logits_count():
    model, _ = pair()
    torch.manual_seed(5)
    teacher = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)).eval()
    run = Distillation(model, teacher, batches(), None, 1, 1e-3)
    run.begin()
    assert run.blocks == ()
    _, report = distil(model, teacher, batches(), epochs=20, learning_rate=1e-2)
    assert report.divergences[report.kept] < report.divergences[0]


def test_of_a_teacher_of_the_same_architecture_with_another_classifier_the_logits_count():
    model, teacher = pair()
    with torch.no_grad():
        teacher.head.weight.copy_(-teacher.head.weight)
    before = state_of(model)
    _, report = distil(model, teacher, batches(), epochs=20, learning_rate=1e-2)
    assert report.divergences[report.kept] < 0.5 * report.divergences[0]
    assert not torch.equal(model.head.weight, before["head.weight"])


def test_under_autocast_plain_layers_learn_too_and_what_is_measured_is_what_is_kept():
    torch.manual_seed(0)
    teacher = Small().eval()
    model, _ = convert_decoupled(copy.deepcopy(teacher), "sphere_cosine", keep=["stem"])
    calibrate(model, batches())
    before, held_out = state_of(model), batches(1)
    with torch.autocast("cpu", torch.bfloat16):
        _, report = distil(model, teacher, batches(), epochs=3, held_out=held_out)
    assert report.kept > 1 and not torch.equal(model.stem[0].weight, before["stem.0.weight"])
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        _, distance = distillation.divergence(teacher(held_out[0]), model.eval()(held_out[0]))
    assert distance == report.divergences[report.kept]


def test_a_network_that_learned_is_reverted_with_the_statistics_that_it_has():
    model, teacher = pair()
    distil(model, teacher, batches(), epochs=3)
    moved = model.stem[1].running_mean.clone()
    assert torch.equal(revert(model).stem[1].running_mean, moved)
    assert not torch.equal(moved, teacher.stem[1].running_mean)


def test_a_network_that_did_not_learn_is_reverted_to_what_it_was(monkeypatch):
    model, teacher = pair("tanh_square_cosine")
    distances = iter([1.0, 2.0, 2.0])
    monkeypatch.setattr(distillation, "divergence", lambda *_: (0.5, next(distances)))
    distil(model, teacher, batches(), epochs=1, held_out=batches(1))
    assert same(revert(model).state_dict(), teacher.state_dict())


@pytest.mark.parametrize(
    ("architecture", "first", "count"),
    [("resnet18", "bn1", 9), ("tf_efficientnet_lite0", "bn1", 18), ("convnext_atto", "stem.0", 5)],
)
def test_blocks_are_compared_and_not_what_holds_them(architecture, first, count):
    teacher = timm.create_model(architecture).eval()
    model, _ = convert_decoupled(copy.deepcopy(teacher), "tanh_cosine")
    names = blocks.comparable(model, teacher, torch.randn(1, 3, 64, 64))
    assert names[0] == first and len(names) == count


def test_images_of_two_sizes_are_refused():
    model, _ = pair()
    with pytest.raises(ValueError, match=r"images of one size, got \(3, 9, 9\) and \(3, 8, 8\): resize them"):
        calibrate(model, [*batches(1), torch.zeros(2, 3, 8, 8)])


def test_what_is_no_teacher_is_refused():
    model, teacher = pair()
    with pytest.raises(ValueError, match="shares its weights with the network[\\s\\S]*convert a copy"):
        distil(model, model, batches())
    with pytest.raises(ValueError, match=r"the teacher gives \(1, 5\) to a batch, and the network \(1, 3\)"):
        distil(model, Small(5), batches())
    with pytest.raises(ValueError, match=r"logits of two or more classes: the teacher gives \(1, 1\)"):
        distil(convert_decoupled(Small(1), "tanh_cosine")[0], Small(1), batches())
    with pytest.raises(TypeError, match="small steps are lost in weights of torch.bfloat16: distil model.float()"):
        distil(copy.deepcopy(model).bfloat16(), teacher, batches())
    with pytest.raises(TypeError, match="the teacher is a network, got str"):
        distil(model, "resnet50", batches())
    with pytest.raises(ValueError, match="nothing to distil: Small has no DecoupledConv2d"):
        distil(teacher, model, batches())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"epochs": 0}, "epochs must be at least 1, got 0"),
        ({"learning_rate": 0.0}, "learning_rate must be more than 0 and finite, got 0.0"),
        ({"batches": []}, "at least one batch of images, got none"),
        ({"batches": iter([])}, "takes a list or a loader, got list_iterator"),
        ({"batches": torch.zeros(2, 3, 9, 9)}, r"takes a list or a loader, got Tensor; list\(...\) makes a list"),
    ],
)
def test_wrong_settings_are_named(settings, message):
    model, teacher = pair()
    with pytest.raises((TypeError, ValueError), match=message):
        distil(model, teacher, settings.pop("batches", batches()), **settings)


@pytest.mark.parametrize(
    ("images", "doubt"),
    [
        (torch.zeros(4, 3, 160, 160), "4 of 4 images have a single colour"),
        (torch.randn(1, 3, 160, 160).expand(4, -1, -1, -1), "only 1 of 4 images differ"),
        (torch.rand(4, 3, 160, 160), r"the images are in \[0, 1\], as if they were not normalised"),
        (255 * torch.rand(4, 3, 160, 160), r"the images are in \[0, 255\], as if they were not normalised"),
        (torch.randn(4, 3, 96, 96), "the images are of 3×96×96, and the network was trained on 3×160×160"),
    ],
    ids=["black", "identical", "in [0, 1]", "bytes", "small"],
)
def test_images_that_are_not_what_the_network_takes_are_doubted_aloud(images, doubt):
    teacher = timm.create_model("test_efficientnet").eval()
    model, _ = convert_decoupled(copy.deepcopy(teacher), "tanh_cosine")
    with pytest.warns(UserWarning, match=doubt):
        calibrate(model, [images])
    with pytest.warns(UserWarning, match=doubt):
        distil(model, teacher, [images], epochs=1)


@pytest.mark.parametrize("weighting", ["linear", "none"])
@pytest.mark.parametrize(
    ("name", "share"), [("tanh_square_cosine", 0.7), ("sphere_cosine", 1.0), ("linear_sigmoid", 1.0)]
)
def test_filters_that_were_turned_answer_more_as_ordinary_ones(name, share, weighting):
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 6, 3, groups=2), nn.ReLU()).eval()
    images = torch.rand(24, 3, 12, 12)
    model, _ = convert_decoupled(copy.deepcopy(plain), {"name": name, "weighting": weighting})
    calibrate(model, [images])

    def error() -> float:
        with torch.no_grad():
            expected = plain(images)
            return ((model(images) - expected).square().sum() / (expected - expected.mean()).square().sum()).item()

    before, parameters = error(), [id(parameter) for parameter in model.parameters()]
    imitation.imitate(model, images)
    assert error() < share * before
    assert [id(parameter) for parameter in model.parameters()] == parameters
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())


def test_filters_that_cannot_be_trained_are_not_turned():
    model, _ = pair("tanh_square_cosine")
    model.stem[0].weight.requires_grad_(False)
    before = state_of(model)
    imitation.imitate(model, torch.cat(batches()))
    assert torch.equal(model.stem[0].weight, before["stem.0.weight"])
    assert not torch.equal(model.body[0].weight, before["body.0.weight"])
