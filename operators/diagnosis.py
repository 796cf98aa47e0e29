"""How the operators of a network meet the patches that occur."""

import dataclasses
import math

import torch
from torch import Tensor, nn

from operators.angular import cosine
from operators.conv import DecoupledConv2d
from operators.evaluation_mode import evaluating
from operators.magnitude import Sphere
from operators.observation import (
    PLAIN,
    Batches,
    before_each,
    images_of,
    layers_of,
    nonempty,
    quantiles_of,
    share_beyond,
)

# The norms that diagnose tells are at these quantiles.
QUANTILES = (0.5, 0.9, 0.99, 0.999)
# A bounded layer with a larger share of its patches beyond the radius hardly tells their norms apart.
SATURATED = 0.98
LARGEST_FLOAT16 = torch.finfo(torch.float16).max

# The plain cosine, written as a magnitude.
_COSINE = Sphere()


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
def diagnose(model: nn.Module, batches: Batches) -> DiagnosisReport:
    """Return, for each decoupled convolution, how its operator meets the patches that occur, in evaluation mode.

    ``print`` shows the report as a table. The norms of all patches are kept until the end.

    Args:
        batches: as :func:`calibrate` takes them; they go through the network one after another.

    Raises:
        ValueError: no decoupled convolution, or no image.
    """
    names = layers_of(model, "diagnose")
    seen = {layer: _Observations() for layer in names}
    count = 0
    with evaluating(model), before_each(names, lambda layer, input: seen[layer].add(layer, input)):
        for batch in nonempty(batches, "diagnose"):
            images = images_of(batch, model)
            model(images)
            count += len(images)
        # The layer is in evaluation mode, where a relative radius is that of the running mean.
        layers = [seen[layer].summary(layer, name) for layer, name in names.items() if seen[layer].norms]
    return DiagnosisReport(count, tuple(layers))


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
        plain = layer.respond(input, PLAIN, cosine).double()
        self.norms.append(n.flatten().cpu())
        self.beyond.append(share_beyond(layer, n))
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
            norms=tuple(quantiles_of(norms, QUANTILES)),
            radius=radius,
            beyond=beyond,
            cosine_spread=math.sqrt(max(square - mean**2, 0.0)),
            error=error / plain if plain else 0.0,
        )
