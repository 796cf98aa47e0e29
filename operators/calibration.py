"""Fitting the operators of a converted network to the patches that occur in it."""

import contextlib
import copy
import dataclasses
import functools
import math
import sys
import warnings
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.hub import tqdm

from operators.angular import cosine
from operators.batch_norms import norms_of, remembered
from operators.conv import DecoupledConv2d, decoupled_layers
from operators.evaluation_mode import evaluating
from operators.kernels import wide
from operators.layer_by_layer import front_to_back, rescale, set_constants
from operators.magnitude import RADIUS_FLOOR, Linear, linearly_weighted
from operators.observation import (
    PLAIN,
    Batches,
    before_each,
    divergence,
    doubts_about,
    images_of,
    layers_of,
    nonempty,
    quantiles_of,
    share_beyond,
)
from operators.selection import is_depthwise

# The largest tensor of calibration may have so many values; in float32 that is 1 GiB.
LARGEST_ACTIVATION = 1 << 28
# The quantiles of the norms that are tried as radius, as far as they leave enough patches beyond it.
TRIED = (0.5, 0.75, 0.9, 0.95, 0.98, 0.99, 0.995, 0.999, 0.9999, 1.0)
# The quantiles that are tried as radius, and the least share of norms beyond it.
Search = tuple[Sequence[float], float]
# A network that names the class that it named before for a smaller share of the images has lost much.
KEEPS_MUCH = 0.9
# So many layers are listed in a summary, those whose answers differ most.
WORST = 5


@dataclasses.dataclass(frozen=True)
class CalibratedLayer:
    """What one layer was given.

    Attributes:
        name: its first name in the network (``""`` for a bare convolution).
        operator: its operator, as it is printed.
        beyond: the share of patches whose norm is larger than the radius; None for magnitudes without one.
        error: ``‖y - y'‖ / ‖y'‖`` of its answers ``y`` and those ``y'`` of an ordinary convolution with the same
            filters on the same inputs, both without bias; None if it was not calibrated.
        depthwise: whether each of its filters sees one channel.
        reason: why it was left as it was; empty if it was calibrated.
    """

    name: str
    operator: str
    beyond: float | None = None
    error: float | None = None
    depthwise: bool = False
    reason: str = ""


@dataclasses.dataclass(frozen=True)
class CalibrationReport:
    """One :class:`CalibratedLayer` for every decoupled convolution, in the network's order.

    Attributes:
        images: how many went through the network.
        quantile: the one that was asked for; None if the radii were searched for.
        given: how many images there were.
        agreement: for networks that give logits, the share of images whose likeliest class stayed what it was.
        divergence: likewise, the mean Kullback-Leibler divergence of the probabilities from those of before, in nats.
    """

    images: int
    quantile: float | None
    layers: tuple[CalibratedLayer, ...]
    given: int
    agreement: float | None = None
    divergence: float | None = None

    def advice(self) -> tuple[str, ...]:
        """Return what should be changed, one sentence for each reason; nothing if the network keeps what it knew."""
        if self.agreement is None or self.agreement >= KEEPS_MUCH:
            return ()
        depthwise = sum(layer.depthwise and not layer.reason for layer in self.layers)
        if depthwise:
            return (
                f"the network lost much, and depthwise convolutions lose most: keep these {depthwise} plain "
                "(convert it again without depthwise)",
            )
        worst = self._worst()[0]
        return (
            f"the network lost much, most in {worst.name or 'the model'}: distil brings much of it back, and so does "
            "keeping such layers plain (keep)",
        )

    def summary(self) -> str:
        """Return the report in a few lines, with the layers whose answers differ most."""
        return self._shown(self._worst())

    def _worst(self) -> list[CalibratedLayer]:
        fitted = [layer for layer in self.layers if not layer.reason]
        return sorted(fitted, key=lambda layer: -layer.error)[:WORST]

    def __str__(self) -> str:
        return self._shown(self.layers)

    def _shown(self, layers: Sequence[CalibratedLayer]) -> str:
        fitted = [layer for layer in self.layers if not layer.reason]
        images = f"{self.images} images" if self.images == self.given else f"{self.images} of {self.given} images"
        how = "radii searched" if self.quantile is None else f"quantile {self.quantile:g}"
        lines = [f"{len(fitted)} convolutions calibrated on {images}, {how}"]
        if self.agreement is not None:
            lines.append(
                f"likeliest class as before: {self.agreement:.1%} of these images; divergence {self.divergence:.3g}"
            )
        if len(layers) < len(self.layers):
            lines.append(f"largest errors of {len(fitted)} layers:")
        width = max(len(layer.name) for layer in layers)
        for layer in layers:
            outcome = layer.reason or f"error {layer.error:.1%}"
            if layer.beyond is not None:
                outcome += f", {layer.beyond:.2%} beyond the radius"
            lines.append(f"  {layer.name:<{width}}  {layer.operator}  {outcome}")
        return "\n".join([*lines, *self.advice()])


@torch.no_grad()
def calibrate(
    model: nn.Module,
    batches: Batches,
    quantile: float | None = None,
    *,
    least_beyond: float = 0.001,
    progress: bool | None = None,
) -> tuple[nn.Module, CalibrationReport]:
    """Fit each decoupled convolution to the patches that occur, in place, and return ``model`` and the report.

    From the first layer to the last, so that each sees what the calibrated ones before it answer:

    - ``ρ`` becomes that quantile of the norms ``n`` of all patches, among some ten, with which the layer's answers
      ``y`` come nearest to those ``y'`` of an ordinary convolution with the same filters;
    - ``α`` and ``β`` are multiplied by ``⟨y, y'⟩ / ⟨y, y⟩``, which brings them as near as a factor can; their ratio
      stays, since the best one would be that of an ordinary convolution;
    - BatchNorm's running mean moves by the difference, and its running variance by the ratio, between its inputs now
      and in the network of ordinary convolutions: what it learned of the training images, which are more and were
      augmented, stays. :func:`operators.revert` moves them back.

    It is meant for a network that was trained with ordinary convolutions and has just been converted, with the
    weighting ``"linear"``: with another, filters lose their norms, which no factor of a whole layer brings back. It may
    be called again, e.g. with other images; a layer that is used several times is fitted to its first inputs.

    All images go through the network together, twice; a few hundred are enough. Of more than memory should hold, those
    whose largest activation has 2^28 values are drawn at random, with a fixed seed, and the report says so.

    Args:
        batches: images as ``model`` takes them, (N, C, H, W), or tuples that begin with them, as loaders of images and
            labels give. They are put on the model's device.
        quantile: of the norms, in (0, 1], that becomes the radius of every layer; searched for if not given.
        least_beyond: share of patches, in [0, 1), whose norm stays larger than a radius that is searched for. With
            none, bounded magnitudes would come as near to an ordinary convolution as they can.
        progress: whether a bar shows which layer it has come to; on a terminal, if not given.

    Warns:
        UserWarning: most images are the same or of a single colour, or they are plainly not what the network takes.

    Raises:
        ValueError: no decoupled convolution or none that is used, no image, a quantile or share out of its range, or
            norms that are not finite; the network is then what it was.
    """
    if quantile is not None and not 0 < quantile <= 1:
        raise ValueError(f"quantile is a share in (0, 1] of the patches, got {quantile}")
    if not 0 <= least_beyond < 1:
        raise ValueError(f"least_beyond is a share in [0, 1) of the patches, got {least_beyond}")
    most = 1 - least_beyond
    tried = [*(share for share in TRIED if share < most), most] if quantile is None else [quantile]
    least = least_beyond if quantile is None else 0.0
    names = layers_of(model, "calibrate")
    with _restoring_on_error(model), evaluating(model):
        images, given = _drawn(nonempty(batches, "calibrate"), model, [*names, *norms_of(model)])
        for doubt in doubts_about(images, model):
            warnings.warn(doubt, stacklevel=3)
        layers, found = _fitted(
            model, images, names, (tried, least), sys.stderr.isatty() if progress is None else progress
        )
    return model, CalibrationReport(len(images), quantile, layers, given, *found)


def _fitted(
    model: nn.Module, images: Tensor, names: dict[DecoupledConv2d, str], search: Search, progress: bool
) -> tuple[tuple[CalibratedLayer, ...], tuple[float | None, float | None]]:
    """Calibrate a model on images; return what its layers were given, and how its logits compare with those before."""
    fitted: dict[DecoupledConv2d, CalibratedLayer] = {}

    def fit(layer: DecoupledConv2d, input: Tensor) -> None:
        n = layer.patch_norm(input)
        if not n.isfinite().all():
            what = names[layer] or "the model"
            raise ValueError(f"the inputs of {what} are not finite, so it cannot be calibrated on them")
        error = _fit(layer, input, n, search)
        operator = str(layer.operator)
        fitted[layer] = CalibratedLayer(names[layer], operator, share_beyond(layer, n), error, is_depthwise(layer))

    bar = tqdm(total=2 * len(names), desc="calibrate", unit="layer", disable=not progress)
    with contextlib.closing(bar):
        # The bar that torch has in place of tqdm knows no step of 1 by itself.
        before, now = front_to_back(model, images, names, fit, functools.partial(bar.update, 1))
    if not fitted:
        raise ValueError(f"{type(model).__name__} does not use its decoupled convolutions in evaluation mode")
    unused = {layer: CalibratedLayer(name, str(layer.operator), reason="not used") for layer, name in names.items()}
    return tuple({**unused, **fitted}.values()), divergence(before, now)


def _drawn(batches: Iterable[Any], model: nn.Module, modules: Sequence[nn.Module]) -> tuple[Tensor, int]:
    """Return as many of the images as memory should hold, drawn at random, and how many there were."""
    generator = torch.Generator().manual_seed(0)
    drawn: list[Tensor] = []
    given, most = 0, 0
    for batch in batches:
        for image in images_of(batch, model):
            if not given:
                most = max(1, LARGEST_ACTIVATION // _largest_input(model, image[None], modules))
            given += 1
            place = len(drawn) if given <= most else int(torch.randint(given, (), generator=generator))
            if drawn and image.shape != drawn[0].shape:
                shapes = [tuple(one.shape) for one in (drawn[0], image)]
                raise ValueError(f"calibrate takes images of one size, got {shapes[0]} and {shapes[1]}: resize them")
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

    with before_each(modules, look):
        model(image)
    return largest


def _fit(layer: DecoupledConv2d, input: Tensor, n: Tensor, search: Search) -> float:
    """Set a layer's radius, alpha and beta by its patches, whose norms are ``n``; return the error of its answers."""
    magnitude = layer.magnitude
    products, energies, ordinary = _projections(layer, input)
    radii = _radii(n, *search) if magnitude.uses_radius else [None]
    best: tuple[float, float, float | None] | None = None
    for radius in radii:
        gain = magnitude.gain(n, radius)
        product, energy = _sum(gain * products), _sum(gain * gain * energies)
        # Without an answer, as to black images, any radius and factor are as good.
        explained = product**2 / energy if energy else 0.0
        if best is None or explained > best[0]:
            best = explained, product / energy if energy else 1.0, radius
    explained, factor, radius = best
    if radius is not None:
        if magnitude.running_norm is not None:
            magnitude.running_norm.restart(n.mean())
            radius = math.sqrt(max(radius / n.mean().item() - RADIUS_FLOOR, RADIUS_FLOOR))
        set_constants(layer, radius=radius)
    rescale(layer, factor)
    return math.sqrt(max(0.0, 1 - explained / ordinary)) if ordinary else 0.0


def _radii(n: Tensor, tried: Sequence[float], least: float) -> list[float]:
    """Return the quantiles of norms that are tried as radius, made smaller where too few norms are larger."""
    radii = set(quantiles_of(n, tried))
    # Many of the largest norms are equal where images have white or black areas.
    too_large = {radius for radius in radii if (n > radius).sum() < math.floor(least * n.numel())}
    smaller = n[n < min(too_large)] if too_large else n[:0]
    return sorted(radii - too_large | ({smaller.max().item()} if smaller.numel() else too_large))


def _projections(layer: DecoupledConv2d, input: Tensor) -> tuple[Tensor, Tensor, float]:
    """Compare the layer's answers of gain 1, ``z``, with an ordinary convolution's, ``y'``.

    Returns:
        For each patch and group, (N, groups, H', W'), the sums of ``z y'`` and ``z²`` over the filters; and the sum of
        all ``y'²``. Whatever the gain is, the errors follow from these.
    """
    unit = Linear(weighting="linear")
    unit.weighting = layer.magnitude.weighting
    alike = layer.angular is cosine and unit.weighting is linearly_weighted
    products, energies, ordinary = [], [], 0.0
    # A few images at a time, for the answers of all of them can be large.
    for images in input.split(8):
        plain = layer.respond(images, PLAIN, cosine)
        plain = plain.to(wide(plain.dtype)).unflatten(1, (layer.groups, -1))
        answer = plain if alike else layer.respond(images, unit, layer.angular).to(plain.dtype).reshape(plain.shape)
        products.append((answer * plain).sum(2))
        energies.append(products[-1] if alike else answer.square().sum(2))
        ordinary += _sum(products[-1] if alike else plain.square())
    return torch.cat(products), torch.cat(energies), ordinary


def _sum(values: Tensor) -> float:
    return values.sum(dtype=torch.float64).item()


@contextlib.contextmanager
def _restoring_on_error(model: nn.Module) -> Iterator[None]:
    state = copy.deepcopy(model.state_dict())
    operators = {layer: layer.operator for layer in decoupled_layers(model).values()}
    try:
        with remembered(model):
            yield
    except BaseException:
        for layer, operator in operators.items():
            set_constants(layer, radius=operator.radius, alpha=operator.alpha, beta=operator.beta)
        model.load_state_dict(state)
        raise
