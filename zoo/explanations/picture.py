"""A picture of explanations: images, and what in them speaks for and against two classes."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import matplotlib
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from torch import Tensor

from zoo.explanations.explanation import Class, Explanation, explain
from zoo.figures import STYLE, write_figure
from zoo.models.image_model import ImageModel

# The strongest colour stands for the contribution that so many pixels do not exceed.
SHOWN_SHARE = 0.995


@dataclasses.dataclass(frozen=True)
class ExplainedImage:
    """One network's two explanations of one image (C, H, W) in [0, 1]."""

    network: str
    title: str
    image: Tensor
    best: Explanation
    other: Explanation
    class_names: Sequence[str]


def explain_image(name: str, title: str, model: ImageModel, image: Tensor, other: Class | None) -> ExplainedImage:
    """Explain the likeliest class of an image (C, H, W), and beside it another one, by default the second likeliest."""
    batch = image.unsqueeze(0)
    best = explain(model, batch)
    if other is None:
        other = best.logits[0].topk(min(2, best.logits.shape[1])).indices[-1].item()
    return ExplainedImage(name, title, image, best, explain(model, batch, other), model.class_names)


@matplotlib.rc_context(STYLE)
def draw_explanations(rows: Sequence[ExplainedImage], path: Path) -> None:
    """Write a PNG with one row for each explained image: the image, then what speaks for and against two classes.

    All maps have one scale: red pixels raise the logit, blue ones lower it, white ones do neither.
    """
    figure = Figure(figsize=(9, 0.6 + 3.1 * len(rows)), layout="constrained")
    grid = figure.subplots(len(rows), 3, squeeze=False)
    maps = [explanation.contributions.sum(1)[0] for row in rows for explanation in (row.best, row.other)]
    values = torch.cat([values.abs().flatten() for values in maps]).float().cpu()
    scale = max(values.kthvalue(max(1, int(SHOWN_SHARE * len(values)))).values.item(), 1e-12)
    for axes_row, row in zip(grid, rows, strict=True):
        first, *others = axes_row
        first.imshow(row.image.permute(1, 2, 0).cpu().numpy(), cmap="gray", vmin=0, vmax=1)
        first.set_title(row.title, fontsize=9)
        first.set_ylabel(row.network, fontsize=9)
        for axes, explanation in zip(others, (row.best, row.other), strict=True):
            drawn = _draw_map(axes, explanation, row.class_names, scale)
    for axes in grid.flat:
        axes.set_xticks([])
        axes.set_yticks([])
    bar = figure.colorbar(drawn, ax=grid, location="bottom", shrink=0.5, aspect=40)
    bar.set_label("contribution of a pixel to the logit: red speaks for the class, blue against it")
    write_figure(figure, path)


def _draw_map(axes: Axes, explanation: Explanation, class_names: Sequence[str], scale: float) -> AxesImage:
    values = explanation.contributions.sum(1)[0]
    pixels, bias = values.sum().item(), explanation.bias[0].item()
    name = class_names[explanation.target[0]]
    axes.set_title(f"{name}: {explanation.logit[0]:.1f}\n= pixels {pixels:+.1f}, bias {bias:+.1f}", fontsize=9)
    return axes.imshow(values.float().cpu().numpy(), cmap="RdBu_r", vmin=-scale, vmax=scale)
