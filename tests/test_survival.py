"""What every operator survives: compilers, exporters, half precision, copies, function transforms, two processes."""

import copy
import functools
import io
import itertools
import pickle
import shutil
import warnings

import pytest
import torch
import torch.distributed
import torch.multiprocessing
from torch import nn

from operators import ANGULARS, MAGNITUDES, RADIUS_MODES, DecoupledConv2d, OperatorConfig, convert_decoupled
from zoo.models.building import build_from

OPERATORS = [f"{magnitude}_{angular}" for magnitude, angular in itertools.product(MAGNITUDES, ANGULARS)]
WITH_RADIUS = [name for name, magnitude in MAGNITUDES.items() if magnitude.uses_radius]
every_operator = pytest.mark.parametrize("operator", OPERATORS)
# Compilers and exporters take long to start: all magnitudes of an angular function share a network.
every_angular = pytest.mark.parametrize("angular", ANGULARS)
needs_compiler = pytest.mark.skipif(
    not (shutil.which("g++") or shutil.which("c++")), reason="inductor needs a C++ compiler"
)
# Another order of summation, multiplied by the slope of asin and by that of 1 / n for small n.
SINGLE = {"rtol": 1e-4, "atol": 1e-5}
EXACT = {"rtol": 1e-10, "atol": 1e-12}

GEOMETRIES = {
    "plain": {},
    "groups": {"groups": 2, "stride": 2, "padding": (1, 2)},
    "depthwise": {"groups": 4, "out_channels": 8, "kernel_size": (2, 3), "dilation": (3, 2)},
    "same_even_kernel": {"kernel_size": (2, 4), "padding": "same"},
    "kernel_1x1": {"kernel_size": 1, "bias": False},
    "reflect": {"padding": 1, "padding_mode": "reflect", "stride": (1, 2)},
    "replicate": {"padding": (2, 1), "padding_mode": "replicate"},
    "circular": {"padding": 2, "padding_mode": "circular", "groups": 2},
}
# Neither a batch of one, to which torch.compile gives a graph of its own, nor 16, where torch's convolution changes.
OTHER_SHAPES = [(2, (7, 8)), (5, (12, 9))]


class Branches(nn.Module):
    """Layers beside one another, all with the same input; returns each one's answer under its name."""

    def __init__(self, layers):
        super().__init__()
        self.layers = nn.ModuleDict(layers)

    def forward(self, images):
        return {name: layer(images) for name, layer in self.layers.items()}


def make_layer(operator, *, in_channels=4, out_channels=6, kernel_size=3, **arguments):
    torch.manual_seed(0)
    layer = DecoupledConv2d(in_channels, out_channels, kernel_size, operator=operator, **arguments)
    with torch.no_grad():
        layer.weight.copy_(torch.randn_like(layer.weight) / 3)
        for name, parameter in layer.named_parameters():
            if name.endswith("radius"):
                parameter.mul_(torch.linspace(0.8, 1.2, parameter.numel()).view_as(parameter))
    return layer


def make_branches(angular, magnitudes=MAGNITUDES, **settings):
    return Branches({name: make_layer(OperatorConfig(name, angular, **settings)) for name in magnitudes})


def make_geometries(*names):
    """Return a branch for each geometry, ready for evaluation; their operators differ in all that they can."""
    operators = itertools.cycle(
        [
            OperatorConfig("mix", "sigmoid", "linear"),
            OperatorConfig("log", "square_cosine"),
            OperatorConfig("tanh", "cosine", "linear", radius_mode="learned_per_channel"),
            OperatorConfig("ball", "linear", "tanh", radius_mode="learned", radius_relative=True),
            OperatorConfig("seg", "power", radius_mode="learned_per_channel", radius_relative=True),
        ]
    )
    network = Branches({name: make_layer(next(operators), **GEOMETRIES[name]) for name in names or GEOMETRIES})
    network(make_images(3))  # the running norm of training is what evaluation uses
    return network.eval()


def make_network(operator, **settings):
    """Return two layers that were converted, in float64; the gradient of the first passes through the second."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.Tanh(), nn.Conv2d(4, 2, 3, groups=2)).double()
    return convert_decoupled(network, {"name": operator, **settings})[0]


def make_images(batch, *, channels=4, size=(7, 8), dtype=torch.float32, seed=1):
    """Return images whose patches have norms from far below to far above 1."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(batch, channels, *size, generator=generator, dtype=dtype)
    return images * torch.logspace(-2, 0.5, size[1], dtype=dtype)


def answers_and_gradients(network, images):
    """Return what :class:`Branches` answer, and the gradients of the images and of every parameter."""
    images = images.clone().requires_grad_()
    answers = network(images)
    names, parameters = zip(*network.named_parameters(), strict=True)
    total = sum(answer.float().square().sum() for answer in answers.values())
    gradients = torch.autograd.grad(total, [images, *parameters])
    return answers | {f"gradient of {name}": value for name, value in zip(["images", *names], gradients, strict=True)}


def check_compiled(network, batches, *, tolerance=SINGLE, **options):
    """Compile a copy; outputs, gradients and what is left in the buffers must be those of ``network``."""
    torch.compiler.reset()
    twin = copy.deepcopy(network)
    twin.compile(fullgraph=True, **options)
    for images in batches:
        expected = answers_and_gradients(network, images)
        assert all(value.any() for value in expected.values())
        torch.testing.assert_close(answers_and_gradients(twin, images), expected, **tolerance)
    torch.testing.assert_close(dict(twin.named_buffers()), dict(network.named_buffers()), **tolerance)
    return twin


def steps_of(network):
    return [buffer.item() for name, buffer in network.named_buffers() if name.endswith("steps")]


@every_angular
def test_compiled_operators_are_the_eager_ones(angular):
    check_compiled(make_branches(angular), [make_images(3)], backend="aot_eager")


@pytest.mark.parametrize(("training", "angular"), [(True, "linear"), (False, "cosine")])
def test_a_compiled_relative_radius_is_the_eager_one(training, angular):
    """In training the second step must move the running norm again: neither the step nor its count is a constant."""
    settings = {"radius_mode": "learned_per_channel", "radius_relative": True}
    network = make_branches(angular, WITH_RADIUS, **settings)
    network(make_images(3, seed=3))
    batches = [make_images(3), make_images(3, seed=2) * 2]
    twin = check_compiled(network.train(training), batches, backend="aot_eager")
    assert steps_of(twin) == [3 if training else 1] * len(WITH_RADIUS)


def test_a_compiled_graph_takes_images_of_every_size():
    torch.compiler.reset()
    network = make_geometries("groups", "reflect")
    compiled = torch.compile(network, backend="aot_eager", fullgraph=True, dynamic=True)
    with torch.no_grad():
        compiled(make_images(3))
        with torch._dynamo.config.patch(error_on_recompile=True):
            for batch, size in OTHER_SHAPES:
                images = make_images(batch, size=size)
                torch.testing.assert_close(compiled(images), network(images), **SINGLE)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_compiled_operators_see_autocast(dtype):
    layers = {name: make_layer({"name": name, "radius_mode": "learned"}) for name in ("tanh_cosine", "ball_linear")}
    coarse = {"rtol": 2**-7, "atol": 2**-7}
    with torch.autocast("cpu", dtype):
        check_compiled(Branches(layers), [make_images(3)], backend="aot_eager", tolerance=coarse)


@pytest.mark.parametrize("operator", ["tanh_cosine", "log_square_cosine", "ball_linear"])
def test_compiled_function_transforms_are_the_eager_ones(operator):
    layer, images = make_layer({"name": operator, "radius_mode": "learned"}), make_images(3)

    def energy(images):
        return layer(images).square().sum()

    gradient = torch.func.grad(energy)
    answers = torch.func.vmap(lambda image: layer(image[None])[0])
    for function in (gradient, answers):
        torch.compiler.reset()
        compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(compiled(images), function(images), **SINGLE)


@needs_compiler
def test_inductor_on_three_operators():
    """One computed as a scaled inner product, two by their angle; one with everything that a radius can have."""
    layers = {
        "tanh_cosine": make_layer("tanh_cosine"),
        "ball_sigmoid": make_layer(
            OperatorConfig("ball", "sigmoid", radius_mode="learned_per_channel", radius_relative=True)
        ),
        "log_power": make_layer("log_power"),
    }
    with torch._inductor.config.patch(compile_threads=1):  # a pool of compilers would cost more than these kernels
        check_compiled(Branches(layers), [make_images(3), make_images(3, seed=2)], backend="inductor")


@pytest.mark.slow
@needs_compiler
@pytest.mark.parametrize("training", [True, False])
@every_angular
def test_inductor_on_every_operator(angular, training):
    network = make_branches(angular, radius_mode="learned_per_channel", radius_relative=True).train(training)
    check_compiled(network, [make_images(3), make_images(3, seed=2)], backend="inductor")


@functools.cache
def export_branches(angular):
    network = make_branches(angular).eval()
    return network, torch.export.export(network, (make_images(3),), dynamic_shapes=({0: torch.export.Dim("batch")},))


@functools.cache
def export_geometries(*dimensions):
    network, shape = make_geometries(), {dimension: torch.export.Dim.DYNAMIC for dimension in dimensions}
    return network, torch.export.export(network, (make_images(3),), dynamic_shapes=(shape,))


def check_exported(program, network, images):
    with torch.no_grad():
        torch.testing.assert_close(program.module()(images), network(images), **SINGLE)


@every_angular
def test_an_exported_program_takes_another_batch(angular):
    network, program = export_branches(angular)
    for batch in (1, 5):
        check_exported(program, network, make_images(batch, seed=2))


def test_an_exported_program_of_every_geometry_takes_another_batch():
    network, program = export_geometries(0)
    check_exported(program, network, make_images(5))


@pytest.mark.slow
@pytest.mark.parametrize(("batch", "size"), OTHER_SHAPES)
def test_an_exported_program_of_every_geometry_takes_images_of_another_size(batch, size):
    network, program = export_geometries(0, 2, 3)
    check_exported(program, network, make_images(batch, size=size))


def check_onnx(exported, network, images):
    """Run an ONNX program on ``images``: each answer must be that of ``network``."""
    onnxruntime = pytest.importorskip("onnxruntime")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(exported.model_proto.SerializeToString(), options)
    (input,) = session.get_inputs()
    with torch.no_grad():
        expected = network(images)
    for answer, (name, value) in zip(session.run(None, {input.name: images.numpy()}), expected.items(), strict=True):
        message = functools.partial("{}: {}".format, name)
        torch.testing.assert_close(torch.from_numpy(answer), value, rtol=1e-5, atol=1e-5, msg=message)


# Each magnitude in both ways of computing; the three other angular functions are in every_geometry too.
@pytest.mark.parametrize(
    "angular", [pytest.param(name, marks=[] if name in ("cosine", "linear") else pytest.mark.slow) for name in ANGULARS]
)
def test_onnx_takes_another_batch(angular):
    pytest.importorskip("onnxscript")
    network, program = export_branches(angular)
    check_onnx(torch.onnx.export(program, dynamo=True, verbose=False), network, make_images(5, seed=2))


def test_onnx_of_every_geometry_takes_another_batch():
    pytest.importorskip("onnxscript")
    network, program = export_geometries(0)
    check_onnx(torch.onnx.export(program, dynamo=True, verbose=False), network, make_images(5))


@pytest.mark.slow
def test_onnx_of_every_geometry_takes_images_of_another_size():
    pytest.importorskip("onnxscript")
    network, program = export_geometries(0, 2, 3)
    exported = torch.onnx.export(program, dynamo=True, verbose=False)
    for batch, size in OTHER_SHAPES:
        check_onnx(exported, network, make_images(batch, size=size))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["whole", "partial"])
def test_onnx_of_a_whole_model_takes_another_batch(kind):
    pytest.importorskip("onnxscript")
    import zoo  # not above: the processes that are spawned below import this file too

    torch.manual_seed(0)
    if kind == "whole":
        operator = {"name": "tanh_linear", "radius_mode": "learned", "radius_relative": True}
        model, size = zoo.build("cnn6", operator, in_chans=1), 8
        train_one_step(model, torch.rand(4, 1, size, size))
    else:
        model, size = zoo.build("test_efficientnet", "tanh_cosine", keep=["conv_stem"], num_classes=3), 32
    images = torch.rand(5, model.spec.in_chans, size, size)
    batch = ({0: torch.export.Dim("batch")},)
    exported = torch.onnx.export(model.eval(), (images[:3],), dynamo=True, dynamic_shapes=batch, verbose=False)
    check_onnx(exported, lambda images: {"logits": model(images)}, images)


def relative_error(value, expected):
    return (value - expected).norm().item() / expected.norm().item()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@every_operator
def test_gradients_under_autocast_are_those_of_float32(operator, dtype):
    """Through two layers; with float16, which has three bits more, under a loss scale of 2^16."""
    network = make_network(operator, radius_mode="learned").float()
    images = make_images(4, channels=2)
    scale = 2**16 if dtype == torch.float16 else 1
    record = []
    for enabled in (True, False):
        network.zero_grad()
        leaf = images.clone().requires_grad_()
        with torch.autocast("cpu", dtype, enabled=enabled):
            answer = network(leaf).float()
        (answer.square().mean() * scale).backward()
        record.append({"answer": answer.detach(), "images": leaf.grad / scale})
        record[-1] |= {name: parameter.grad / scale for name, parameter in network.named_parameters()}
    # Squared, an inner product's rounding counts twice.
    tolerance = (2**-5 if dtype == torch.bfloat16 else 2**-8) * (
        2 if operator.endswith(("square_cosine", "power")) else 1
    )
    for name, expected in record[1].items():
        assert record[0][name].isfinite().all() and record[0][name].dtype == torch.float32, name
        assert relative_error(record[0][name], expected) < tolerance, name


LAYOUTS = list(itertools.product([torch.contiguous_format, torch.channels_last], repeat=2))


@pytest.mark.parametrize("geometry", ["plain", "groups", "depthwise"])
@every_operator
def test_channels_last_changes_no_value_and_no_gradient(operator, geometry):
    network = Branches({"layer": make_layer(operator, **GEOMETRIES[geometry])})
    images = make_images(3)
    expected = answers_and_gradients(network, images)
    for input, filters in LAYOUTS[1:]:
        network.to(memory_format=filters)
        outcome = answers_and_gradients(network, images.to(memory_format=input))
        torch.testing.assert_close(outcome, expected, **SINGLE)


# torch's own advice on speed; it is about the plain convolution that the layer is compared with.
@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("geometry", GEOMETRIES)
@pytest.mark.parametrize("magnitude", MAGNITUDES)
def test_channels_last_stays_where_the_plain_convolution_keeps_it(magnitude, geometry, dtype):
    operator = OperatorConfig(magnitude, "cosine", radius_mode="learned_per_channel", radius_relative=True)
    for input, filters in LAYOUTS:
        layer = make_layer(operator, **GEOMETRIES[geometry]).to(dtype=dtype, memory_format=filters)
        images = make_images(3).to(dtype=dtype, memory_format=input)
        assert layer(images).stride() == nn.Conv2d.forward(layer, images).stride()


def gradient_penalty(network, images):
    """Return the penalty of Wasserstein critics: how far the length of the images' gradients is from 1."""
    images = images.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(network(images).sum(), images, create_graph=True)
    return (gradient.flatten(1).norm(dim=1) - 1).square().mean()


@every_operator
def test_the_gradient_of_a_gradient_penalty(operator):
    """Against central differences along a random direction in the space of all parameters."""
    network = make_network(operator, radius=0.8, radius_mode="learned_per_channel", power=2.5)
    images = make_images(3, channels=2, dtype=torch.float64)
    parameters = list(network.parameters())
    # The last layer's bias is a constant, which no gradient of the answer shows.
    gradients = torch.autograd.grad(gradient_penalty(network, images), parameters, materialize_grads=True)
    torch.manual_seed(2)
    directions = [torch.randn_like(parameter) for parameter in parameters]
    slope = sum((gradient * direction).sum() for gradient, direction in zip(gradients, directions, strict=True))
    step, penalties = 1e-6, []
    for sign in (1, -1):
        twin = copy.deepcopy(network)
        with torch.no_grad():
            for parameter, direction in zip(twin.parameters(), directions, strict=True):
                parameter += sign * step * direction
        penalties.append(gradient_penalty(twin, images).item())
    assert slope.item() == pytest.approx((penalties[0] - penalties[1]) / (2 * step), rel=1e-5, abs=1e-7)
    assert abs(slope.item()) > 1e-3


@every_operator
def test_a_gradient_penalty_is_finite_in_float32_where_the_image_is_black(operator):
    network = make_network(operator, radius_mode="learned").float()
    images = make_images(3, channels=2)
    images[0] = 0
    images[1, :, :, :5] = 0
    gradient_penalty(network, images).backward()
    gradients = {name: parameter.grad for name, parameter in network.named_parameters() if name != "2.bias"}
    assert all(gradient.isfinite().all() and gradient.any() for gradient in gradients.values())


def train_one_step(model, images):
    model.train().zero_grad()
    model(images).square().mean().backward()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter -= 0.1 * parameter.grad


@every_operator
def test_a_model_in_the_middle_of_training_survives_every_kind_of_copy(operator):
    import zoo

    torch.manual_seed(0)
    operator = {"name": operator, "radius_mode": "learned_per_channel", "radius_relative": True}
    model = zoo.build("cnn6", operator, in_chans=1)
    *batches, images = torch.rand(3, 2, 1, 8, 8)
    for batch in batches:
        train_one_step(model, batch)
    rebuilt = build_from(model.spec)
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    rebuilt.load_state_dict(torch.load(file, weights_only=True))
    twins = {
        "deepcopy": copy.deepcopy(model),
        "pickle": pickle.loads(pickle.dumps(model)),
        "state_dict": rebuilt,
    }
    before = copy.deepcopy(model.state_dict())
    after = {}
    for name, twin in twins.items():
        assert twin.spec == model.spec, name
        assert torch.equal(twin.eval()(images), model.eval()(images)), name
        train_one_step(twin, images)
        after[name] = twin.state_dict()
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key]), key
    train_one_step(model, images)
    for key, value in model.state_dict().items():
        assert not value.is_floating_point() or not torch.equal(value, before[key]), key
        for name, state in after.items():
            assert state.keys() == before.keys() and torch.equal(state[key], value), f"{name}: {key}"


def parts_of(network):
    """Return the parameters and the buffers as :func:`torch.func.functional_call` takes them."""
    parameters = {name: parameter.detach().clone() for name, parameter in network.named_parameters()}
    return parameters, {name: buffer.clone() for name, buffer in network.named_buffers()}


def loss_of(network):
    def loss(parameters, buffers, images):
        return torch.func.functional_call(network, parameters | buffers, (images,)).square().sum()

    return loss


def gradients_by_backward(network, images):
    network.zero_grad()
    network(images).square().sum().backward()
    return {name: parameter.grad.clone() for name, parameter in network.named_parameters()}


# torch vmaps the backward pass of Tensor.unfold, by which the patch norm sums windows, as a loop, and says so.
@pytest.mark.filterwarnings("ignore:There is a performance drop because we have not yet implemented the batching rule")
@every_operator
def test_gradients_of_single_images_by_vmap_are_those_of_a_loop(operator):
    network = make_network(operator, radius_mode="learned_per_channel", radius_relative=True)
    images = make_images(4, channels=2, dtype=torch.float64)
    network(images)
    parameters, buffers = parts_of(network.eval())
    gradient = torch.func.grad(loss_of(network))
    torch.testing.assert_close(gradient(parameters, buffers, images), gradients_by_backward(network, images), **EXACT)
    by_image = torch.func.vmap(gradient, in_dims=(None, None, 0))(parameters, buffers, images[:, None])
    loop = [gradients_by_backward(network, image[None]) for image in images]
    expected = {name: torch.stack([gradients[name] for gradients in loop]) for name in parameters}
    torch.testing.assert_close(by_image, expected, **EXACT)


@pytest.mark.parametrize("radius_mode", RADIUS_MODES)
@pytest.mark.parametrize("magnitude", WITH_RADIUS)
def test_function_transforms_in_training_move_the_buffers_they_are_given(magnitude, radius_mode):
    """As for batch normalisation: a transform may not change what it was not given."""
    network = make_network(f"{magnitude}_linear", radius_mode=radius_mode, radius_relative=True)
    images = make_images(4, channels=2, dtype=torch.float64)
    parameters, buffers = parts_of(network)
    gradients = torch.func.grad(loss_of(network))(parameters, buffers, images)
    assert steps_of(network) == [0, 0]
    torch.testing.assert_close(gradients, gradients_by_backward(network, images), **EXACT)
    torch.testing.assert_close(buffers, dict(network.named_buffers()), **EXACT)


# torch's own forward mode scripts its formulas by the torch.jit that it deprecates.
@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:FutureWarning")
@every_operator
def test_forward_mode_is_the_transpose_of_reverse_mode(operator):
    network = make_network(operator, radius_mode="learned")
    images = make_images(2, channels=2, dtype=torch.float64)
    tangents = make_images(2, channels=2, dtype=torch.float64, seed=2)
    answer, pushed = torch.func.jvp(network, (images,), (tangents,))
    torch.manual_seed(3)
    cotangents = torch.randn_like(answer)
    _, pull = torch.func.vjp(network, images)
    (pulled,) = pull(cotangents)
    torch.testing.assert_close((pushed * cotangents).sum(), (pulled * tangents).sum(), **EXACT)


def joined_batch():
    images = make_images(6, channels=2, dtype=torch.float64)
    images[3:] *= 4
    return images


def gradients_of_the_mean(network, images):
    network(images).square().mean().backward()
    return {name.removeprefix("module."): parameter.grad for name, parameter in network.named_parameters()}


def gradients_on_one_rank(rank, folder):
    warnings.simplefilter("error")
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    half = joined_batch()[3 * rank : 3 * rank + 3]
    networks = {name: make_network(name, radius_mode="learned_per_channel") for name in OPERATORS}
    parallel = nn.parallel.DistributedDataParallel
    record = {name: gradients_of_the_mean(parallel(network), half) for name, network in networks.items()}
    torch.save(record, f"{folder}/rank{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def gradients_on_two_ranks(tmp_path_factory):
    if not torch.distributed.is_available():
        pytest.skip("this torch is built without torch.distributed")
    folder = tmp_path_factory.mktemp("ranks")
    torch.multiprocessing.spawn(gradients_on_one_rank, (str(folder),), nprocs=2)
    return [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in range(2)]


@every_operator
def test_two_processes_have_the_gradients_of_one_with_the_joined_batch(operator, gradients_on_two_ranks):
    network = make_network(operator, radius_mode="learned_per_channel")
    expected = gradients_of_the_mean(network, joined_batch())
    assert all(gradient.any() for gradient in expected.values())
    for record in gradients_on_two_ranks:
        torch.testing.assert_close(record[operator], expected, **EXACT)


@pytest.fixture
def without_tf32():
    """Switch off the convolutions of 10-bit operands that a GPU calls float32."""
    convolution = torch.backends.cudnn.conv
    before, convolution.fp32_precision = convolution.fp32_precision, "ieee"
    yield
    convolution.fp32_precision = before


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.usefixtures("without_tf32")
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
@every_operator
def test_a_gpu_answers_as_the_cpu_does(operator, memory_format):
    operator = {"name": operator, "radius_mode": "learned_per_channel", "radius_relative": True}
    network = Branches({name: make_layer(operator, **settings) for name, settings in GEOMETRIES.items()})
    twin = copy.deepcopy(network).to("cuda", memory_format=memory_format)
    for images in (make_images(3), make_images(3, seed=2)):
        outcome = answers_and_gradients(twin, images.to("cuda", memory_format=memory_format))
        outcome = {name: value.cpu() for name, value in outcome.items()}
        torch.testing.assert_close(outcome, answers_and_gradients(network, images), rtol=1e-3, atol=1e-4)
    buffers = {name: buffer.cpu() for name, buffer in twin.named_buffers()}
    torch.testing.assert_close(buffers, dict(network.named_buffers()), **SINGLE)
