"""Fitting the operators of a converted network to the norms that occur in it, and looking at them."""

import contextlib
import copy
import dataclasses
import functools
import math
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.hub import tqdm
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.hooks import RemovableHandle

from operators.angular import cosine
from operators.conv import DecoupledConv2d, decoupled_layers
from operators.evaluation_mode import evaluating
from operators.kernels import wide
from operators.magnitude import RADIUS_FLOOR, Linear, Sphere

Batches = Iterable[Tensor | tuple[Tensor, ...] | list[Tensor]]

# The norms that diagnose tells are at these quantiles.
QUANTILES = (0.5, 0.9, 0.99, 0.999)
# A bounded layer with a larger share of its patches beyond the radius hardly tells their norms apart.
SATURATED = 0.98
LARGEST_FLOAT16 = torch.finfo(torch.float16).max
# Of values that the largest tensor of calibration may have; in float32 that is 1 GiB.
LARGEST_ACTIVATION = 1 << 28
# Of norms among which a quantile is looked for; of more, so many are drawn at random.
MOST_NORMS = 1 << 22

# Ordinary convolutions and plain cosines, written as magnitudes.
_PLAIN, _COSINE = Linear(weighting="linear"), Sphere()


Module = TypeVar("Module", bound=nn.Module)


@dataclasses.dataclass(frozen=True)
class CalibratedLayer:
    """What one layer was given.

    Attributes:
        name: its first name in the network (``""`` for a bare convolution).
        operator: its operator, as it is printed.
        beyond: the share of patches whose norm is larger than the radius; None for magnitudes without one.
        reason: why it was left as it was; empty if it was calibrated.
    """

    name: str
    operator: str
    beyond: float | None = None
    reason: str = ""


@dataclasses.dataclass(frozen=True)
class CalibrationReport:
    """One :class:`CalibratedLayer` for every decoupled convolution, in the network's order.

    Attributes:
        images: how many went through the network.
        given: how many there were.
    """

    images: int
    quantile: float
    layers: tuple[CalibratedLayer, ...]
    given: int

    def __str__(self) -> str:
        calibrated = sum(not layer.reason for layer in self.layers)
        images = f"{self.images} images" if self.images == self.given else f"{self.images} of {self.given} images"
        lines = [f"{calibrated} convolutions calibrated on {images}, quantile {self.quantile:g}"]
        width = max(len(layer.name) for layer in self.layers)
        for layer in self.layers:
            outcome = layer.reason or ("" if layer.beyond is None else f"{layer.beyond:.2%} beyond the radius")
            lines.append(f"  {layer.name:<{width}}  {layer.operator}  {outcome}".rstrip())
        return "\n".join(lines)


@dataclasses.dataclass(frozen=True)
class DiagnosedLayer:
    """How the operator of one layer meets the patches that occur.

    Attributes:
        name: its first name in the network (``""`` for a bare convolution).
        operator: its operator, as it is printed.
        norms: the quantiles ``QUANTILES`` of the patch norm ``n``.
        radius: ``ρ``, its mean over channels if they have their own; None for magnitudes without one.
        beyond: the share of patches with ``n > ρ``; None for magnitudes without a radius.
        cosine_spread: the standard deviation of ``cos θ`` over patches and filters.
        error: ``‖y - y'‖ / ‖y'‖`` of the layer's answers ``y`` and those ``y'`` of an ordinary convolution with the
            same filters on the same inputs, both without bias.
    """

    name: str
    operator: str
    norms: tuple[float, ...]
    radius: float | None
    beyond: float | None
    cosine_spread: float
    error: float


@dataclasses.dataclass(frozen=True)
class DiagnosisReport:
    """One :class:`DiagnosedLayer` for every decoupled convolution that was used, in the network's order."""

    images: int
    layers: tuple[DiagnosedLayer, ...]

    def advice(self) -> tuple[str, ...]:
        """Return what should be changed, one sentence for each reason: learning rate, precision, radius."""
        bad = [layer.name for layer in self.layers if not all(map(math.isfinite, layer.norms))]
        if bad:
            return (
                f"the inputs of {bad[0]} are not finite: go on from an earlier checkpoint, with a lower learning rate",
            )
        said = []
        largest = max(self.layers, key=lambda layer: layer.norms[-1])
        if largest.norms[-1] > LARGEST_FLOAT16:
            said.append(
                f"the patches of {largest.name} have norms up to {largest.norms[-1]:.3g}, more than float16 holds "
                f"({LARGEST_FLOAT16:.0f}): use bfloat16 or float32, or a lower learning rate"
            )
        saturated = [layer for layer in self.layers if (layer.beyond or 0) > SATURATED]
        if saturated:
            one = max(saturated, key=lambda layer: layer.beyond)
            said.append(
                f"{len(saturated)} layers saturate, {one.name} most ({one.beyond:.1%} of patches beyond the radius "
                f"{one.radius:.3g}, median norm {one.norms[0]:.3g}): use a larger radius, radius_relative, or calibrate"
            )
        return tuple(said)

    def __str__(self) -> str:
        head = ["layer", *(f"n {quantile:g}" for quantile in QUANTILES), "radius", "beyond", "cos spread", "error"]
        rows = [head]
        for layer in self.layers:
            radius = "-" if layer.radius is None else f"{layer.radius:.3g}"
            beyond = "-" if layer.beyond is None else f"{layer.beyond:.2%}"
            norms = [f"{norm:.3g}" for norm in layer.norms]
            rows.append([layer.name, *norms, radius, beyond, f"{layer.cosine_spread:.3f}", f"{layer.error:.3f}"])
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = [f"{len(self.layers)} decoupled convolutions on {self.images} images"]
        for name, *cells in rows:
            cells = [cell.rjust(width) for cell, width in zip(cells, widths[1:], strict=True)]
            lines.append("  ".join(["", name.ljust(widths[0]), *cells]))
        return "\n".join([*lines, *self.advice()])


@torch.no_grad()
def calibrate(
    model: nn.Module, batches: Batches, quantile: float = 0.99, *, progress: bool | None = None
) -> tuple[nn.Module, CalibrationReport]:
    """Fit each decoupled convolution to the norms of its patches, in place, and return ``model`` and the report.

    From the first layer to the last, so that each sees what the calibrated ones before it answer:

    - ``ρ`` becomes that quantile of the norms ``n`` of all patches, in all three radius modes;
    - ``α`` and ``β`` are multiplied by ``⟨y, y'⟩ / ⟨y, y⟩``, which brings the layer's answers ``y`` as near as a factor
      can to those ``y'`` of an ordinary convolution with the same filters;
    - BatchNorm's running mean moves by the difference, and its running variance by the ratio, between its inputs now
      and in the network of ordinary convolutions: what it learned of the training images, which are more and were
      augmented, stays.

    It is meant for a network that was trained with ordinary convolutions and has just been converted, with the
    weighting ``"linear"``: with another, filters lose their norms, which no factor of a whole layer brings back. To try
    another quantile, calibrate another copy: BatchNorm's statistics do not go back. A layer that is used several times
    is fitted to its first inputs.

    All images go through the network together, twice; a few hundred are enough. Of more than memory should hold, those
    whose largest activation has 2^28 values are drawn at random, with a fixed seed, and the report says so.

    Args:
        batches: images as ``model`` takes them, (N, C, H, W), or tuples that begin with them, as loaders of images and
            labels give. They are put on the model's device.
        quantile: of the norms, in (0, 1]. The larger, the more nearly linear the operators of bounded magnitude are.
        progress: whether a bar shows which layer it has come to; on a terminal, if not given.

    Raises:
        ValueError: no decoupled convolution or none that is used, no image, a quantile outside (0, 1], or norms that
            are not finite; the network is then what it was.
    """
    if not 0 < quantile <= 1:
        raise ValueError(f"quantile is a share in (0, 1] of the patches, got {quantile}")
    names = _decoupled(model, "calibrate")
    norms = [module for module in model.modules() if isinstance(module, _BatchNorm) and module.track_running_stats]
    shown = sys.stderr.isatty() if progress is None else progress
    bar = tqdm(total=2 * len(names), desc="calibrate", unit="layer", disable=not shown)
    # The bar that torch has in place of tqdm knows no step of 1 by itself.
    fit = _Fit(names, quantile, functools.partial(bar.update, 1))
    with _restoring_on_error(model), evaluating(model), contextlib.closing(bar):
        images, given = _drawn(_nonempty(batches, "calibrate"), model, [*names, *norms])
        with _answering(names, fit.answer_as_ordinary), _before_each(norms, fit.observe):
            model(images)
        with _answering(names, fit.calibrate), _before_each(norms, fit.move):
            model(images)
        if not fit.layers:
            raise ValueError(f"{type(model).__name__} does not use its decoupled convolutions in evaluation mode")
    unused = {layer: CalibratedLayer(name, str(layer.operator), reason="not used") for layer, name in names.items()}
    return model, CalibrationReport(len(images), quantile, tuple({**unused, **fit.layers}.values()), given)


@torch.no_grad()
def diagnose(model: nn.Module, batches: Batches) -> DiagnosisReport:
    """Return, for each decoupled convolution, how its operator meets the patches that occur, in evaluation mode.

    ``print`` shows the report as a table. The norms of all patches are kept until the end.

    Args:
        batches: as :func:`calibrate` takes them; they go through the network one after another.

    Raises:
        ValueError: no decoupled convolution, or no image.
    """
    names = _decoupled(model, "diagnose")
    seen = {layer: _Observations() for layer in names}
    count = 0
    with evaluating(model), _before_each(names, lambda layer, input: seen[layer].add(layer, input)):
        for batch in _nonempty(batches, "diagnose"):
            images = _images_of(batch, model)
            model(images)
            count += len(images)
        # The layer is in evaluation mode, where a relative radius is that of the running mean.
        layers = [seen[layer].summary(layer, name) for layer, name in names.items() if seen[layer].norms]
    return DiagnosisReport(count, tuple(layers))


@dataclasses.dataclass(frozen=True)
class _Moments:
    """The mean of each channel of a BatchNorm's input, and ``1 / sqrt(variance + eps)``."""

    mean: Tensor
    scale: Tensor

    @classmethod
    def of(cls, norm: _BatchNorm, input: Tensor) -> "_Moments":
        # Many times as fast as var_mean, for all that it normalises the input, too.
        _, mean, scale = torch.native_batch_norm(input, None, None, None, None, True, 0.0, norm.eps)
        return cls(mean, scale)


def _drawn(batches: Iterable[Any], model: nn.Module, modules: Sequence[nn.Module]) -> tuple[Tensor, int]:
    """Return as many of the images as memory should hold, drawn at random, and how many there were."""
    generator = torch.Generator().manual_seed(0)
    drawn: list[Tensor] = []
    given, most = 0, 0
    for batch in batches:
        for image in _images_of(batch, model):
            if not given:
                most = max(1, LARGEST_ACTIVATION // _largest_input(model, image[None], modules))
            given += 1
            place = len(drawn) if given <= most else int(torch.randint(given, (), generator=generator))
            if place < most:
                # Alone, for a part of a batch keeps the whole in memory.
                drawn[place : place + 1] = [image.clone()]
    if not drawn:
        raise ValueError("calibrate needs at least one image, got empty batches")
    return torch.stack(drawn), given


def _largest_input(model: nn.Module, image: Tensor, modules: Sequence[nn.Module]) -> int:
    """Return how many values the largest input has that one of the modules gets for this image."""
    largest = image.numel()

    def look(module: nn.Module, input: Tensor) -> None:
        nonlocal largest
        largest = max(largest, input.numel())

    with _before_each(modules, look):
        model(image)
    return largest


class _Fit:
    """What is done at each layer and norm, first in the ordinary network, then in the one that is being calibrated.

    Args:
        names: of the layers.
        step: is called whenever a layer answers.
    """

    def __init__(self, names: dict[DecoupledConv2d, str], quantile: float, step: Callable[[], object]) -> None:
        self.names, self.quantile, self.step = names, quantile, step
        self.layers: dict[DecoupledConv2d, CalibratedLayer] = {}
        self.ordinary: dict[_BatchNorm, _Moments] = {}

    def answer_as_ordinary(self, layer: DecoupledConv2d, input: Tensor) -> Tensor:
        self.step()
        return layer.respond(input, _PLAIN, cosine, layer.bias)

    def observe(self, norm: _BatchNorm, input: Tensor) -> None:
        self.ordinary.setdefault(norm, _Moments.of(norm, input))

    def move(self, norm: _BatchNorm, input: Tensor) -> None:
        # Once, also where a norm is used several times.
        if before := self.ordinary.pop(norm, None):
            now = _Moments.of(norm, input)
            norm.running_mean += now.mean - before.mean
            norm.running_var *= (before.scale / now.scale) ** 2

    def calibrate(self, layer: DecoupledConv2d, input: Tensor) -> Tensor:
        """Calibrate a layer when it is first used, and return its answer."""
        self.step()
        if layer in self.layers:
            return layer.respond(input, layer.magnitude, layer.angular, layer.bias)
        n = layer.patch_norm(input)
        if not n.isfinite().all():
            what = self.names[layer] or "the model"
            raise ValueError(f"the inputs of {what} are not finite, so it cannot be calibrated on them")
        if layer.magnitude.uses_radius:
            _fit_radius(layer, n, self.quantile)
        answer = layer.respond(input, layer.magnitude, layer.angular)
        factor = _fit_scale(layer, input, answer)
        beyond = _share_beyond(layer, n)
        self.layers[layer] = CalibratedLayer(self.names[layer], str(layer.operator), beyond)
        # Every answer is proportional to alpha and beta.
        answer *= factor
        return answer if layer.bias is None else answer.add_(layer.bias[:, None, None])


def _fit_radius(layer: DecoupledConv2d, n: Tensor, quantile: float) -> None:
    """Make the radius of a layer that quantile of the norms ``n``."""
    radius, running_norm = _quantile(n, quantile), layer.magnitude.running_norm
    if running_norm is not None:
        running_norm.restart(n.mean())
        radius = math.sqrt(max(radius / n.mean().item() - RADIUS_FLOOR, RADIUS_FLOOR))
    _set(layer, radius=radius)


def _fit_scale(layer: DecoupledConv2d, input: Tensor, answer: Tensor) -> float:
    """Multiply a layer's alpha and beta by what brings its answers nearest to an ordinary one's."""
    energy = agreement = 0.0
    # A few images at a time, for the ordinary answers of all of them can be large.
    for part, images in zip(answer.split(8), input.split(8), strict=True):
        energy += _inner_product(part, part)
        agreement += _inner_product(part, layer.respond(images, _PLAIN, cosine))
    # Without an answer, as to black images, any factor is as good.
    factor = agreement / energy if energy else 1.0
    for setting in ("alpha", "beta") if layer.magnitude.uses_beta else ("alpha",):
        _set(layer, **{setting: getattr(layer.operator, setting) * factor})
    return factor


def _inner_product(left: Tensor, right: Tensor) -> float:
    return (left.to(wide(left.dtype)) * right).sum().item()


def _set(layer: DecoupledConv2d, **settings: float) -> None:
    layer.operator = dataclasses.replace(layer.operator, **settings)
    for name, value in settings.items():
        held = getattr(layer.magnitude, name)
        if isinstance(held, Tensor):
            held.fill_(value)
        else:
            setattr(layer.magnitude, name, value)


class _Observations:
    """What is gathered of a layer, batch by batch."""

    def __init__(self) -> None:
        self.norms: list[Tensor] = []
        self.beyond: list[float | None] = []
        self.cosines = 0
        # Sums over all answers: of cos, cos², squared error, squared plain answer.
        self.sums = torch.zeros(4, dtype=torch.float64)

    def add(self, layer: DecoupledConv2d, input: Tensor) -> None:
        n = layer.patch_norm(input)
        cos = layer.respond(input, _COSINE, cosine).double()
        answer = layer.respond(input, layer.magnitude, layer.angular).double()
        plain = layer.respond(input, _PLAIN, cosine).double()
        self.norms.append(n.flatten().cpu())
        self.beyond.append(_share_beyond(layer, n))
        self.cosines += cos.numel()
        self.sums += torch.stack(
            [cos.sum(), cos.square().sum(), (answer - plain).square().sum(), plain.square().sum()]
        ).cpu()

    def summary(self, layer: DecoupledConv2d, name: str) -> DiagnosedLayer:
        norms = torch.cat(self.norms)
        radius = beyond = None
        if layer.magnitude.uses_radius:
            radius = torch.as_tensor(layer.magnitude.effective_radius(norms)).mean().item()
            weights = torch.tensor([len(batch) for batch in self.norms], dtype=torch.float64)
            beyond = (torch.tensor(self.beyond, dtype=torch.float64) @ weights / weights.sum()).item()
        mean, square = (self.sums[:2] / self.cosines).tolist()
        error, plain = self.sums[2:].sqrt().tolist()
        return DiagnosedLayer(
            name=name,
            operator=str(layer.operator),
            norms=tuple(_quantile(norms, quantile) for quantile in QUANTILES),
            radius=radius,
            beyond=beyond,
            cosine_spread=math.sqrt(max(square - mean**2, 0.0)),
            error=error / plain if plain else 0.0,
        )


def _share_beyond(layer: DecoupledConv2d, n: Tensor) -> float | None:
    """Return the share of patches, norms ``n`` (N, groups, H', W'), beyond the radius; None if there is no radius."""
    if not layer.magnitude.uses_radius:
        return None
    radius = layer.magnitude.effective_radius(n)
    if isinstance(radius, Tensor) and radius.dim():
        n, radius = n.unsqueeze(2), radius.view(layer.groups, -1, 1, 1)
    beyond = n > radius
    return beyond.count_nonzero().item() / beyond.numel()


def _quantile(values: Tensor, quantile: float) -> float:
    # torch.quantile takes 16 million values at most, and to find a value among more of them takes seconds.
    values = values.flatten()
    if len(values) > MOST_NORMS:
        chosen = torch.randint(len(values), (MOST_NORMS,), generator=torch.Generator().manual_seed(0))
        values = values[chosen.to(values.device)]
    return values.kthvalue(max(1, math.ceil(quantile * len(values)))).values.item()


def _decoupled(model: nn.Module, what: str) -> dict[DecoupledConv2d, str]:
    """Return the decoupled convolutions and their first names."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"{what} takes a network, then batches, but got {type(model).__name__} as the network")
    if type(model).__name__ == "OptimizedModule" or model._compiled_call_impl is not None:
        raise TypeError(f"{what} takes the network before torch.compile, which would compile each step of it")
    names = {layer: name for name, layer in decoupled_layers(model).items()}
    if not names:
        raise ValueError(f"nothing to {what}: {type(model).__name__} has no DecoupledConv2d; see convert_decoupled")
    return names


def _nonempty(batches: Batches, what: str) -> Iterator[Any]:
    if isinstance(batches, Tensor):
        raise TypeError(f"{what} takes a list of batches, got a tensor: put it into one, [images]")
    empty = True
    for batch in batches:
        empty = False
        yield batch
    if empty:
        raise ValueError(f"{what} needs at least one batch of images, got none")


def _images_of(batch: Tensor | tuple[Tensor, ...] | list[Tensor], model: nn.Module) -> Tensor:
    images = batch[0] if isinstance(batch, tuple | list) else batch
    if not isinstance(images, Tensor):
        raise TypeError(f"a batch is a tensor of images or a tuple that begins with one, got {type(images).__name__}")
    return images.to(next(model.parameters()).device)


@contextlib.contextmanager
def _restoring_on_error(model: nn.Module) -> Iterator[None]:
    state = copy.deepcopy(model.state_dict())
    operators = {layer: layer.operator for layer in decoupled_layers(model).values()}
    try:
        yield
    except BaseException:
        for layer, operator in operators.items():
            _set(layer, radius=operator.radius, alpha=operator.alpha, beta=operator.beta)
        model.load_state_dict(state)
        raise


@contextlib.contextmanager
def _answering(
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
def _before_each(modules: Iterable[Module], function: Callable[[Module, Tensor], None]) -> Iterator[None]:
    """Call ``function`` with each of the modules and its input, before it answers."""

    def look(module: Module, inputs: tuple[Tensor]) -> None:
        function(module, inputs[0])

    with _removing([module.register_forward_pre_hook(look) for module in modules]):
        yield


@contextlib.contextmanager
def _removing(handles: Sequence[RemovableHandle]) -> Iterator[None]:
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
