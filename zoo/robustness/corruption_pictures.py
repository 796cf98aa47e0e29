"""A picture of how accuracy falls as the light gets worse."""

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure

from operators import MAGNITUDES
from zoo.figures import STYLE, write_figure
from zoo.robustness.corruption_result import FACTORS, SCALES, CorruptionResult, scale_key


@matplotlib.rc_context(STYLE)
def plot_light(networks: Mapping[str, Sequence[CorruptionResult]], path: Path) -> None:
    """Write a PNG of the accuracy over contrast and over brightness: mean and range of the seeds."""
    figure = Figure(figsize=(9, 3.8), layout="constrained")
    factors = (1, *FACTORS)
    for axes, scale in zip(figure.subplots(1, len(SCALES), sharey=True), SCALES, strict=True):
        for name, results in networks.items():
            values = [[result.accuracy(scale_key(scale, factor)) for result in results] for factor in factors]
            style = {"color": _colour(name), "linestyle": "--" if "light" in name else "-"}
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


def _colour(name: str) -> str:
    """Return black for a plain network, or the colour of its magnitude, alike in all pictures."""
    return next((f"C{index}" for index, kind in enumerate(MAGNITUDES) if kind in name), "black")
