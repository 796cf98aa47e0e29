"""Looking at the convolutions of a network while images go through it."""

import contextlib
import functools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from operators.conv import DecoupledConv2d, decoupled_layers
from operators.magnitude import Linear

Batches = Iterable[Tensor | tuple[Tensor, ...] | list[Tensor]]

# A quantile is looked for among so many norms, drawn at random if there are more.
MOST_NORMS = 1 << 22

# Ordinary convolutions, written as a magnitude.
PLAIN = Linear(weighting="linear")

Module = TypeVar("Module", bound=nn.Module)


def layers_of(model: nn.Module, what: str) -> dict[DecoupledConv2d, str]:
    """Return the decoupled convolutions and their first names."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"{what} takes a network, then batches, but got {type(model).__name__} as the network")
    refuse_compiled(model, what)
    names = {layer: name for name, layer in decoupled_layers(model).items()}
    if not names:
        raise ValueError(f"nothing to {what}: {type(model).__name__} has no DecoupledConv2d; see convert_decoupled")
    return names


def refuse_compiled(model: nn.Module, what: str) -> None:
    """Refuse a network that is compiled, or a part of which is.

    Raises:
        TypeError: it is; ``what`` is the name of the function that refuses it.
    """
    for module in model.modules():
        if type(module).__name__ == "OptimizedModule" or module._compiled_call_impl is not None:
            raise TypeError(f"{what} takes the network before torch.compile, which would compile each step of it")


def nonempty(batches: Batches, what: str) -> Iterator[Any]:
    """Yield the batches, of which there must be one.

    Raises:
        TypeError: they are a single tensor.
        ValueError: there is none.
    """
    if isinstance(batches, Tensor):
        raise TypeError(f"{what} takes a list of batches, got a tensor: put it into one, [images]")
    empty = True
    for batch in batches:
        empty = False
        yield batch
    if empty:
        raise ValueError(f"{what} needs at least one batch of images, got none")


def images_of(batch: Tensor | tuple[Tensor, ...] | list[Tensor], model: nn.Module) -> Tensor:
    """Return the images of a batch, on the model's device."""
    images = batch[0] if isinstance(batch, tuple | list) else batch
    if not isinstance(images, Tensor):
        raise TypeError(f"a batch is a tensor of images or a tuple that begins with one, got {type(images).__name__}")
    return images.to(next(model.parameters()).device)


def doubts_about(images: Tensor, model: nn.Module) -> list[str]:
    """Return what speaks against these images, as the network takes them: (N, C, H, W)."""
    doubts = []
    pixels = images.flatten(1)
    uniform = int((images.flatten(2).std(2) == 0).all(1).sum()) if images[0, 0].numel() > 1 else 0
    distinct = len({tuple(sums) for sums in zip(pixels.sum(1).tolist(), pixels.square().sum(1).tolist(), strict=True)})
    if uniform > len(images) / 2:
        doubts.append(f"{uniform} of {len(images)} images have a single colour, and say nothing of what will come")
    elif distinct <= len(images) / 2:
        doubts.append(f"only {distinct} of {len(images)} images differ, and say little of what will come")
    made_for = getattr(model, "pretrained_cfg", None) or {}
    if "mean" in made_for and images.is_floating_point():
        low, high = (bound.item() for bound in images.aminmax())
        # Normalised images have pixels darker than the mean, and none as bright as bytes.
        if low >= 0 and max(made_for["mean"]) > 0 and (1 / 16 < high <= 1 or high > 16):
            told = "[0, 1]" if high <= 1 else f"[0, {high:.0f}]"
            doubts.append(
                f"the images are in {told}, as if they were not normalised; the network takes them with mean "
                f"{list(made_for['mean'])} and std {list(made_for['std'])} of pixels in [0, 1]"
            )
    if "input_size" in made_for and tuple(images.shape[1:]) != tuple(made_for["input_size"]):
        size, usual = ("×".join(map(str, shape)) for shape in (images.shape[1:], made_for["input_size"]))
        doubts.append(f"the images are of {size}, and the network was trained on {usual}")
    return doubts


def divergence(teacher: Any, answers: Any) -> tuple[float, float] | tuple[None, None]:
    """Compare logits (N, classes) with a teacher's.

    Returns:
        The share of images whose likeliest class is the teacher's, and the mean Kullback-Leibler divergence of the
        probabilities from the teacher's, in nats; None and None of what are no logits.
    """
    if not isinstance(teacher, Tensor) or teacher.dim() != 2 or teacher.shape[1] < 2:
        return None, None
    agreement = (teacher.argmax(1) == answers.argmax(1)).double().mean()
    distance = F.kl_div(
        answers.double().log_softmax(1), teacher.double().log_softmax(1), reduction="batchmean", log_target=True
    )
    return agreement.item(), distance.item()


def quantiles_of(values: Tensor, shares: Sequence[float]) -> list[float]:
    """Return for each share the value that so many of the values do not exceed."""
    values = values.flatten()
    if len(values) > MOST_NORMS:
        # To find a quantile among more of them takes seconds.
        chosen = torch.randint(len(values), (MOST_NORMS,), generator=torch.Generator().manual_seed(0))
        values = values[chosen.to(values.device)]
    ordered = values.sort().values
    return [ordered[max(1, math.ceil(share * len(values))) - 1].item() for share in shares]


def share_beyond(layer: DecoupledConv2d, n: Tensor) -> float | None:
    """Return the share of patches, norms ``n`` (N, groups, H', W'), beyond the radius; None if there is no radius."""
    if not layer.magnitude.uses_radius:
        return None
    radius = layer.magnitude.effective_radius(n)
    if isinstance(radius, Tensor) and radius.dim():
        n, radius = n.unsqueeze(2), radius.view(layer.groups, -1, 1, 1)
    beyond = n > radius
    return beyond.count_nonzero().item() / beyond.numel()


@contextlib.contextmanager
def answering(
    layers: Iterable[DecoupledConv2d], function: Callable[[DecoupledConv2d, Tensor], Tensor]
) -> Iterator[None]:
    """Let decoupled convolutions answer what ``function`` gives for each and its input."""
    own = {layer: vars(layer).get("forward") for layer in layers}
    for layer in own:
        layer.forward = functools.partial(function, layer)
    try:
        yield
    finally:
        for layer, forward in own.items():
            del layer.forward
            if forward is not None:
                layer.forward = forward


@contextlib.contextmanager
def before_each(modules: Iterable[Module], function: Callable[[Module, Tensor], None]) -> Iterator[None]:
    """Call ``function`` with each of the modules and its input, before it answers."""

    def look(module: Module, inputs: tuple[Tensor]) -> None:
        function(module, inputs[0])

    with _removing([module.register_forward_pre_hook(look) for module in modules]):
        yield


def convolution_inputs(network: nn.Module, answer: Callable[[], object]) -> dict[str, tuple[nn.Conv2d, Tensor]]:
    """Return the convolutions of a network by their names, each with the last input that it gets as ``answer`` runs."""
    names = {module: name for name, module in network.named_modules() if isinstance(module, nn.Conv2d)}
    found: dict[str, tuple[nn.Conv2d, Tensor]] = {}

    def keep(module: nn.Conv2d, input: Tensor) -> None:
        found[names[module]] = module, input.detach()

    with before_each(names, keep), torch.no_grad():
        answer()
    return found


@contextlib.contextmanager
def _removing(handles: Sequence[RemovableHandle]) -> Iterator[None]:
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
