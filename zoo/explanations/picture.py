"""A picture of explanations: images, and what in them speaks for and against two classes."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import matplotlib
import torch
from matplotlib.figure import Figure
from torch import Tensor

from operators.observation import quantiles_of
from zoo.explanations.explanation import Class, Explanation, explain
from zoo.figures import STYLE, write_figure
from zoo.models.image_model import ImageModel

# The strongest colour stands for the contribution that so many pixels do not exceed.
SHOWN_SHARE = 0.995


@dataclasses.dataclass(frozen=True)
class ExplainedImage:
    """What a network makes of an image (C, H, W) in [0, 1]: the explanation of two classes, the likeliest first."""

    network: str
    title: str
    image: Tensor
    explanation: Explanation
    class_names: Sequence[str]

    def sums(self) -> list[tuple[str, float, float, float]]:
        """Return for each class its name, its logit, and what the pixels and the bias contribute to it."""
        explanation = self.explanation
        names = [self.class_names[index] for index in explanation.target.tolist()]
        pixels = explanation.contributions.sum((1, 2, 3)).tolist()
        return list(zip(names, explanation.logit.tolist(), pixels, explanation.bias.tolist(), strict=True))


def explain_image(name: str, title: str, model: ImageModel, image: Tensor, other: Class | None) -> ExplainedImage:
    """Explain the likeliest class of an image (C, H, W), and another one, by default the second likeliest."""
    guesses = [guess for guess, _ in model.classify(image, top=2)]
    classes = [guesses[0], guesses[-1] if other in (None, guesses[0]) else other]
    explanation = explain(model, image.expand(2, -1, -1, -1), classes)
    return ExplainedImage(name, title, image, explanation, model.class_names)


@matplotlib.rc_context(STYLE)
def draw_explanations(rows: Sequence[ExplainedImage], path: Path) -> None:
    """Write a PNG with one row for each explained image: the image, then what speaks for and against two classes.

    All maps have one scale, which half a percent of the pixels exceed: red ones raise the logit, blue ones lower it,
    white ones do neither.
    """
    figure = Figure(figsize=(9, 1.2 + 3.1 * len(rows)), layout="constrained")
    grid = figure.subplots(len(rows), 3, squeeze=False)
    maps = [row.explanation.contributions.sum(1).float().cpu() for row in rows]
    scale = max(*quantiles_of(torch.cat([values.abs().flatten() for values in maps]), [SHOWN_SHARE]), 1e-12)
    for axes_row, row, row_maps in zip(grid, rows, maps, strict=True):
        first, *others = axes_row
        first.imshow(row.image.permute(1, 2, 0).cpu().numpy(), cmap="gray", vmin=0, vmax=1)
        first.set_title(row.title, fontsize=9)
        first.set_ylabel(row.network, fontsize=9)
        for axes, values, (name, logit, pixels, bias) in zip(others, row_maps.numpy(), row.sums(), strict=True):
            axes.set_title(f"{name}: {logit:.1f}\n= pixels {pixels:+.1f}, bias {bias:+.1f}", fontsize=9)
            drawn = axes.imshow(values, cmap="RdBu_r", vmin=-scale, vmax=scale)
    for axes in grid.flat:
        axes.set_xticks([])
        axes.set_yticks([])
    bar = figure.colorbar(drawn, ax=grid, location="bottom", shrink=0.5, aspect=40, extend="both")
    bar.set_label("contribution of a pixel to the logit: red speaks for the class, blue against it")
    write_figure(figure, path)
