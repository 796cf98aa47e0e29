"""Pictures of operators, of classified images and of the paper's tables."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from operators import ANGULARS, MAGNITUDES, OperatorConfig
from zoo.figures import STYLE, WRONG, write_figure

REFERENCE = {"color": "black", "linestyle": "--", "linewidth": 1, "label": "convolution"}


def draw_magnitudes(axes: Axes, operators: Sequence[OperatorConfig]) -> None:
    """Draw each ``h`` over the patch norm from 0 to 4, for a filter of unit norm, beside the plain convolution's."""
    n = torch.linspace(0.01, 4, 400)
    for operator in operators:
        h = operator.build_magnitude(channels=1).eval()(n, torch.ones(()))
        axes.plot(n, h.detach(), label=operator.magnitude)
    axes.plot(n, n, **REFERENCE)
    axes.set(xlabel="patch norm ‖x‖", ylabel="magnitude h(‖x‖)", xlim=(0, 4), ylim=(0, 2.5))
    axes.legend(frameon=False, loc="upper left", bbox_to_anchor=(1, 1))


def draw_angulars(axes: Axes, operators: Sequence[OperatorConfig]) -> None:
    """Draw each ``g`` over the angle from 0 to π, beside the plain convolution's cosine."""
    theta = torch.linspace(0, math.pi, 400)
    for operator in operators:
        label = f"power, B = {operator.power:g}" if operator.angular == "power" else operator.angular
        axes.plot(theta, operator.build_angular()(theta.cos()), label=label)
    axes.plot(theta, theta.cos(), **REFERENCE)
    axes.set(xlabel="angle θ between filter and patch", ylabel="angular function g(θ)", xlim=(0, math.pi))
    axes.set_xticks([0, math.pi / 2, math.pi], ["0", "π/2", "π"])
    axes.legend(frameon=False, loc="upper left", bbox_to_anchor=(1, 1))


@matplotlib.rc_context(STYLE)
def plot_operators(path: Path) -> None:
    """Write a PNG of every magnitude and every angular function."""
    figure = Figure(figsize=(12, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    draw_magnitudes(left, [OperatorConfig(magnitude, "cosine") for magnitude in MAGNITUDES])
    # With the default B = 2, power would lie on square_cosine.
    draw_angulars(right, [OperatorConfig("sphere", angular, power=4) for angular in ANGULARS])
    write_figure(figure, path)


@matplotlib.rc_context(STYLE)
def plot_predictions(
    images: Tensor,
    labels: Sequence[str],
    predicted: Sequence[str],
    probabilities: Sequence[float],
    operator: OperatorConfig | None,
    title: str,
    path: Path,
) -> None:
    """Write a PNG of at most 24 classified images beside the curves of the operator that classified them.

    Args:
        images: (N, C, H, W) in [0, 1].
        labels, predicted: the true and the predicted class of each.
        probabilities: of the predicted classes.
        operator: None for ordinary convolutions.
    """
    figure = Figure(figsize=(12, 6), layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=(3, 2))
    left.suptitle(title)
    for axes in left.subplots(4, 6).flat:
        axes.axis("off")
    for axes, image, label, guess, probability in zip(
        left.axes, images, labels, predicted, probabilities, strict=False
    ):
        axes.imshow(image.permute(1, 2, 0).numpy(), cmap="gray_r", vmin=0, vmax=1)
        text = f"{guess} ({probability:.0%})" + ("" if guess == label else f"\nis {label}")
        axes.set_title(text, fontsize=9, color="black" if guess == label else WRONG)
    right.suptitle(operator.name if operator else "ordinary convolution")
    above, below = right.subplots(2, 1)
    draw_magnitudes(above, [operator] if operator else [])
    draw_angulars(below, [operator] if operator else [])
    write_figure(figure, path)


@matplotlib.rc_context(STYLE)
def plot_table(
    rows: Sequence[str],
    columns: Sequence[str],
    panels: Mapping[str, Mapping[tuple[str, str], Sequence[float]]],
    path: Path,
    from_zero: bool = False,
) -> None:
    """Write a PNG of tables side by side, one line of dots a row, one colour a column.

    Args:
        panels: for each panel's title the values of each (row, column); NaN, for a network that has not converged, is
            drawn as a cross at the right edge.
        from_zero: whether the panels have one axis, which begins at 0.
    """
    figure = Figure(figsize=(12, 1.2 + 0.4 * len(rows)), layout="constrained")
    for axes, (title, values) in zip(
        figure.subplots(1, len(panels), sharey=True, sharex=from_zero, squeeze=False)[0], panels.items(), strict=True
    ):
        for index, column in enumerate(columns):
            for place, row in enumerate(rows):
                cell = values.get((row, column), ())
                # Numbers that are not finite are not drawn.
                axes.scatter(cell, [place] * len(cell), color=f"C{index}")
                if not all(map(math.isfinite, cell)):
                    edge = axes.get_yaxis_transform()
                    axes.plot(1, place, marker="x", color=f"C{index}", transform=edge, clip_on=False)
        axes.set_title(title, fontsize=10)
        axes.set_yticks(range(len(rows)), rows)
        axes.grid(axis="y", linewidth=0.3)
        axes.set_axisbelow(True)
    axes.invert_yaxis()
    # The axis is cut when all is drawn, since its other end would no longer adapt.
    if from_zero:
        axes.set_xlim(left=0)
    for index, column in enumerate(columns):
        axes.scatter([], [], color=f"C{index}", label=column)
    # A table of one column has no name for it.
    if any(columns):
        crossed = any(
            not math.isfinite(value) for cells in panels.values() for cell in cells.values() for value in cell
        )
        title = "× not converged" if crossed else None
        axes.legend(frameon=False, loc="upper left", bbox_to_anchor=(1.02, 1), title=title)
    write_figure(figure, path)


@matplotlib.rc_context(STYLE)
def plot_features(panels: Mapping[str, Sequence[Sequence[float]]], path: Path) -> None:
    """Write a PNG of two-dimensional features: for each panel's title [x, y, label] of every image."""
    figure = Figure(figsize=(12, 3.4), layout="constrained")
    for axes, (title, features) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True):
        axes.set_title(title, fontsize=10)
        horizontal, vertical, labels = zip(*features, strict=True)
        points = axes.scatter(horizontal, vertical, c=labels, cmap="tab10", s=3)
    figure.colorbar(points, label="class", ticks=sorted(set(labels)))
    write_figure(figure, path)
