"""``OperatorConfig`` in all its forms, what it refuses, and the layer as an ``nn.Conv2d`` that carries one."""

import copy
import dataclasses
import io
import json
import pickle
from types import MappingProxyType

import pytest
import torch
from torch import nn

from operators import ANGULARS, MAGNITUDES, RADIUS_MODES, WEIGHTINGS, DecoupledConv2d, OperatorConfig

OPERATORS = [f"{magnitude}_{angular}" for magnitude in MAGNITUDES for angular in ANGULARS]
# The fields and defaults that every checkpoint's config.json relies on.
DEFAULTS = {
    "weighting": "none",
    "radius": 1.0,
    "radius_mode": "fixed",
    "radius_relative": False,
    "alpha": 1.0,
    "beta": 0.5,
    "sigmoid_k": 0.3,
    "power": 2.0,
    "eps": 1e-4,
}
UNUSUAL = {
    "weighting": "tanh",
    "radius": 2.5,
    "radius_mode": "learned_per_channel",
    "radius_relative": True,
    "alpha": 0.7,
    "beta": 0.0,
    "sigmoid_k": 1.5,
    "power": 3,
    "eps": 1e-6,
}


def test_the_tables_hold_the_operators_of_the_documentation():
    assert {"sphere", "ball", "tanh", "linear", "seg", "log", "mix"} <= set(MAGNITUDES)
    assert {"cosine", "linear", "square_cosine", "sigmoid", "power"} <= set(ANGULARS)
    assert {"none", "linear", "tanh"} <= set(WEIGHTINGS)
    assert set(RADIUS_MODES) == {"fixed", "learned", "learned_per_channel"}
    assert not any("_" in name for name in MAGNITUDES)  # or a name would not say where its angular function begins


@pytest.mark.parametrize("magnitude", MAGNITUDES)
@pytest.mark.parametrize("angular", ANGULARS)
def test_every_form_gives_the_same_config(magnitude, angular):
    name = f"{magnitude}_{angular}"
    config = OperatorConfig(magnitude, angular)
    assert config.name == name
    assert config.to_dict() == {"magnitude": magnitude, "angular": angular} | DEFAULTS
    assert OperatorConfig.parse(config) is config
    forms = [name, {"name": name}, {"magnitude": magnitude, "angular": angular}, MappingProxyType({"name": name})]
    for form in [*forms, config.to_dict()]:
        assert OperatorConfig.parse(form) == config
        assert DecoupledConv2d(1, 1, 1, operator=form).operator == config


def test_a_mapping_keeps_its_settings_and_is_not_changed():
    mapping = {"name": "seg_sigmoid"} | UNUSUAL
    before = dict(mapping)
    config = OperatorConfig.parse(mapping)
    assert mapping == before
    assert config.to_dict() == {"magnitude": "seg", "angular": "sigmoid"} | UNUSUAL


@pytest.mark.parametrize("settings", [DEFAULTS, UNUSUAL], ids=["defaults", "unusual"])
@pytest.mark.parametrize("operator", OPERATORS)
def test_json_round_trip(operator, settings):
    config = OperatorConfig.parse({"name": operator} | settings)
    assert OperatorConfig.parse(json.loads(json.dumps(config.to_dict(), allow_nan=False))) == config


def test_a_config_is_frozen_and_hashable():
    config = OperatorConfig("tanh", "cosine")
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.alpha = 2.0
    assert {config: 1}[OperatorConfig.parse("tanh_cosine")] == 1
    assert config != dataclasses.replace(config, alpha=2.0)


@pytest.mark.parametrize(
    ("field", "value", "nearest"),
    [
        ("magnitude", "tahn", "tanh"),
        ("magnitude", "Sphere", "sphere"),
        ("angular", "cosin", "cosine"),
        ("angular", "squarecosine", "square_cosine"),
        ("weighting", "lin", "linear"),
        ("radius_mode", "learned_per_chanel", "learned_per_channel"),
    ],
)
def test_an_unknown_name_lists_the_legal_ones_and_the_nearest(field, value, nearest):
    legal = {"magnitude": MAGNITUDES, "angular": ANGULARS, "weighting": WEIGHTINGS, "radius_mode": RADIUS_MODES}[field]
    fields = {"magnitude": "tanh", "angular": "cosine"} | {field: value}
    for make in (lambda: OperatorConfig(**fields), lambda: OperatorConfig.parse(fields)):
        with pytest.raises(ValueError, match=f"Did you mean '{nearest}'") as error:
            make()
        assert repr(value) in str(error.value)
        assert all(name in str(error.value) for name in legal)


@pytest.mark.parametrize(
    ("name", "nearest"),
    [("tanh_cosin", "tanh_cosine"), ("tanhcosine", "tanh_cosine"), ("sphere-linear", "sphere_linear")],
)
def test_an_unknown_operator_lists_all_and_the_nearest(name, nearest):
    for make in (
        lambda: OperatorConfig.parse(name),
        lambda: OperatorConfig.parse({"name": name}),
        lambda: DecoupledConv2d(1, 1, 1, operator=name),
    ):
        with pytest.raises(ValueError, match=f"Did you mean '{nearest}'") as error:
            make()
        assert repr(name) in str(error.value)
        assert all(operator in str(error.value) for operator in OPERATORS)


@pytest.mark.parametrize(
    "name", ["", "_", "tanh", "tanh_", "_cosine", "cosine_tanh", "conv", "tanh_cosine_", "TANH_COSINE"]
)
def test_what_is_no_operator_name(name):
    with pytest.raises(ValueError, match="unknown operator"):
        OperatorConfig.parse(name)


def test_an_unknown_setting_lists_the_legal_ones_and_the_nearest():
    with pytest.raises(ValueError, match="Did you mean 'radius'") as error:
        OperatorConfig.parse({"name": "tanh_cosine", "radios": 1.0})
    assert all(field in str(error.value) for field in DEFAULTS)


@pytest.mark.parametrize("fields", [{}, {"magnitude": "tanh"}, {"angular": "cosine", "alpha": 2.0}])
def test_a_mapping_without_a_name_is_refused(fields):
    with pytest.raises(ValueError, match="an operator needs '(magnitude|angular)'"):
        OperatorConfig.parse(fields)


@pytest.mark.parametrize("operator", [None, 3, ["tanh", "cosine"], ("tanh", "cosine"), OperatorConfig, b"tanh_cosine"])
def test_a_thing_of_another_kind_is_refused(operator):
    with pytest.raises(
        TypeError, match="operator must be a name such as 'tanh_cosine', a mapping or an OperatorConfig"
    ):
        OperatorConfig.parse(operator)


def test_a_name_and_a_magnitude_that_contradict_it_are_refused():
    with pytest.raises(ValueError, match="ball"):
        OperatorConfig.parse({"name": "tanh_cosine", "magnitude": "ball"})


@pytest.mark.parametrize("field", ["name", "magnitude", "angular", "weighting", "radius_mode"])
@pytest.mark.parametrize("value", [3, None, ["tanh"]], ids=str)
def test_a_name_of_another_type_is_refused(field, value):
    fields = (
        {"name": "tanh_cosine"}
        if field in ("name", "weighting", "radius_mode")
        else {"magnitude": "tanh", "angular": "cosine"}
    )
    with pytest.raises((TypeError, ValueError)) as error:
        OperatorConfig.parse(fields | {field: value})
    assert repr(value) in str(error.value)


TOO_LOW = {
    "radius": [0.0, -1.0],
    "alpha": [0.0, -0.5],
    "beta": [-1e-9],
    "sigmoid_k": [0.0, -0.3],
    "power": [0.99, 0.0, -2.0],
    "eps": [0.0, -1e-4],
}


@pytest.mark.parametrize(("field", "value"), [(field, value) for field in TOO_LOW for value in TOO_LOW[field]])
def test_a_number_outside_its_range_is_refused(field, value):
    with pytest.raises(ValueError, match=f"{field} must be (more than|at least) [01], got {value!r}"):
        OperatorConfig("tanh", "cosine", **{field: value})


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("field", TOO_LOW)
def test_a_number_that_is_not_finite_is_refused(field, value):
    with pytest.raises(ValueError, match=f"{field} must be .*, got {value!r}"):
        OperatorConfig("tanh", "cosine", **{field: value})


@pytest.mark.parametrize("value", ["1.0", None, True, [1.0], 1j, torch.ones(())], ids=repr)
@pytest.mark.parametrize("field", TOO_LOW)
def test_what_is_no_number_is_refused(field, value):
    with pytest.raises(TypeError, match=f"{field} must be a number, got"):
        OperatorConfig("tanh", "cosine", **{field: value})


@pytest.mark.parametrize("value", [0, 1, "true", None])
def test_what_is_neither_true_nor_false_is_refused(value):
    with pytest.raises(TypeError, match="radius_relative must be true or false, got"):
        OperatorConfig("tanh", "cosine", radius_relative=value)


@pytest.mark.parametrize(("field", "value"), [("beta", 0), ("beta", 0.0), ("power", 1), ("power", 1.0), ("alpha", 5)])
def test_the_ends_of_the_ranges_and_whole_numbers_are_legal(field, value):
    assert getattr(OperatorConfig("tanh", "cosine", **{field: value}), field) == value


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64, torch.bool, torch.complex64], ids=str)
def test_an_input_that_is_not_floating_point_is_refused(dtype):
    with pytest.raises(TypeError, match=f"input must be floating point, got {dtype}"):
        DecoupledConv2d(2, 3, 3)(torch.ones(1, 2, 5, 5, dtype=dtype))


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("shape", [(1, 3, 5, 5), (3, 5, 5), (1, 2, 5, 5), (0, 3, 5, 5)])
def test_wrong_channels_are_refused(shape, groups):
    with pytest.raises(ValueError, match=f"input has {shape[-3]} channels, .* needs 4"):
        DecoupledConv2d(4, 2, 3, groups=groups)(torch.ones(shape))


@pytest.mark.parametrize("shape", [(), (4,), (5, 5), (1, 1, 4, 5, 5)])
def test_wrong_dimensions_are_refused(shape):
    with pytest.raises(ValueError, match="input must be .*got shape"):
        DecoupledConv2d(4, 2, 3)(torch.ones(shape))


def test_bad_padding_is_refused():
    with pytest.raises(ValueError, match="stride"):
        DecoupledConv2d(2, 3, 3, padding="same", stride=2)
    layer = DecoupledConv2d(2, 3, 3, padding="same")
    layer.stride = (2, 1)
    with pytest.raises(ValueError, match="padding='same' needs stride 1, got stride=.2, 1."):
        layer(torch.ones(1, 2, 5, 5))
    with pytest.raises(ValueError, match="padding"):
        DecoupledConv2d(2, 3, 3, padding="full")
    for padding in (-1, (0, -1)):
        with pytest.raises(ValueError, match="padding must not be negative"):
            DecoupledConv2d(2, 3, 3, padding=padding)(torch.ones(1, 2, 5, 5))
    with pytest.raises(ValueError, match="padding_mode"):
        DecoupledConv2d(2, 3, 3, padding_mode="mirror")


def test_an_image_smaller_than_the_kernel_is_refused():
    with pytest.raises(ValueError, match="the kernel spans 3 pixels, but the padded input has 2; add padding"):
        DecoupledConv2d(2, 3, 3)(torch.ones(1, 2, 2, 5))
    assert DecoupledConv2d(2, 3, 3, padding=(1, 0))(torch.ones(1, 2, 2, 5)).shape == (1, 3, 2, 3)


def test_a_layer_is_a_conv2d_with_its_state_dict():
    layer = DecoupledConv2d(4, 6, (3, 2), (1, 2), (2, 1), (1, 2), 2, False, "circular", operator="ball_linear")
    plain = nn.Conv2d(4, 6, (3, 2), (1, 2), (2, 1), (1, 2), 2, False, "circular")
    assert isinstance(layer, nn.Conv2d)
    for attribute in plain.__constants__:
        assert getattr(layer, attribute) == getattr(plain, attribute)
    plain.load_state_dict(layer.state_dict())
    torch.manual_seed(0)
    layer = DecoupledConv2d(4, 6, 3)
    torch.manual_seed(0)
    plain = nn.Conv2d(4, 6, 3)
    assert all(torch.equal(layer.state_dict()[key], value) for key, value in plain.state_dict().items())


@pytest.mark.parametrize("operator", OPERATORS)
def test_pickle_and_deepcopy(operator):
    layer = DecoupledConv2d(2, 3, 3, operator={"name": operator} | UNUSUAL)
    input = torch.randn(2, 2, 5, 5)
    layer(input)
    expected = layer.eval()(input)
    whole = io.BytesIO()
    torch.save(layer, whole)
    whole.seek(0)
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), torch.load(whole, weights_only=False)):
        assert twin.operator == layer.operator
        assert torch.equal(twin(input), expected)
        twin.weight.data.zero_()
    assert torch.equal(layer(input), expected)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("operator", OPERATORS)
def test_set_operator(operator, training):
    """The filters stay the same objects; the answer is that of a layer that had this operator from the start."""
    settings = {"name": operator} | UNUSUAL
    layer = DecoupledConv2d(2, 3, 3, operator="ball_linear", dtype=torch.float64).train(training)
    weight, bias = layer.weight, layer.bias
    layer.set_operator(settings)
    assert layer.weight is weight and layer.bias is bias
    assert layer.operator == OperatorConfig.parse(settings)
    assert all(module.training == training for module in layer.modules())
    assert all(parameter.dtype == torch.float64 for parameter in layer.parameters())
    fresh = DecoupledConv2d(2, 3, 3, operator=settings, dtype=torch.float64).train(training)
    fresh.load_state_dict(layer.state_dict())
    input = torch.randn(2, 2, 5, 5, dtype=torch.float64)
    assert torch.equal(layer(input), fresh(input))
    layer.set_operator("sphere_cosine")
    assert set(layer.state_dict()) == {"weight", "bias"}


def test_set_operator_leaves_the_layer_as_it_was_when_it_refuses():
    layer = DecoupledConv2d(2, 3, 3, operator={"name": "tanh_cosine", "radius_mode": "learned"})
    magnitude = layer.magnitude
    with pytest.raises(ValueError, match="unknown operator"):
        layer.set_operator("tanh_cosin")
    assert layer.magnitude is magnitude and layer.operator.name == "tanh_cosine"


def test_the_settings_reach_the_layer():
    """Each field of the config changes the answer of an operator that uses it."""
    input = torch.randn(2, 2, 5, 5, generator=torch.Generator().manual_seed(0)) * 2
    users = {"sigmoid_k": "seg_sigmoid", "power": "seg_power"}
    for field, value in (UNUSUAL | {"radius_mode": "learned"}).items():
        outputs = []
        for settings in ({}, {field: value}):
            torch.manual_seed(0)
            layer = DecoupledConv2d(2, 3, 3, operator={"name": users.get(field, "seg_cosine")} | settings)
            outputs.append(layer(input))
        assert torch.equal(*outputs) == (field == "radius_mode"), field


def test_repr():
    text = repr(DecoupledConv2d(2, 3, 3, padding=1, operator="tanh_cosine"))
    assert text.startswith("DecoupledConv2d(") and "2, 3, kernel_size=(3, 3)" in text
    assert "operator=tanh_cosine" in text and "alpha" not in text
    text = repr(DecoupledConv2d(2, 3, 3, operator={"name": "ball_linear"} | UNUSUAL))
    assert "operator=ball_linear" in text
    for field, value in UNUSUAL.items():
        assert f"{field}={value}" in text
