"""The command that attacks a checkpoint: robustness."""

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.markdown import Markdown

from zoo.checkpoints.catalogue import find_local
from zoo.commands.arguments import OUTPUTS, Commands, add_device, pixels, positive
from zoo.commands.progress import progress
from zoo.data.registry import DATA
from zoo.robustness.assessment import Assessment, assess
from zoo.robustness.protocol import EPS
from zoo.training.device import Device


def add_commands(commands: Commands) -> None:
    """Add the command and what it takes."""
    command = commands.add_parser("robustness", help="attack a checkpoint and say how far to believe the outcome")
    command.description = (
        "Attack a checkpoint, tell the worst case of each image, and look for masked gradients. A killed run goes on."
    )
    command.add_argument("name", help="the checkpoint's name or folder")
    command.add_argument("--data", help=f"one of {', '.join(DATA)}; by default what it was measured on")
    command.add_argument("--root", help="the folder of the images")
    command.add_argument("--attack", action="append", default=[], help="only this one (give it again for more)")
    command.add_argument("--eps", type=pixels, default=EPS, help="largest change of a pixel (default: 8/255)")
    command.add_argument("--limit", type=positive(int), default=1000, help="test images (default: %(default)s)")
    command.add_argument(
        "--effort-limit", type=positive(int), default=100, help="of these, for the L2 attacks (default: %(default)s)"
    )
    command.add_argument(
        "--transfer", action="append", metavar="NAME", help="network to take images from; the twin and another if known"
    )
    add_device(command)
    command.add_argument(
        "--to", type=Path, default=OUTPUTS / "robustness", help="folder of the result (default: %(default)s)"
    )
    command.add_argument(
        "--record", action="store_true", help="write the outcome into the checkpoint's config and card"
    )
    command.set_defaults(function=robustness)


def robustness(
    name: str,
    *,
    to: Path,
    data: str | None = None,
    root: str | None = None,
    attack: Sequence[str] = (),
    eps: float = EPS,
    limit: int = 1000,
    effort_limit: int = 100,
    transfer: Sequence[str] | None = None,
    device: str = "auto",
    record: bool = False,
) -> None:
    """Attack a checkpoint, show the report, and list the files that were written."""
    settings = {"data": data, "root": root, "attacks": attack, "eps": eps, "transfer": transfer, "record": record}
    settings |= {"limit": limit, "effort_limit": effort_limit, "device": Device.choose(device, compile=False).name}
    with progress() as (bar, tell):

        def show(found: Assessment) -> None:
            bar.stop()
            _show(found)

        assess(name, **settings, folder=to, tell=tell, show=show)
    if record:
        print(f"recorded: {find_local(name)}")


def _show(found: Assessment) -> None:
    if found.left_out:
        print(f"{found.left_out} is of other images or another ε, and left out")
    Console().print(Markdown(found.report))
    for path in found.files:
        print(f"written: {path}")
