"""Every way to set the radius, and the running mean norm it may be relative to (under DDP and checkpointing too)."""

import copy
import itertools
import warnings

import numpy as np
import pytest
import torch
import torch.distributed
import torch.multiprocessing
from reference import reference_conv, reference_norm
from torch import nn
from torch.utils.checkpoint import checkpoint

from operators import MAGNITUDES, RADIUS_MODES, DecoupledConv2d, OperatorConfig

WITH_RADIUS = [name for name, magnitude in MAGNITUDES.items() if magnitude.uses_radius]
EXACT = {"rtol": 1e-11, "atol": 1e-12}
FORMS = list(itertools.product(RADIUS_MODES, [False, True]))
every_form = pytest.mark.parametrize(("radius_mode", "relative"), FORMS)
every_magnitude = pytest.mark.parametrize("magnitude", WITH_RADIUS)
RADIUS = 0.875  # float32 can hold it
CHANNELS = 4


def make_layer(magnitude="tanh", radius_mode="learned", relative=True, *, angular="cosine", seed=0, radius=RADIUS):
    torch.manual_seed(seed)
    config = OperatorConfig(magnitude, angular, radius=radius, radius_mode=radius_mode, radius_relative=relative)
    return DecoupledConv2d(2, CHANNELS, 3, groups=2, operator=config, dtype=torch.float64)


def make_batches(count):
    """Return batches whose mean norms differ, half of whose patches lie below their mean."""
    generator = torch.Generator().manual_seed(3)
    spread = torch.logspace(-1, 0.3, 7, dtype=torch.float64)
    return [
        torch.randn(3, 2, 6, 7, dtype=torch.float64, generator=generator) * spread * (1 + index)
        for index in range(count)
    ]


def radius_of(layer):
    return dict(layer.named_parameters())["magnitude.radius"]


def truth(layer, input, radius):
    weight, bias = layer.weight.detach().numpy(), layer.bias.detach().numpy()
    names = {"magnitude": layer.operator.magnitude, "angular": layer.operator.angular}
    return torch.from_numpy(reference_conv(input.numpy(), weight, bias, groups=2, radius=radius, **names))


def moving_average(means, decay=0.999):
    """The authors' average, as TensorFlow defines it: started at 0 and divided by what that start still weighs."""
    biased = 0.0
    for mean in means:
        biased = decay * biased + (1 - decay) * mean
    return biased / (1 - decay ** len(means))


def mean_norm(input):
    return reference_norm(input.numpy(), 3, groups=2).mean()


@every_form
@every_magnitude
def test_the_parameter_and_the_buffers(magnitude, radius_mode, relative):
    layer = make_layer(magnitude, radius_mode, relative)
    shapes = {name: parameter.numel() for name, parameter in layer.named_parameters() if name.endswith("radius")}
    expected = {"fixed": {}, "learned": {"magnitude.radius": 1}, "learned_per_channel": {"magnitude.radius": CHANNELS}}
    assert shapes == expected[radius_mode]
    assert any("running_norm" in key for key in layer.state_dict()) == relative
    if radius_mode != "fixed":
        assert (radius_of(layer) == RADIUS).all()


def test_a_radius_in_double_precision_does_not_pass_through_float32():
    assert radius_of(make_layer(radius=0.7)).item() == 0.7


@pytest.mark.parametrize("magnitude", [name for name in MAGNITUDES if name not in WITH_RADIUS])
@every_form
def test_magnitudes_without_a_radius_have_none(magnitude, radius_mode, relative):
    assert set(make_layer(magnitude, radius_mode, relative).state_dict()) == {"weight", "bias"}


@pytest.mark.parametrize("angular", ["cosine", "linear"])
@every_form
@every_magnitude
def test_values_in_training(magnitude, radius_mode, relative, angular):
    layer = make_layer(magnitude, radius_mode, relative, angular=angular).train()
    radius = np.full(CHANNELS, RADIUS)
    if radius_mode == "learned_per_channel":
        radius = np.array([0.6, 0.8, 1.0, 1.2])
        radius_of(layer).data.copy_(torch.from_numpy(radius).view_as(radius_of(layer)))
    elif radius_mode == "learned":
        radius = np.full(CHANNELS, 1.25)
        radius_of(layer).data.fill_(1.25)
    for input in make_batches(2):  # the second batch's own mean counts, not the first's
        effective = (radius**2 + 1e-4) * mean_norm(input) if relative else radius
        norms = reference_norm(input.numpy(), 3, groups=2)
        assert (norms < effective.min()).any() and (norms > effective.max()).any()
        torch.testing.assert_close(layer(input).detach(), truth(layer, input, effective), **EXACT)


@pytest.mark.parametrize("radius", [-2.0, -1e-3, 0.0, 1e-5])
@every_magnitude
def test_a_learned_radius_that_leaves_its_range(magnitude, radius):
    """It acts through ``max(|ρ|, 1e-4)``: descent through 0 gives neither a pole nor a negative answer."""
    layer = make_layer(magnitude, relative=False)
    radius_of(layer).data.fill_(radius)
    (input,) = make_batches(1)
    output = layer(input)
    torch.testing.assert_close(output.detach(), truth(layer, input, max(abs(radius), 1e-4)), **EXACT)
    output.sum().backward()
    assert radius_of(layer).grad.isfinite().all()


@pytest.mark.parametrize("radius_mode", RADIUS_MODES)
@every_magnitude
def test_evaluation_uses_the_moving_average(magnitude, radius_mode):
    layer = make_layer(magnitude, radius_mode)
    means = []
    probe = make_batches(1)[0] * 3
    for step, input in enumerate(make_batches(20), start=1):
        layer.train()(input)
        means.append(mean_norm(input))
        if step in (1, 2, 20):
            effective = (RADIUS**2 + 1e-4) * moving_average(means)
            output = layer.eval()(probe).detach()
            # The factor of a step may be float32's; the probe's own mean would be far outside this tolerance.
            torch.testing.assert_close(output, truth(layer, probe, effective), rtol=2e-6, atol=2e-6)
    assert abs(mean_norm(probe) / moving_average(means) - 1) > 0.1
    assert abs(means[-1] / moving_average(means) - 1) > 0.1


def test_the_moving_average_over_many_steps():
    """3,000 steps: long enough for the correction of the start to have gone."""
    norm = make_layer().magnitude.running_norm.float().train()
    means = np.linspace(1, 5, 3000)
    for mean in means:
        norm(torch.full((2,), mean, dtype=torch.float32))
    assert norm.eval()(torch.zeros(2)).item() == pytest.approx(moving_average(means), rel=1e-5)


def test_evaluation_takes_no_step_and_training_without_gradients_does():
    layer = make_layer()
    first, second = make_batches(2)
    layer.train()(first)
    state = copy.deepcopy(layer.state_dict())
    layer.eval()(second)
    assert all(torch.equal(state[key], value) for key, value in layer.state_dict().items())
    with torch.no_grad():
        layer.train()(second)
    expected = moving_average([mean_norm(first), mean_norm(second)])
    assert layer.magnitude.running_norm.average.item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("radius_mode", RADIUS_MODES)
@every_magnitude
def test_evaluation_before_any_training_is_finite(magnitude, radius_mode):
    """The radius is absolute then: ``r² + 1e-4``."""
    layer = make_layer(magnitude, radius_mode).eval()
    (input,) = make_batches(1)
    torch.testing.assert_close(layer(input).detach(), truth(layer, input, RADIUS**2 + 1e-4), **EXACT)


@every_form
@every_magnitude
def test_state_dict_and_deepcopy(magnitude, radius_mode, relative):
    layer = make_layer(magnitude, radius_mode, relative)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    *batches, probe = make_batches(4)
    for input in batches:
        optimizer.zero_grad()
        layer(input).square().mean().backward()
        optimizer.step()
    if radius_mode != "fixed":
        assert (radius_of(layer) != RADIUS).all()
    expected = layer.eval()(probe)
    loaded = make_layer(magnitude, radius_mode, relative, seed=1).eval()
    assert not torch.equal(loaded(probe), expected)
    loaded.load_state_dict(layer.state_dict())
    copied = copy.deepcopy(layer)
    for twin in (loaded, copied):
        assert torch.equal(twin(probe), expected)
        twin.train()(batches[0])  # the next step of the average is the same too
    for key, value in loaded.state_dict().items():
        assert torch.equal(value, copied.state_dict()[key])
    assert torch.equal(layer(probe), expected)  # and the original took no step with its twins


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("radius_mode", RADIUS_MODES)
def test_checkpointing_takes_one_step(radius_mode, use_reentrant):
    plain, checkpointed = make_layer("seg", radius_mode), make_layer("seg", radius_mode)
    for index, input in enumerate(make_batches(3), start=1):
        leaves = [input.clone().requires_grad_() for _ in range(2)]
        plain(leaves[0]).square().sum().backward()
        checkpoint(checkpointed, leaves[1], use_reentrant=use_reentrant).square().sum().backward()
        assert plain.magnitude.running_norm.steps == index
        torch.testing.assert_close(leaves[1].grad, leaves[0].grad, **EXACT)
        for mine, other in zip(checkpointed.parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(mine.grad, other.grad, **EXACT)
        for key, value in plain.state_dict().items():
            assert torch.equal(checkpointed.state_dict()[key], value), key


def test_the_average_is_not_rounded_to_half_precision():
    """With bfloat16's 8 bits the average would not move: a step changes it by a thousandth of the difference."""
    layer = make_layer().bfloat16()
    means = []
    for scale in [1.0] * 300 + [2.0] * 300:
        input = torch.full((1, 2, 3, 3), scale, dtype=torch.bfloat16)
        layer(input)
        means.append(mean_norm(input.double()))
    assert layer.magnitude.running_norm.average.item() == pytest.approx(moving_average(means), rel=1e-3)


def make_network():
    """Return a network in which the mean norm depends on learned parameters, so that its gradient matters."""
    torch.manual_seed(0)
    config = OperatorConfig("tanh", "linear", radius_mode="learned_per_channel", radius_relative=True)
    decoupled = DecoupledConv2d(3, 4, 3, operator=config)
    return nn.Sequential(nn.Conv2d(2, 3, 3), decoupled, nn.Conv2d(4, 2, 1)).double()


def train_two_steps(network, batches):
    """Return the gradients of every parameter in both steps, and the average after them."""
    record = {}
    for step, batch in enumerate(batches):
        network.zero_grad()
        network(batch).square().mean().backward()
        for name, parameter in network.named_parameters():
            record[f"{step} {name.removeprefix('module.')}"] = parameter.grad.clone()
            parameter.data -= 0.1 * parameter.grad
    (average,) = [buffer for name, buffer in network.named_buffers() if name.endswith("average")]
    return record | {"average": average.clone()}


def two_batches():
    generator = torch.Generator().manual_seed(5)
    batches = torch.randn(2, 6, 2, 7, 7, dtype=torch.float64, generator=generator)
    batches[:, 3:] *= 4  # the second rank's half has other norms
    return batches


def train_on_one_rank(rank, folder):
    warnings.simplefilter("error")
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    network = nn.parallel.DistributedDataParallel(make_network())
    halves = [batch[3 * rank : 3 * rank + 3] for batch in two_batches()]
    torch.save(train_two_steps(network, halves), f"{folder}/rank{rank}.pt")
    # A group that the network still holds when Python ends aborts the process now and then.
    del network
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


@pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch is built without torch.distributed")
def test_two_processes_are_one_process_with_the_joined_batch(tmp_path):
    torch.multiprocessing.spawn(train_on_one_rank, (str(tmp_path),), nprocs=2)
    joined = train_two_steps(make_network(), two_batches())
    assert all(value.abs().max() > 1e-6 for value in joined.values())
    for rank in range(2):
        split = torch.load(tmp_path / f"rank{rank}.pt", weights_only=True)
        assert split.keys() == joined.keys()
        for name, value in joined.items():
            error = (split[name] - value).abs().max() / value.abs().max()
            assert error < 1e-6, f"{name} on rank {rank}"
