"""``convert_decoupled`` and ``revert``: what changes, what stays, what is refused."""

import copy

import pytest
import timm
import torch
from timm.layers import CondConv2d
from torch import nn

from operators import ANGULARS, MAGNITUDES, DecoupledConv2d, OperatorConfig, convert_decoupled, decoupled_layers, revert

QCONFIG = torch.ao.quantization.default_qat_qconfig
IDENTITY = OperatorConfig("linear", "cosine", weighting="linear")


def small_network() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3, groups=2, bias=False), nn.Conv2d(4, 2, 1))


def test_the_same_object_is_returned_and_its_parameters_stay():
    model = small_network()
    parameters, keys = dict(model.named_parameters()), list(model.state_dict())
    converted, report = convert_decoupled(model, "tanh_cosine")
    assert converted is model
    assert list(converted.state_dict()) == keys
    assert all(parameters[name] is parameter for name, parameter in converted.named_parameters())
    assert [layer.name for layer in report.converted] == ["0", "2", "3"] and not report.skipped
    assert all(isinstance(converted[index], DecoupledConv2d) for index in (0, 2, 3))


def test_a_bare_convolution_is_converted():
    layer = nn.Conv2d(3, 4, 3)
    converted, report = convert_decoupled(layer, "ball_linear")
    assert converted is layer and isinstance(layer, DecoupledConv2d) and report.layers[0].name == ""


@pytest.mark.parametrize("name", ["resnet18", "mobilenetv3_small_050", "convnext_atto", "cnn6", "resnet20"])
def test_linear_cosine_weighted_linear_keeps_the_outputs_of_a_network(name):
    import zoo  # noqa: F401  registers cnn6 and resnet20 with timm

    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=5).eval()
    images = torch.randn(2, 3, 64, 64)
    before = model(images)
    after = convert_decoupled(model, IDENTITY)[0](images)
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-4 * before.abs().max().item())
    assert torch.equal(revert(model)(images), before)


@pytest.mark.parametrize("name", [f"{magnitude}_{angular}" for magnitude in MAGNITUDES for angular in ANGULARS])
def test_conversion_equals_a_network_built_with_the_layer(name):
    torch.manual_seed(0)
    converted, _ = convert_decoupled(small_network(), OperatorConfig.parse(name))
    built = nn.Sequential(
        DecoupledConv2d(3, 4, 3, operator=name),
        nn.ReLU(),
        DecoupledConv2d(4, 4, 3, groups=2, bias=False, operator=name),
        DecoupledConv2d(4, 2, 1, operator=name),
    )
    built.load_state_dict(converted.state_dict())
    images = torch.randn(2, 3, 9, 9)
    assert torch.equal(converted(images), built(images))


def test_a_bare_name_is_weighted_in_a_conversion_alone_and_anything_else_means_what_it_says():
    for operator, weighting in [
        ("tanh_cosine", "linear"),
        ({"name": "tanh_cosine"}, "none"),
        ({"name": "tanh_cosine", "weighting": "tanh"}, "tanh"),
        (OperatorConfig("tanh", "cosine"), "none"),
    ]:
        model, report = convert_decoupled(small_network(), operator)
        assert {layer.operator.weighting for layer in decoupled_layers(model).values()} == {weighting}
        assert report.operator.weighting == weighting
        assert str(report).startswith(f"{report.operator}: ")
        assert (f"weighting={weighting}" in str(report)) == (weighting != "none")
    assert DecoupledConv2d(3, 4, 3, operator="tanh_cosine").operator.weighting == "none"


def test_what_a_layer_is_stays():
    model = small_network().double().eval().to(memory_format=torch.channels_last)
    model[0].weight.requires_grad_(False)
    convert_decoupled(model, OperatorConfig("tanh", "cosine", radius_mode="learned", radius_relative=True))
    assert not model[0].training and not model[0].magnitude.training and not model[0].magnitude.running_norm.training
    assert not model[0].weight.requires_grad and model[2].weight.requires_grad
    assert model[0].weight.is_contiguous(memory_format=torch.channels_last)
    assert model[0].magnitude.radius.dtype == torch.float64
    on_meta = nn.Conv2d(3, 4, 3, device="meta")
    convert_decoupled(on_meta, OperatorConfig("tanh", "cosine", radius_mode="learned"))
    assert on_meta.magnitude.radius.device.type == "meta"


def test_new_state_keys_are_only_what_is_learned():
    model = small_network()
    before = set(model.state_dict())
    convert_decoupled(model, OperatorConfig("seg", "cosine", radius_mode="learned_per_channel", radius_relative=True))
    new = {key.split(".", 1)[1] for key in set(model.state_dict()) - before}
    assert new == {"magnitude.radius", "magnitude.running_norm.average", "magnitude.running_norm.steps"}


def test_tied_modules_and_tied_parameters_stay_tied():
    shared = nn.Conv2d(4, 4, 3, padding=1)
    twin = nn.Conv2d(4, 4, 3, padding=1)
    twin.weight = shared.weight
    model = nn.ModuleDict({"a": shared, "b": nn.Sequential(shared), "c": twin})
    _, report = convert_decoupled(model, "sphere_cosine")
    assert model["a"] is model["b"][0] and model["c"].weight is model["a"].weight
    assert [(layer.name, layer.aliases) for layer in report.layers] == [("a", ("b.0",)), ("c", ())]


def test_filter_fn_chooses_and_the_report_says_so():
    model = small_network()
    asked = []
    _, report = convert_decoupled(
        model, "tanh_cosine", filter_fn=lambda module, name: asked.append(name) or name != "0"
    )
    assert asked == ["0", "2", "3"]
    assert type(model[0]) is nn.Conv2d and [layer.reason for layer in report.skipped] == ["left out by filter_fn"]
    assert "skipped: left out by filter_fn" in str(report) and "2 converted, 1 skipped" in str(report)


def test_a_shared_module_is_converted_if_any_of_its_names_is_chosen():
    shared = nn.Conv2d(4, 4, 1)
    model = nn.ModuleDict({"a": shared, "b": shared})
    _, report = convert_decoupled(model, "tanh_cosine", filter_fn=lambda module, name: name == "b")
    assert isinstance(model["a"], DecoupledConv2d) and report.layers[0].converted


def test_gates_other_dimensions_and_the_classifier_are_left_alone_by_default():
    model = timm.create_model("mobilenetv3_small_050")
    _, report = convert_decoupled(model, "tanh_cosine", depthwise=True)
    assert {layer.name.split(".")[-2] for layer in report.skipped} == {"se"}
    assert all("gate (SqueezeExcite)" in layer.reason for layer in report.skipped)
    assert type(model.blocks[0][0].se.conv_reduce) is nn.Conv2d

    mixed = nn.Sequential(nn.Conv2d(1, 2, 1), nn.Conv1d(1, 2, 1), nn.ConvTranspose2d(2, 2, 1))
    _, report = convert_decoupled(mixed, "tanh_cosine")
    assert [layer.reason for layer in report.skipped] == ["not a 2-d convolution"] * 2

    ghost = timm.create_model("ghostnetv2_100")
    _, report = convert_decoupled(ghost, "tanh_cosine", depthwise=True)
    assert {layer.name.split(".")[-2] for layer in report.skipped} == {"se", "short_conv"}

    network = nn.Sequential(nn.Conv2d(1, 2, 1), nn.Conv2d(2, 5, 1))
    network.get_classifier = lambda: network[1]
    _, report = convert_decoupled(network, "tanh_cosine")
    assert [layer.name for layer in report.skipped] == ["1"]
    network = nn.Sequential(nn.Conv2d(1, 2, 1), nn.Conv2d(2, 5, 1), nn.Conv2d(2, 5, 1))
    network.get_classifier = lambda: (network[1], network[2])
    _, report = convert_decoupled(network, "tanh_cosine")
    assert [layer.name for layer in report.skipped] == ["1", "2"]


def test_depthwise_convolutions_stay_plain_unless_they_are_asked_for():
    network = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.Conv2d(4, 8, 3, groups=4), nn.Conv2d(8, 8, 3, groups=4), nn.Conv2d(8, 8, 3, groups=8)
    )
    _, report = convert_decoupled(copy.deepcopy(network), "tanh_cosine")
    assert [(layer.name, layer.reason) for layer in report.skipped] == [("1", "depthwise"), ("3", "depthwise")]
    assert report.summary().endswith("2 convolutions converted, 2 plain (2 depthwise)")
    _, report = convert_decoupled(copy.deepcopy(network), "tanh_cosine", depthwise=True)
    assert not report.skipped and report.summary().endswith("4 convolutions converted")
    _, report = convert_decoupled(copy.deepcopy(network), "tanh_cosine", filter_fn=lambda module, name: name != "0")
    assert [layer.name for layer in report.skipped] == ["0"]
    with pytest.raises(ValueError, match="nothing to convert[\\s\\S]*depthwise[\\s\\S]*depthwise=True converts"):
        convert_decoupled(nn.Conv2d(8, 8, 3, groups=8), "tanh_cosine")


@pytest.mark.parametrize(
    ("keep", "kept"),
    [
        (["stem"], ["stem.0", "stem.1"]),
        (["stem.*"], ["stem.0", "stem.1"]),
        (["stem.1", "head"], ["stem.1", "head"]),
        (["blocks.?.conv"], ["blocks.0.conv", "blocks.1.conv"]),
        (["again"], ["head"]),
        ([], []),
    ],
)
def test_convolutions_are_kept_plain_by_their_names(keep, kept):
    head = nn.Conv2d(2, 2, 1)
    blocks = nn.ModuleList(nn.ModuleDict({"conv": nn.Conv2d(2, 2, 1)}) for _ in range(2))
    stem = nn.Sequential(nn.Conv2d(1, 2, 1), nn.Conv2d(2, 2, 1))
    network = nn.ModuleDict({"stem": stem, "blocks": blocks, "head": head, "again": head})
    _, report = convert_decoupled(network, "tanh_cosine", keep=keep, strict=True)
    assert [layer.name for layer in report.skipped] == kept
    assert {layer.reason for layer in report.skipped} <= {"kept plain by its name"}


def test_names_to_keep_that_are_none_are_refused():
    network = small_network()
    with pytest.raises(ValueError, match="unknown convolution to keep plain 'stem'. Choose one of: 0, 2, 3"):
        convert_decoupled(network, "tanh_cosine", keep=["0", "stem"])
    with pytest.raises(TypeError, match="keep is a list of names, got 'stem'"):
        convert_decoupled(network, "tanh_cosine", keep="stem")
    assert not decoupled_layers(network)


class ShiftedConv2d(nn.Conv2d):
    def forward(self, input):
        return super().forward(input) + 1


def test_a_convolution_that_is_not_known_stays_and_is_reported():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), ShiftedConv2d(4, 4, 3), CondConv2d(4, 4, 3))
    _, report = convert_decoupled(model, "tanh_cosine")
    assert [layer.kind for layer in report.skipped] == ["ShiftedConv2d", "CondConv2d"]
    assert all("forward is not known here" in layer.reason for layer in report.skipped)
    assert type(model[1]) is ShiftedConv2d and isinstance(model[0], DecoupledConv2d)
    parametrized = nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 4, 3))
    with pytest.raises(ValueError, match="nothing to convert[\\s\\S]*ParametrizedConv2d  skipped: its forward"):
        convert_decoupled(parametrized, "tanh_cosine")


def test_strict_refuses_what_would_stay_plain_but_for_what_the_filter_leaves_out():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), ShiftedConv2d(4, 4, 3), nn.Conv1d(4, 4, 1))
    with pytest.raises(ValueError, match=r"strict: 2 of 3[\s\S]*1 \(ShiftedConv2d\)[\s\S]*2 \(Conv1d\): not a 2-d"):
        convert_decoupled(model, "tanh_cosine", strict=True)
    assert type(model[0]) is nn.Conv2d
    with pytest.raises(ValueError, match="gate"):
        convert_decoupled(timm.create_model("mobilenetv3_small_050"), "tanh_cosine", strict=True)
    _, report = convert_decoupled(model, "tanh_cosine", filter_fn=lambda module, name: name == "0", strict=True)
    assert [layer.converted for layer in report.layers] == [True, False, False]
    convert_decoupled(small_network(), "tanh_cosine", strict=True)


@pytest.mark.parametrize(
    "register",
    [
        lambda layer: layer.register_forward_hook(lambda *_: None),
        lambda layer: layer.register_forward_pre_hook(lambda *_: None),
        lambda layer: layer.register_full_backward_hook(lambda *_: None),
        lambda layer: layer.register_full_backward_pre_hook(lambda *_: None),
    ],
)
def test_hooks_are_refused_and_nothing_is_changed(register):
    model = small_network()
    register(model[2])
    with pytest.raises(TypeError, match="2 .*has hooks.*remove them"):
        convert_decoupled(model, "tanh_cosine")
    assert type(model[0]) is nn.Conv2d


def test_a_failing_filter_changes_nothing():
    model = small_network()

    def failing(module, name):
        if name == "3":
            raise KeyError(name)
        return True

    with pytest.raises(KeyError):
        convert_decoupled(model, "tanh_cosine", filter_fn=failing)
    assert type(model[0]) is nn.Conv2d


@pytest.mark.filterwarnings("ignore:.*quantized tensor creation functions")
def test_wrappers_are_refused_with_the_fix():
    with pytest.raises(TypeError, match="DataParallel is not converted: convert model.module"):
        convert_decoupled(nn.DataParallel(small_network()), "tanh_cosine")
    with pytest.raises(TypeError, match="OptimizedModule is not converted: .*before torch.compile"):
        convert_decoupled(torch.compile(small_network()), "tanh_cosine")
    compiled = small_network()
    compiled[2].compile()
    with pytest.raises(TypeError, match="2 is compiled .*convert the network before"):
        convert_decoupled(compiled, "tanh_cosine")
    for quantised in (torch.ao.nn.quantized.Conv2d(3, 4, 3), torch.ao.nn.qat.Conv2d(3, 4, 3, qconfig=QCONFIG)):
        with pytest.raises(TypeError, match="1 .* is quantised: convert the network of floats"):
            convert_decoupled(nn.Sequential(nn.Conv2d(3, 3, 3), quantised), "tanh_cosine")


def test_nothing_to_convert_is_an_error():
    with pytest.raises(ValueError, match="nothing to convert in Linear: it has no convolution$"):
        convert_decoupled(nn.Linear(2, 2), "tanh_cosine")
    with pytest.raises(ValueError, match="left out by filter_fn"):
        convert_decoupled(small_network(), "tanh_cosine", filter_fn=lambda module, name: False)


def test_arguments_of_another_kind_are_named():
    model = small_network()
    for wrong in (model.state_dict(), "tanh_cosine"):
        with pytest.raises(TypeError, match=f"then an operator, but got {type(wrong).__name__} as the network; timm"):
            convert_decoupled(wrong, "tanh_cosine")
    with pytest.raises(TypeError, match="filter_fn is a function of a convolution and its name, got 'layer1'"):
        convert_decoupled(model, "tanh_cosine", filter_fn="layer1")


def test_a_second_conversion_names_the_first():
    model, _ = convert_decoupled(small_network(), "tanh_cosine")
    with pytest.raises(ValueError, match="0 is tanh_cosine already: revert"):
        convert_decoupled(model, "ball_cosine")


def test_an_unknown_operator_changes_nothing():
    model = small_network()
    with pytest.raises(ValueError, match="unknown operator 'tahn_cosine'. Did you mean 'tanh_cosine'"):
        convert_decoupled(model, "tahn_cosine")
    assert type(model[0]) is nn.Conv2d


def test_an_optimiser_made_before_conversion_trains_the_converted_network():
    torch.manual_seed(0)
    model = small_network()
    optimiser = torch.optim.SGD(model.parameters(), lr=0.1)
    convert_decoupled(model, "tanh_cosine")
    before = copy.deepcopy(model.state_dict())
    model(torch.randn(2, 3, 9, 9)).square().mean().backward()
    optimiser.step()
    assert all(not torch.equal(before[key], value) for key, value in model.state_dict().items())


def test_revert_gives_the_plain_network_back():
    model = small_network()
    keys = list(model.state_dict())
    convert_decoupled(model, OperatorConfig("tanh", "power", radius_mode="learned"))
    assert revert(model) is model
    assert [type(module) for module in model] == [nn.Conv2d, nn.ReLU, nn.Conv2d, nn.Conv2d]
    assert list(model.state_dict()) == keys and "operator" not in vars(model[0])
    convert_decoupled(model, "sphere_cosine")
    with pytest.raises(ValueError, match="nothing to revert"):
        revert(nn.Linear(2, 2))
