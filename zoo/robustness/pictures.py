"""Pictures of results: accuracy over ε, efforts, and images that were attacked."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib
import torch
from matplotlib.figure import Figure
from torch import Tensor

from operators import MAGNITUDES
from zoo.figures import STYLE, WRONG, write_figure
from zoo.models.image_model import ImageModel
from zoo.models.spec import PLAIN
from zoo.robustness.attacks import is_right, pgd
from zoo.robustness.probes import STEPS, step_size
from zoo.robustness.protocol import compared_eps
from zoo.robustness.report import efforts_of, level, name_of
from zoo.robustness.result import Result
from zoo.statistics import evenly_spaced

# The number of images in a picture.
ATTACKED_IMAGES = 6


def draw(results: Sequence[Result], stem: Path) -> list[Path]:
    """Write the pictures of results beside each other: accuracy over ε, and the efforts; return the files."""
    written = []
    drawn = [result for result in results if len(result.curve()) > 1]
    if drawn:
        written.append(stem.with_name(f"{stem.name}_curve.png"))
        eps = results[0].eps
        levels = compared_eps(eps)
        fgsm = {name_of(r): {at: s for at in levels if (s := r.accuracy("fgsm", at)) is not None} for r in drawn}
        plot_curves({name_of(result): result.curve() for result in drawn}, fgsm, eps, written[-1])
    # The smallest of more attacks is smaller: only what the same ones found is shown side by side.
    alike = [result for result in results if efforts_of(result) == efforts_of(results[0])]
    efforts = {name_of(r): effort for r in alike if (effort := r.effort()) is not None}
    shown = {name: lengths[(lengths > 0) & lengths.isfinite()].tolist() for name, lengths in efforts.items()}
    if any(shown.values()):
        written.append(stem.with_name(f"{stem.name}_effort.png"))
        plot_efforts({name: lengths for name, lengths in shown.items() if lengths}, written[-1])
    return written


def draw_attacked(model: ImageModel, images: Tensor, labels: Tensor, eps: float, path: Path) -> None:
    """Write a picture of images that the network names right, what PGD adds to them, and what it then calls them.

    If it names none right, there is no picture.
    """
    right = is_right(model, images, labels).nonzero()[:, 0]
    if not len(right):
        return
    # In a data set that is sorted, the first ones would be of one class.
    right = right[evenly_spaced(ATTACKED_IMAGES, len(right))]
    images, labels = images[right], labels[right]
    moved = pgd(model, images, labels, eps, step=step_size(eps, STEPS), steps=STEPS)
    with torch.no_grad():
        guesses = [model(batch).argmax(1).tolist() for batch in (images, moved)]
    names = [[model.class_names[guess] for guess in each] for each in guesses]
    title = f"{model.spec.architecture} with {model.spec.operator_name}, PGD-{STEPS}, ε = {level(eps)}"
    plot_attacked(images.cpu(), moved.cpu(), *names, title, path)


@matplotlib.rc_context(STYLE)
def plot_curves(
    curves: Mapping[str, Mapping[float, float]], fgsm: Mapping[str, Mapping[float, float]], eps: float, path: Path
) -> None:
    """Write a PNG of the accuracy over ε, in grey levels, one colour a checkpoint.

    Args:
        curves: under PGD, for each checkpoint by ε; the first one is drawn above the others.
        fgsm: likewise under FGSM, dashed.
        eps: of the headline, which is marked.
    """
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    axes = figure.subplots()
    for place, name in enumerate(curves):
        for shares, style in ((curves[name], {"label": name, "marker": "o"}), (fgsm[name], {"linestyle": "--"})):
            levels, accuracies = [255 * at for at in shares], [100 * share for share in shares.values()]
            axes.plot(levels, accuracies, color=colour_of(name, place), markersize=4, zorder=3 - place / 100, **style)
    axes.plot([], [], color="grey", marker="o", markersize=4, label="PGD-50, one start, two losses")
    axes.plot([], [], color="grey", linestyle="--", label="FGSM")
    axes.axvline(255 * eps, color="grey", linewidth=0.8, linestyle=":", label="ε of the headline")
    axes.set_xscale("symlog", base=2, linthresh=1)
    axes.set_xticks([0, 1, 2, 4, 8, 16, 32, 64, 128], ["0", "1", "2", "4", "8", "16", "32", "64", "128"])
    axes.set(
        xlabel="largest change of a pixel ε, in levels of 255", ylabel="accuracy, %", xlim=(-0.1, 140), ylim=(-2, 102)
    )
    axes.legend(frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
    write_figure(figure, path)


@matplotlib.rc_context(STYLE)
def plot_efforts(efforts: Mapping[str, Sequence[float]], path: Path) -> None:
    """Write a PNG of how far in L2 the nearest mistakes are: for each checkpoint quartiles and every image."""
    figure = Figure(figsize=(8, 1.2 + 0.5 * len(efforts)), layout="constrained")
    axes = figure.subplots()
    axes.boxplot(list(efforts.values()), orientation="horizontal", tick_labels=list(efforts), showfliers=False)
    for place, lengths in enumerate(efforts.values(), 1):
        axes.scatter(lengths, [place + 0.3] * len(lengths), s=6, alpha=0.5, color="C0")
    axes.set(xlabel="L2 distance of an image (a dot) to the nearest mistake", xlim=(0, None))
    axes.invert_yaxis()
    write_figure(figure, path)


@matplotlib.rc_context(STYLE)
def plot_attacked(
    images: Tensor, moved: Tensor, names: Sequence[str], mistaken: Sequence[str], title: str, path: Path
) -> None:
    """Write a PNG of images, what was added to them, amplified, and the sums, with the predicted classes.

    Args:
        images, moved: (N, C, H, W) in [0, 1].
        names, mistaken: what the network calls them.
    """
    figure = Figure(figsize=(1 + 1.7 * len(images), 5.2), layout="constrained")
    figure.suptitle(title)
    change = moved - images
    factor = 0.5 / change.abs().max().clamp_min(1e-12)
    amplified = 0.5 + factor * change
    grid = figure.subplots(3, len(images), squeeze=False)
    for row, (kind, pictures, titles) in enumerate(
        [("image", images, names), (f"change × {factor:.0f}", amplified, [""] * len(names)), ("sum", moved, mistaken)]
    ):
        for column, (axes, picture, text) in enumerate(zip(grid[row], pictures, titles, strict=True)):
            axes.imshow(picture.permute(1, 2, 0).numpy(), cmap="gray", vmin=0, vmax=1)
            axes.set_title(text, fontsize=9, color=WRONG if row == 2 and text != names[column] else "black")
            axes.set_xticks([])
            axes.set_yticks([])
            if column == 0:
                axes.set_ylabel(kind)
    write_figure(figure, path)


def colour_of(name: str, place: int = 0) -> str:
    """Return a network's colour: black for a plain one, that of its magnitude, alike in all pictures, or any."""
    words = name.split("_")
    if PLAIN in words:
        return "black"
    kind = next((word for word in words if word in MAGNITUDES), None)
    return f"C{place if kind is None else list(MAGNITUDES).index(kind)}"
