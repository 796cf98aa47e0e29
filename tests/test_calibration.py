"""``calibrate`` and ``diagnose`` against the definition in float64, and on trained networks with real images."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

import zoo
from operators import (
    ANGULARS,
    MAGNITUDES,
    RADIUS_MODES,
    DecoupledConv2d,
    OperatorConfig,
    calibrate,
    calibration,
    convert_decoupled,
    diagnose,
)
from tests.reference import reference_conv, reference_norm
from zoo.data import Digits

WITH_RADIUS = [name for name, kind in MAGNITUDES.items() if kind.uses_radius]


def small_network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Conv2d(4, 6, 3, stride=2, groups=2, bias=False),
        nn.BatchNorm2d(6),
    )


def converted(name: str, **settings) -> nn.Sequential:
    operator = {"name": name, "weighting": "linear", **settings}
    return convert_decoupled(small_network(), operator)[0].eval()


def images(count: int = 24) -> torch.Tensor:
    return torch.randn(count, 3, 9, 9, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def digits() -> Digits:
    return Digits()


@pytest.fixture(scope="module")
def training_images(digits) -> torch.Tensor:
    return torch.cat([batch for batch, _ in digits.evaluation_batches("train")])[:512]


@pytest.mark.parametrize("quantile", [0.5, 0.9, 1.0])
@pytest.mark.parametrize("magnitude", WITH_RADIUS)
def test_each_radius_is_the_quantile_of_the_norms_that_calibrated_layers_before_it_give(magnitude, quantile):
    model, report = calibrate(converted(f"{magnitude}_cosine"), [images()], quantile)
    for place, layer in zip((0, 3), report.layers, strict=True):
        conv, x = model[place], model[:place](images()).detach().numpy()
        n = reference_norm(x, conv.kernel_size, conv.stride, conv.padding, groups=conv.groups)
        expected = np.quantile(n, quantile, method="inverted_cdf")
        assert conv.operator.radius == pytest.approx(expected, rel=1e-5)
        assert conv.magnitude.radius == conv.operator.radius
        assert layer.beyond == pytest.approx(1 - quantile, abs=2 / n.size)


@pytest.mark.parametrize("angular", ANGULARS)
@pytest.mark.parametrize("magnitude", MAGNITUDES)
def test_no_other_factor_brings_the_answers_nearer_to_those_of_the_plain_convolution(magnitude, angular):
    model, _ = calibrate(converted(f"{magnitude}_{angular}"), [images()], 0.9)
    conv, x = model[0], images().numpy()
    settings = {"padding": 1, "weighting": "linear", "radius": conv.operator.radius}
    weight = conv.weight.detach().numpy()
    plain = reference_conv(x, weight, magnitude="linear", angular="cosine", padding=1, weighting="linear")
    scale = {"alpha": conv.operator.alpha, "beta": conv.operator.beta}
    answer = reference_conv(x, weight, magnitude=magnitude, angular=angular, **scale, **settings)
    assert (answer * plain).sum() / (answer**2).sum() == pytest.approx(1, abs=1e-5)


def test_the_ratio_of_the_two_slopes_stays_and_what_is_not_used_stays():
    for name in ("seg", "mix"):
        layer = calibrate(converted(f"{name}_cosine", alpha=2.0, beta=0.5), [images()])[0][0]
        assert layer.operator.beta / layer.operator.alpha == pytest.approx(0.25)
        assert (layer.magnitude.alpha, layer.magnitude.beta) == (layer.operator.alpha, layer.operator.beta)
    assert calibrate(converted("tanh_cosine"), [images()])[0][0].operator.beta == 0.5
    assert calibrate(converted("log_cosine"), [images()])[0][0].operator.radius == 1.0


def test_a_plain_convolution_in_disguise_is_not_changed():
    model, report = calibrate(converted("linear_cosine"), [images()])
    assert [layer.operator.alpha for layer in (model[0], model[3])] == pytest.approx([1, 1], abs=1e-6)
    for name, value in small_network().state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], value)
    assert [layer.beyond for layer in report.layers] == [None, None]


@pytest.mark.parametrize("relative", [False, True])
@pytest.mark.parametrize("mode", RADIUS_MODES)
def test_every_kind_of_radius_becomes_the_quantile(mode, relative):
    model = converted("tanh_cosine", radius_mode=mode, radius_relative=relative)
    before = {name: id(parameter) for name, parameter in model.named_parameters()}
    calibrate(model, [images()], 0.9)
    conv = model[0]
    n = reference_norm(images().numpy(), (3, 3), padding=1)
    radius = torch.as_tensor(conv.magnitude.effective_radius(torch.from_numpy(n).float()))
    expected = np.full(radius.shape, np.quantile(n, 0.9, method="inverted_cdf"))
    np.testing.assert_allclose(radius.detach().numpy(), expected, rtol=1e-4)
    assert {name: id(parameter) for name, parameter in model.named_parameters()} == before


def test_batch_norms_move_as_their_inputs_do():
    joined = torch.cat([images(10), images(14)])
    plain = small_network()
    for module in (plain[1], plain[4]):
        module.running_mean.normal_()
        module.running_var.uniform_(0.5, 2)
    model, _ = convert_decoupled(copy.deepcopy(plain.eval()), {"name": "sphere_cosine", "weighting": "linear"})
    model[0].aside = nn.BatchNorm2d(4)
    before = copy.deepcopy(model[0].aside.state_dict())
    calibrate(model, [images(10), (images(14), None)])
    for place in (1, 4):
        old, new = plain[:place](joined), model[:place](joined)
        mean = plain[place].running_mean + new.mean((0, 2, 3)) - old.mean((0, 2, 3))
        ratio = (new.var((0, 2, 3), correction=0) + 1e-5) / (old.var((0, 2, 3), correction=0) + 1e-5)
        torch.testing.assert_close(model[place].running_mean, mean, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(model[place].running_var, plain[place].running_var * ratio, rtol=1e-4, atol=1e-6)
    assert all(torch.equal(before[name], value) for name, value in model[0].aside.state_dict().items())


def test_one_image_is_enough_for_a_network_whose_last_maps_are_single_pixels():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.AdaptiveAvgPool2d(1), nn.BatchNorm2d(4)).eval()
    convert_decoupled(model, {"name": "tanh_cosine", "weighting": "linear"})
    calibrate(model, [images(1)])
    assert all(value.isfinite().all() for value in model.state_dict().values())


def test_what_is_not_calibrated_stays():
    model = converted("ball_cosine")
    model[1].train()
    model[0].weight.requires_grad_(False)
    weights = {name: value.clone() for name, value in model.named_parameters()}
    modes = [module.training for module in model.modules()]
    same, _ = calibrate(model, [(images(), torch.zeros(24))])
    assert same is model and [module.training for module in model.modules()] == modes
    assert all(torch.equal(weights[name], value) for name, value in model.named_parameters())
    assert model[1].momentum == 0.1 and not model[0]._forward_pre_hooks and not model[0].weight.requires_grad


def test_a_layer_used_twice_is_fitted_to_its_first_inputs_and_an_unused_one_is_named():
    shared = nn.Conv2d(3, 3, 3, padding=1)
    model = nn.Sequential(shared, nn.ReLU(), shared)
    model.spare = nn.ModuleList([nn.Conv2d(3, 3, 1)])
    model.forward = lambda x: shared(torch.relu(shared(x)))
    convert_decoupled(model, {"name": "ball_cosine", "weighting": "linear"})
    _, report = calibrate(model, [images()], 1.0)
    n = reference_norm(images().numpy(), (3, 3), padding=1)
    assert model[0].operator.radius == pytest.approx(n.max(), rel=1e-6)
    assert [(layer.name, layer.reason) for layer in report.layers] == [("0", ""), ("spare.0", "not used")]
    assert "not used" in str(report) and "1 convolutions calibrated on 24 images" in str(report)


@pytest.mark.parametrize(
    "cause",
    [
        lambda model, batch: calibrate(model, [batch[:, :, :2, :2]]),
        lambda model, batch: calibrate(model, [batch * torch.inf]),
        lambda model, batch: calibrate(model, []),
    ],
)
def test_a_failure_leaves_the_network_as_it_was(cause):
    model = converted("tanh_cosine", radius_mode="learned")
    before, operators = copy.deepcopy(model.state_dict()), [model[0].operator, model[3].operator]
    with pytest.raises((ValueError, RuntimeError)):
        cause(model, images())
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert [model[0].operator, model[3].operator] == operators and model[1].momentum == 0.1
    assert (model[0].magnitude.alpha, model[3].magnitude.alpha) == (1.0, 1.0)


def test_wrong_arguments_name_the_value():
    for quantile in (0, 1.5, -1):
        with pytest.raises(ValueError, match=rf"share in \(0, 1\].*{quantile}"):
            calibrate(converted("tanh_cosine"), [images()], quantile)
    with pytest.raises(ValueError, match="nothing to calibrate: Sequential has no DecoupledConv2d"):
        calibrate(small_network(), [images()])
    unused = nn.Sequential(nn.ReLU())
    unused.spare = nn.ModuleList([nn.Conv2d(3, 3, 1)])
    unused.forward = torch.relu
    with pytest.raises(ValueError, match="Sequential does not use its decoupled convolutions"):
        calibrate(convert_decoupled(unused, "tanh_cosine")[0], [images()])
    with pytest.raises(ValueError, match="diagnose needs at least one batch"):
        diagnose(converted("tanh_cosine"), [])
    with pytest.raises(TypeError, match=r"diagnose takes a list of batches, got a tensor: put it into one, \[images\]"):
        diagnose(converted("tanh_cosine"), images())
    with pytest.raises(TypeError, match="calibrate takes a network, then batches, but got list as the network"):
        calibrate([images()], converted("tanh_cosine"))
    for compiled in (torch.compile(converted("tanh_cosine")), converted("tanh_cosine")):
        compiled.compile()
        with pytest.raises(TypeError, match="calibrate takes the network before torch.compile"):
            calibrate(compiled, [images()])
    with pytest.raises(TypeError, match="tensor of images.*got str"):
        diagnose(converted("tanh_cosine"), ["image.png"])


@pytest.mark.parametrize("mode", ["fixed", "learned_per_channel"])
def test_diagnose_agrees_with_the_definition(mode):
    model = converted("tanh_cosine", radius=3.0, radius_mode=mode)
    if mode == "learned_per_channel":
        with torch.no_grad():
            model[3].magnitude.radius += torch.arange(6.0).view(6, 1, 1)
    report = diagnose(model, [images(10), images(14)])
    second, conv = report.layers[1], model[3]
    x = torch.cat([model[:3](images(10)), model[:3](images(14))]).detach().numpy()
    weight = conv.weight.detach().numpy()
    geometry = {"stride": 2, "groups": 2}
    n = reference_norm(x, (3, 3), **geometry)
    radius = 3.0 + np.arange(6.0) * (mode == "learned_per_channel")
    plain = reference_conv(x, weight, magnitude="linear", angular="cosine", weighting="linear", **geometry)
    cos = reference_conv(x, weight, magnitude="sphere", angular="cosine", **geometry)
    answer = reference_conv(
        x, weight, magnitude="tanh", angular="cosine", weighting="linear", radius=radius, **geometry
    )
    expected = [np.quantile(n, quantile, method="inverted_cdf") for quantile in (0.5, 0.9, 0.99, 0.999)]
    assert second.norms == pytest.approx(expected, rel=1e-5)
    assert second.radius == pytest.approx(radius.mean())
    beyond = np.repeat(n, 3, axis=1) > radius.reshape(-1, 1, 1)
    assert second.beyond == pytest.approx(beyond.mean(), abs=1e-4)
    assert second.cosine_spread == pytest.approx(cos.std(), rel=1e-4)
    error = np.sqrt(((answer - plain) ** 2).sum() / (plain**2).sum())
    assert second.error == pytest.approx(error, rel=1e-4)
    assert (report.images, [layer.name for layer in report.layers]) == (24, ["0", "3"])
    assert str(report).count("\n") == 3 and "cos spread" in str(report)


@pytest.mark.parametrize("relative", [False, True])
def test_diagnose_changes_nothing(relative):
    model = converted("tanh_cosine", radius_relative=relative, radius_mode="learned").train()
    before = copy.deepcopy(model.state_dict())
    layer = diagnose(model, [images()]).layers[0]
    # The running mean is 1 before the first step, and r is 1.
    assert layer.radius == pytest.approx(1.0001 if relative else 1) and model.training
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_diagnose_says_what_to_change():
    fitting, small = converted("tanh_cosine", radius=3.0), converted("ball_cosine", radius=1e-3)
    assert diagnose(fitting, [images()]).advice() == ()
    (told,) = diagnose(small, [images()]).advice()
    assert "2 layers saturate" in told and "use a larger radius" in told and told in str(diagnose(small, [images()]))
    large = converted("linear_cosine")
    with torch.no_grad():
        large[0].weight.mul_(1e6)
    assert "the patches of 3 have norms up to" in diagnose(large, [images()]).advice()[0]
    with torch.no_grad():
        large[0].weight[0] = float("nan")
    assert diagnose(large, [images()]).advice() == (
        "the inputs of 3 are not finite: go on from an earlier checkpoint, with a lower learning rate",
    )


def test_diagnose_shows_no_radius_where_there_is_none():
    layer = diagnose(converted("log_cosine"), [images()]).layers[0]
    assert (layer.radius, layer.beyond) == (None, None)


@pytest.mark.parametrize("magnitude", MAGNITUDES)
def test_a_trained_network_keeps_what_it_learned(magnitude, digits, training_images):
    plain = zoo.load("digits_cnn6_conv")
    accuracy, _ = zoo.accuracy(plain, digits.evaluation_batches("test"))
    model, _ = convert_decoupled(plain, {"name": f"{magnitude}_cosine", "weighting": "linear"})
    _, report = calibrate(model, [training_images], 0.99)
    calibrated, _ = zoo.accuracy(model, digits.evaluation_batches("test"))
    assert calibrated >= accuracy - (0.01 if magnitude not in ("sphere", "log") else 0.02)
    assert all(layer.beyond is None or 0.005 < layer.beyond <= 0.01 for layer in report.layers)


def test_calibration_works_on_layers_of_other_precisions():
    model = converted("tanh_cosine").double()
    calibrate(model, [images().double()])
    assert isinstance(model[0], DecoupledConv2d) and model[0].magnitude.radius > 1
    assert OperatorConfig.parse(model[0].operator.to_dict()) == model[0].operator


def test_of_more_images_than_memory_should_hold_a_part_is_drawn(monkeypatch):
    """The largest input of a layer has 9 · 9 · 4 values for each image; 30 of these are allowed."""
    monkeypatch.setattr(calibration, "LARGEST_ACTIVATION", 30 * 9 * 9 * 4)
    batches = [images(40)[:7], images(40)[7:]]
    model, report = calibrate(converted("tanh_cosine"), batches)
    assert (report.images, report.given) == (30, 40) and "on 30 of 40 images" in str(report)
    again, _ = calibrate(converted("tanh_cosine"), batches)
    torch.testing.assert_close(again.state_dict(), model.state_dict(), rtol=0, atol=0)
    whole, _ = calibrate(converted("tanh_cosine"), [images(40)[:30]])
    radii = [network[0].operator.radius for network in (model, whole)]
    assert radii[0] != radii[1] and radii[0] == pytest.approx(radii[1], rel=0.2)


@pytest.mark.parametrize("progress", [True, False])
def test_a_bar_shows_how_far_calibration_has_come(progress, capsys):
    calibrate(converted("tanh_cosine"), [images()], progress=progress)
    told = capsys.readouterr().err
    assert ("calibrate" in told and "4/4" in told) if progress else not told


def test_calibration_takes_two_passes_and_leaves_the_layers_own_forward():
    model, passes = converted("tanh_cosine"), []
    model[-1].register_forward_hook(lambda *_: passes.append(1))
    calibrate(model, [images()])
    # One image more, to know how large its activations are.
    assert len(passes) == 3 and "forward" not in vars(model[0])
