"""How all pictures look, and how they are written."""

from pathlib import Path

from matplotlib.figure import Figure

STYLE = {"axes.spines.top": False, "axes.spines.right": False, "font.size": 10}
WRONG = "tab:red"


def write_figure(figure: Figure, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
