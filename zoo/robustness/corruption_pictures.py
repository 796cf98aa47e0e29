"""A picture of how accuracy falls as the light gets worse."""

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure

from zoo.corruptions.ways import FACTORS, SCALES, scale_key
from zoo.figures import STYLE, write_figure
from zoo.robustness.corruption_result import CorruptionResult
from zoo.robustness.pictures import colour_of


@matplotlib.rc_context(STYLE)
def plot_light(networks: Mapping[str, Sequence[CorruptionResult]], path: Path) -> None:
    """Write a PNG of the accuracy over contrast and over brightness: mean and range of the seeds."""
    figure = Figure(figsize=(9, 3.8), layout="constrained")
    factors = (1, *FACTORS)
    for axes, scale in zip(figure.subplots(1, len(SCALES), sharey=True), SCALES, strict=True):
        for name, results in networks.items():
            values = [[result.accuracy(scale_key(scale, factor)) for result in results] for factor in factors]
            style = {"color": colour_of(name), "linestyle": _style(name)}
            axes.plot(factors, list(map(statistics.mean, values)), marker="o", markersize=3, label=name, **style)
            axes.fill_between(
                factors, list(map(min, values)), list(map(max, values)), color=style["color"], alpha=0.15, linewidth=0
            )
        axes.set_xscale("log")
        axes.set_xticks(factors, [f"{factor:g}" for factor in factors])
        axes.minorticks_off()
        axes.invert_xaxis()
        axes.set(xlabel=f"{scale}, times the image's own", ylim=(0, 100))
    figure.axes[0].set_ylabel("accuracy, %")
    figure.axes[-1].legend(frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
    write_figure(figure, path)


def _style(name: str) -> str:
    """Return how the line of a network is drawn that was trained by another recipe than the published one."""
    return "--" if "light" in name else ":" if "bias_free" in name else "-"
