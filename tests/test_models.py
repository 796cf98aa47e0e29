"""Architectures, ``build``, and the model that normalises its own images."""

import copy
import pickle

import numpy
import pytest
import timm
import torch
from PIL import Image
from torch import nn

import zoo
from operators import DecoupledConv2d, OperatorConfig
from zoo.architectures import ARCHITECTURES
from zoo.architectures.cnn import CNN
from zoo.architectures.network import UncentredBatchNorm2d
from zoo.models.building import build_from
from zoo.models.spec import ModelSpec
from zoo.training.freezing import freeze_norms

# Parameters counted by hand from the architecture's description, with 3 channels and 10 (1000) classes.
PARAMETERS = {
    "cnn6": 27 * 32 + 9 * (32 * 32 + 32 * 64 + 64 * 64 + 64 * 128 + 128 * 128) + 2 * 2 * (32 + 64 + 128) + 1290,
    "cnn9": 27 * 64
    + 9 * (2 * 64 * 64 + 64 * 128 + 2 * 128 * 128 + 128 * 256 + 2 * 256 * 256)
    + 2 * 3 * (64 + 128 + 256)
    + (4096 * 512 + 512)
    + 2 * 512
    + 5130,
    "cnn9_no_batchnorm": 27 * 64
    + 9 * (2 * 64 * 64 + 64 * 128 + 2 * 128 * 128 + 128 * 256 + 2 * 256 * 256)
    + 3 * (64 + 128 + 256)
    + (4096 * 512 + 512)
    + 5130,
    "resnet20": 27 * 16
    + 9 * (6 * 16 * 16 + 16 * 32 + 5 * 32 * 32 + 32 * 64 + 5 * 64 * 64)
    + 2 * (7 * 16 + 6 * 32 + 6 * 64)
    + 650,
    "resnet32": 27 * 16
    + 9 * (10 * 16 * 16 + 16 * 32 + 9 * 32 * 32 + 32 * 64 + 9 * 64 * 64)
    + 2 * (11 * 16 + 10 * 32 + 10 * 64)
    + 650,
    "resnet32_wide": 27 * 96
    + 9 * (10 * 96 * 96 + 96 * 192 + 9 * 192 * 192 + 192 * 384 + 9 * 384 * 384)
    + 2 * (11 * 96 + 10 * 192 + 10 * 384)
    + 3850,
    "resnet18_modified": 147 * 128
    + 9 * (2 * 128**2 + 128 * 256 + 4 * 256**2 + 256 * 512 + 6 * 512**2 + 512 * 1024 + 2 * 1024**2)
    + 3 * (3 * 128 + 5 * 256 + 7 * 512 + 3 * 1024)
    + 1025 * 1000,
}
CONVOLUTIONS = {
    "cnn6": 6,
    "cnn9": 9,
    "cnn9_no_batchnorm": 9,
    "resnet20": 19,
    "resnet32": 31,
    "resnet32_wide": 31,
    "resnet18_modified": 18,
}


@pytest.mark.parametrize("name", sorted(ARCHITECTURES))
def test_an_architecture_is_what_its_description_says(name):
    network = ARCHITECTURES[name]()
    assert sum(parameter.numel() for parameter in network.parameters()) == PARAMETERS[name]
    assert sum(isinstance(module, nn.Conv2d) for module in network.modules()) == CONVOLUTIONS[name]
    size = min(network.input_size, 64)
    features = network.eval()(torch.randn(2, 3, size, size))
    assert features.shape == (2, network.num_classes)


@pytest.mark.parametrize("name", sorted(ARCHITECTURES))
def test_an_architecture_speaks_timm(name):
    network = timm.create_model(name, num_classes=7, in_chans=1).eval()
    images = torch.randn(2, 1, min(network.input_size, 64), min(network.input_size, 64))
    features = network.forward_features(images)
    assert torch.equal(network.forward_head(features), network(images))
    assert network.forward_head(features, pre_logits=True).shape == (2, network.num_features)
    network.reset_classifier(3)
    assert network(images).shape == (2, 3) and network.get_classifier().out_features == 3
    network.reset_classifier(0)
    assert network(images).shape == (2, network.num_features)
    with pytest.raises(ValueError, match="zoo.load"):
        timm.create_model(name, pretrained=True)


def test_layers_of_the_plain_cnn_follow_its_switches():
    bare = ARCHITECTURES["cnn9"](batch_norm=False, relu=False)
    assert not any(isinstance(module, nn.BatchNorm2d | nn.BatchNorm1d | nn.ReLU) for module in bare.modules())
    assert all(module.bias is not None for module in bare.modules() if isinstance(module, nn.Conv2d))
    full = ARCHITECTURES["cnn9"]()
    assert sum(isinstance(module, nn.BatchNorm2d) for module in full.modules()) == 9
    assert all(module.bias is None for module in full.modules() if isinstance(module, nn.Conv2d))
    assert [module.kernel_size for module in full.modules() if isinstance(module, nn.MaxPool2d)] == [2, 2, 2]


@pytest.mark.parametrize("name", ["resnet20", "resnet32", "resnet32_wide"])
def test_a_residual_network_without_relu_is_affine(name):
    network = ARCHITECTURES[name](relu=False).eval().double()
    one, other, zero = torch.randn(2, 3, 16, 16).double(), torch.randn(2, 3, 16, 16).double(), torch.zeros(2, 3, 16, 16)
    sums = network(one + other) + network(zero.double())
    torch.testing.assert_close(sums, network(one) + network(other))
    assert not any(isinstance(module, nn.ReLU) for module in network.modules())


def test_features_are_what_a_convolution_over_the_whole_map_answers():
    network = ARCHITECTURES["cnn6"](in_chans=1, input_size=28, feature_filters=2).eval()
    images = torch.randn(5, 1, 28, 28)
    maps = network.forward_features(images)
    features = network.forward_head(maps, pre_logits=True)
    convolution = network.pool[0]
    assert features.shape == (5, 2) and maps.shape == (5, 128, 7, 7)
    torch.testing.assert_close(features, maps.flatten(1) @ convolution.weight.flatten(1).T)
    with pytest.raises(ValueError, match="built for 28×28"):
        network(torch.randn(5, 1, 32, 32))
    with pytest.raises(ValueError, match="hidden=3 or feature_filters=2, not both"):
        CNN((4,), 1, pools=1, hidden=3, feature_filters=2)


def test_the_modified_resnet_changes_width_by_plain_convolutions():
    network = ARCHITECTURES["resnet18_modified"]()
    strided = [module for module in network.modules() if isinstance(module, nn.Conv2d) and module.stride == (2, 2)]
    assert [(layer.in_channels, layer.out_channels, layer.kernel_size[0]) for layer in strided] == [
        (3, 128, 7),
        (128, 256, 3),
        (256, 512, 3),
        (512, 1024, 3),
    ]
    assert sum(isinstance(module, nn.PReLU) for module in network.modules()) == 18


def test_the_residual_shortcut_is_the_identity_padded_with_zero_channels():
    block = ARCHITECTURES["resnet20"]().blocks[3]
    for convolution in (block.conv1, block.conv2):
        nn.init.zeros_(convolution.weight)
    x = torch.rand(2, 16, 8, 8)
    out = block.eval()(x)
    assert torch.equal(out[:, 8:24], x[..., ::2, ::2])
    assert not out[:, :8].any() and not out[:, 24:].any()


@pytest.mark.parametrize("name", [*sorted(ARCHITECTURES), "resnet18", "mobilenetv3_small_050"])
def test_build_converts_the_architecture(name):
    model = zoo.build(name, "tanh_cosine", num_classes=4, in_chans=3)
    assert any(isinstance(module, DecoupledConv2d) for module in model.modules())
    assert model.training and len(model.class_names) == 4
    assert ModelSpec.from_dict(model.spec.to_dict()) == model.spec
    rebuilt = build_from(model.spec)
    rebuilt.load_state_dict(model.state_dict())


def test_build_passes_a_configured_operator_and_arguments_on():
    operator = OperatorConfig("seg", "cosine", radius=2.0, radius_mode="learned", weighting="linear")
    model = zoo.build("cnn9", operator, batch_norm=False, input_size=28, in_chans=1)
    layers = [module for module in model.modules() if isinstance(module, DecoupledConv2d)]
    assert all(layer.operator == operator for layer in layers) and len(layers) == 9
    assert model(torch.rand(2, 1, 28, 28)).shape == (2, 10)
    assert model.spec.input_size == 28 and model.spec.model_args == {"batch_norm": False}


def test_the_model_normalises_its_images():
    model = zoo.build("cnn6", "conv", in_chans=3, mean=[0.1, 0.2, 0.3], std=[0.5, 0.6, 0.7]).eval()
    images = torch.rand(2, 3, 8, 8)
    mean, std = torch.tensor([0.1, 0.2, 0.3]), torch.tensor([0.5, 0.6, 0.7])
    by_hand = (images.permute(0, 2, 3, 1) - mean) / std
    assert torch.allclose(model(images), model.network(by_hand.permute(0, 3, 1, 2)), atol=1e-6)


@pytest.mark.parametrize("in_chans", [1, 3])
@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "P", "1", "CMYK"])
@pytest.mark.parametrize("size", [(8, 8), (20, 13), (5, 30)])
def test_transform_makes_what_the_model_takes(in_chans, mode, size):
    pixels = numpy.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=numpy.uint8)
    image = Image.fromarray(pixels).convert(mode)
    model = zoo.build("cnn6", "sphere_cosine", in_chans=in_chans).eval()
    tensor = model.transform(image)
    assert tensor.shape == (in_chans, 8, 8) and 0 <= tensor.min() and tensor.max() <= 1
    assert model(tensor[None]).shape == (1, 10)
    if mode == "RGB" and size == (8, 8) and in_chans == 3:
        assert torch.equal(tensor, torch.from_numpy(pixels).permute(2, 0, 1) / 255)


def test_images_that_do_not_fit_are_refused():
    model = zoo.build("cnn6", "tanh_cosine", in_chans=1).eval()
    with pytest.raises(TypeError, match=r"floats in \[0, 1\], got torch.uint8; use image.float\(\) / 255"):
        model(torch.zeros(1, 1, 8, 8, dtype=torch.uint8))
    with pytest.raises(ValueError, match=r"shape \(N, 1, H, W\), got \(1, 3, 8, 8\).*model.transform"):
        model(torch.rand(1, 3, 8, 8))
    with pytest.raises(TypeError, match=r"got ndarray; model.transform\(image\)\[None\] makes one of a PIL image"):
        model(numpy.zeros((1, 1, 8, 8)))
    with pytest.raises(ValueError, match=r"images are 3×3 pixels, but this network needs at least 4×4"):
        model(torch.rand(1, 1, 3, 3))
    with pytest.raises(ValueError, match=r"images are 28×28 pixels, but this network was built for 32×32"):
        zoo.build("cnn9")(torch.rand(1, 3, 28, 28))


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (255.0, r"in \[0, 1\], got values from 0 to 255; divide bytes by 255"),
        (-2.0, r"got values from -2 to 0; .* do not normalise"),
        (float("inf"), "got values from 0 to inf"),
        (float("nan"), r"got NaN \(not a number\); find out where it arises"),
    ],
)
def test_the_range_of_every_batch_is_looked_at(wrong, message, training):
    model = zoo.build("cnn6", "tanh_cosine", in_chans=1).train(training)
    images = torch.zeros(2, 1, 8, 8)
    images[1, 0, 3, 4] = wrong
    for _ in range(2):
        with pytest.raises(ValueError, match=message):
            model(images)
        model(torch.rand(2, 1, 8, 8))


def test_graphs_and_empty_batches_have_no_range():
    model = zoo.build("cnn6", "tanh_cosine", in_chans=1).eval()
    bytes_ = torch.full((2, 1, 8, 8), 255.0)
    assert torch.vmap(lambda image: model(image[None]))(bytes_).shape == (2, 1, 10)
    assert torch.compile(model, backend="eager", fullgraph=True)(bytes_).shape == (2, 10)
    assert model(bytes_[:0]).shape == (0, 10)


@pytest.mark.parametrize("training", [False, True])
def test_an_accelerator_that_trains_is_not_kept_waiting(training):
    model = zoo.build("cnn6", "conv", in_chans=1).train(training)
    model(torch.rand(2, 1, 8, 8))
    # Numbers cannot be read from the meta device, which stands for an accelerator here.
    model, images = model.to("meta"), torch.zeros(2, 1, 8, 8, device="meta")
    if training:
        assert model(images).shape == (2, 10)
    else:
        with pytest.raises(RuntimeError, match="meta"):
            model(images)


@pytest.mark.parametrize("images_are", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("model_is", [torch.float64, torch.float32, torch.bfloat16])
def test_images_of_any_precision_are_taken(model_is, images_are):
    model = zoo.build("cnn6", "tanh_cosine", in_chans=1).to(model_is).eval()
    images = torch.rand(2, 1, 8, 8).to(images_are)
    assert torch.equal(model(images), model(images.to(model_is))) and model(images).dtype == model_is


@pytest.mark.parametrize("mode", ["RGBA", "LA", "PA", "P", "L", "RGB", "RGBa", "La", "1"])
@pytest.mark.parametrize("in_chans", [1, 3])
def test_a_drawing_on_a_transparent_ground_is_seen(mode, in_chans):
    drawing = torch.zeros(8, 8, dtype=torch.bool)
    drawing[2:6, 3] = True
    # The drawing is black and so are the hidden pixels, but for the modes with one transparent colour.
    black = Image.new("RGBA", (8, 8))
    black.putalpha(Image.fromarray(drawing.numpy().astype(numpy.uint8) * 255))
    if mode == "P":
        image = Image.fromarray(drawing.numpy().astype(numpy.uint8)).convert("P")
        image.putpalette([0, 0, 0] * 256)
        image.info["transparency"] = bytes([0, 255])
    elif mode in ("L", "RGB", "1"):
        image = Image.fromarray(numpy.where(drawing, 0, 255).astype(numpy.uint8)).convert(mode)
        image.info["transparency"] = (255, 255, 255) if mode == "RGB" else 255
    elif mode == "PA":
        image = Image.new("L", (8, 8)).convert("P").convert("PA")
        image.putalpha(black.getchannel("A"))
    elif mode == "La":
        image = black.convert("LA").convert("La")
    else:
        image = black.convert(mode)
    assert image.mode == mode
    pixels = zoo.build("cnn6", in_chans=in_chans).transform(image)
    assert torch.equal(pixels, (~drawing).float().expand(in_chans, 8, 8))


def test_transparency_is_blended_with_white():
    image = Image.new("RGBA", (8, 8), (200, 0, 100, 51))
    expected = torch.tensor([244, 204, 224]).view(3, 1, 1) / 255  # a fifth of the colour and four fifths of white
    assert torch.equal(zoo.build("cnn6").transform(image), expected.expand(3, 8, 8))


@pytest.mark.parametrize("what", [numpy.zeros((8, 8), numpy.uint8), torch.zeros(1, 8, 8), "digit.png"], ids=type)
def test_transform_takes_pil_images_only(what):
    with pytest.raises(
        TypeError, match=rf"a PIL image, got {type(what).__name__}; Image.open\(file\) .* Image.fromarray"
    ):
        zoo.build("cnn6").transform(what)


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "levit_128"])
def test_a_network_of_fixed_size_is_built_for_the_images(name):
    model = zoo.build(name, "conv", input_size=64, in_chans=1).eval()
    assert model(torch.rand(2, 1, 64, 64)).shape == (2, 10) and model.spec.input_size == 64
    build_from(model.spec).load_state_dict(model.state_dict())
    assert zoo.build(name).spec.input_size == 224


@pytest.mark.parametrize(
    ("name", "made_for"),
    [("vit_tiny_patch16_224", 224), ("inception_v3", 299), ("nest_tiny", 224)],
)
def test_a_size_that_a_network_cannot_take_is_refused_when_it_is_built(name, made_for):
    message = rf"{name}, made for images of {made_for}×{made_for} pixels, cannot take 8×8 \(.*--data.input_size.*cnn6"
    with pytest.raises(ValueError, match=message):
        zoo.build(name, input_size=8)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"architecture": "resnet21"}, ValueError, "unknown architecture 'resnet21'.*resnet20.*one of .* more"),
        ({"architecture": "cnn9", "bogus": 1}, TypeError, "unknown argument of cnn9 'bogus'.*batch_norm"),
        ({"architecture": "cnn9", "operator": "tanhcosine"}, ValueError, "Did you mean 'tanh_cosine'"),
        (
            {"architecture": "cnn9", "num_classes": 3, "class_names": ["a"]},
            ValueError,
            "num_classes=3, but there are 1",
        ),
        ({"architecture": "cnn9", "num_classes": 0}, ValueError, "at least one class"),
        ({"architecture": "cnn9", "in_chans": 0}, ValueError, "in_chans must be at least 1, got 0"),
        ({"architecture": "cnn9", "input_size": 0}, ValueError, "input_size must be at least 1, got 0"),
        ({"architecture": "cnn9", "mean": [0.5]}, ValueError, "mean needs one number for each of the 3 channels"),
        ({"architecture": "cnn9", "std": [1, 0, 1]}, ValueError, "std is that of pixels in .0, 1., more than 0"),
    ],
)
def test_build_refuses(arguments, error, message):
    with pytest.raises(error, match=message):
        zoo.build(**arguments)


def test_list_architectures_has_ours_and_timms():
    assert set(ARCHITECTURES) == set(zoo.list_architectures(own=True))
    assert set(ARCHITECTURES) | {"resnet50", "convnext_tiny"} <= set(zoo.list_architectures())


def test_a_model_survives_copying_and_pickling():
    model = zoo.build("cnn6", {"name": "ball_sigmoid", "radius_mode": "learned"}, in_chans=1).eval()
    images = torch.rand(2, 1, 8, 8)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(images), model(images)) and twin.spec == model.spec


@pytest.fixture
def photos(tmp_path):
    """Two images of other sizes and modes than the network's, as files."""
    noise = numpy.random.default_rng(0)
    images = [Image.fromarray(noise.integers(0, 256, shape, dtype="uint8")) for shape in ((20, 12), (9, 9, 3))]
    files = [tmp_path / f"{place}.png" for place in range(2)]
    for image, file in zip(images, files, strict=True):
        image.save(file)
    return images, files


def test_classify_names_the_classes_of_images_files_and_tensors_alike(photos):
    images, files = photos
    model = zoo.load("digits_cnn6_tanh_cosine")
    batch = torch.stack([model.transform(image) for image in images])
    with torch.inference_mode():
        probabilities = model(batch).softmax(1)
    expected = [
        sorted(zip(model.class_names, row, strict=True), key=lambda pair: -pair[1]) for row in probabilities.tolist()
    ]
    for given in (images, files, [*map(str, files)], tuple(batch), [images[0], files[1]], batch, iter(files)):
        found = model.classify(given, top=10)
        assert [[name for name, _ in row] for row in found] == [[name for name, _ in row] for row in expected]
        assert torch.tensor([[value for _, value in row] for row in found]).allclose(
            torch.tensor([[value for _, value in row] for row in expected]), atol=1e-6
        )
    for one in (images[0], files[0], str(files[0]), batch[0]):
        found = model.classify(one)
        assert len(found) == 5 and [name for name, _ in found] == [name for name, _ in expected[0][:5]]
    assert model.classify(images[0], top=1) == model.classify(images)[0][:1]
    assert len(model.classify(images[0], top=99)) == 10 and model.classify([]) == []


def test_classify_leaves_the_model_as_it_was(photos):
    model = zoo.build("cnn6", "tanh_cosine", in_chans=1, input_size=8)
    # A normalisation may rest while the others train.
    next(module for module in model.modules() if isinstance(module, nn.BatchNorm2d)).eval()
    before, modes = copy.deepcopy(model.state_dict()), [module.training for module in model.modules()]
    first = model.classify(photos[0])
    assert first == model.classify(photos[0]) and len(set(modes)) == 2
    assert [module.training for module in model.modules()] == modes
    assert all(value.equal(before[name]) for name, value in model.state_dict().items())
    assert model.half().classify(photos[0][0], top=1)[0][0] == first[0][0][0]


def test_classify_refuses_what_is_no_image(tmp_path):
    model = zoo.load("digits_cnn6_conv")
    (tmp_path / "notes.png").write_text("no image")
    for given, error, message in [
        (tmp_path / "nowhere.png", FileNotFoundError, "no image file .*nowhere.png; check the path"),
        ([tmp_path], FileNotFoundError, "no image file .*; check the path"),
        (tmp_path / "notes.png", ValueError, "notes.png is no readable image .no image of a known kind"),
        (3, TypeError, "expected a PIL image, got int"),
        ([b"bytes"], TypeError, "expected a PIL image, got bytes"),
        (numpy.zeros((8, 8), dtype="uint8"), TypeError, "got ndarray; Image.open.file. reads one, Image.fromarray"),
        (torch.zeros(1, 8, 8, dtype=torch.uint8), TypeError, "use image.float.. / 255"),
        (torch.zeros(8, 8), ValueError, "must have shape .N, 1, H, W."),
        (torch.zeros(3, 8, 8), ValueError, "must have shape .N, 1, H, W."),
        (torch.full((1, 8, 8), 200.0), ValueError, "divide bytes by 255"),
    ]:
        with pytest.raises(error, match=message):
            model.classify(given)
    for top in (0, 2.0, True):
        with pytest.raises(ValueError, match=f"top is a number of classes, at least 1, got {top}"):
            model.classify(torch.zeros(1, 8, 8), top=top)


def test_batch_norm_without_bias_divides_by_the_root_of_the_mean_square():
    torch.manual_seed(0)
    norm = UncentredBatchNorm2d(4)
    with torch.no_grad():
        norm.weight.copy_(torch.tensor([1.0, 2.0, 0.5, 1.0]))
    x = 3 + 2 * torch.randn(16, 4, 5, 5)
    square = x.square().mean((0, 2, 3))
    expected = x * (norm.weight / (square + 1e-5).sqrt()).view(-1, 1, 1)
    assert torch.allclose(norm(x), expected, rtol=1e-5)
    # One step of the moving average from 1, of which evaluation makes use.
    assert torch.allclose(norm.mean_square, 0.9 + 0.1 * square)
    scale = norm.weight / (norm.mean_square + 1e-5).sqrt()
    assert torch.allclose(norm.eval()(x), x * scale.view(-1, 1, 1), rtol=1e-5)
    before = norm.mean_square.clone()
    norm(x)
    assert torch.equal(norm.mean_square, before)


def test_batch_norm_without_bias_works_in_any_precision():
    torch.manual_seed(0)
    norm = UncentredBatchNorm2d(2).double()
    assert torch.autograd.gradcheck(norm, torch.randn(3, 2, 2, 2, dtype=torch.float64, requires_grad=True))
    # The mean of the squares of such numbers is right in float32 alone.
    x = (100 * torch.randn(16, 2, 4, 4)).half()
    norm = UncentredBatchNorm2d(2).half()
    assert torch.allclose(norm(x).float(), UncentredBatchNorm2d(2)(x.float()), rtol=2e-3)


def test_statistics_without_a_mean_rest_like_others():
    model = zoo.build("resnet20", "sphere_cosine", batch_norm_bias=False).train()
    freeze_norms(model)
    before = model.network.bn1.mean_square.clone()
    model(torch.rand(4, 3, 32, 32))
    assert torch.equal(model.network.bn1.mean_square, before) and model.network.training


@pytest.mark.parametrize("operator", ["conv", "sphere_cosine"])
def test_resnet20_without_biases_has_none(operator):
    model = zoo.build("resnet20", operator, batch_norm_bias=False)
    assert not any(name.endswith("bias") for name in model.state_dict())
    model.reset_classifier(["a", "b"])
    assert model.network.fc.bias is None
    model.eval()
    with torch.no_grad():
        # Of an image of the mean colour it knows nothing.
        assert model(model.mean.expand(1, 3, 32, 32)).abs().max() == 0
