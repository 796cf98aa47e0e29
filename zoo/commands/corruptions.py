"""The command that measures checkpoints on corrupted images: corruptions."""

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.markdown import Markdown

import zoo
from zoo.checkpoints.catalogue import find_local
from zoo.commands.arguments import OUTPUTS, Commands, add_device, positive
from zoo.commands.progress import progress
from zoo.data.measuring import data_for
from zoo.data.registry import DATA
from zoo.files import write_whole
from zoo.robustness.corruption_evaluation import evaluate_corruptions
from zoo.robustness.corruption_report import card_record, corruption_report
from zoo.robustness.corruption_result import twin_among
from zoo.training.device import Device


def add_commands(commands: Commands) -> None:
    """Add the command and what it takes."""
    command = commands.add_parser("corruptions", help="measure checkpoints on corrupted images and in bad light")
    command.description = (
        "Measure checkpoints on test images with the corruptions of Hendrycks and Dietterich, at five severities, and "
        "with less contrast and brightness. Name the plain twin, too, to have it compared. A killed run goes on."
    )
    command.add_argument("names", nargs="+", metavar="name", help="checkpoints of the same images: names or folders")
    command.add_argument("--data", help=f"one of {', '.join(DATA)}; by default what the first was measured on")
    command.add_argument("--root", help="the folder of the images")
    command.add_argument("--limit", type=positive(int), default=2000, help="test images (default: %(default)s)")
    add_device(command)
    command.add_argument(
        "--to", type=Path, default=OUTPUTS / "corruptions", help="folder of the results (default: %(default)s)"
    )
    command.add_argument("--record", action="store_true", help="write the outcome into each config and card")
    command.set_defaults(function=corruptions)


def corruptions(
    names: Sequence[str],
    *,
    to: Path,
    data: str | None = None,
    root: str | None = None,
    limit: int = 2000,
    device: str = "auto",
    record: bool = False,
) -> None:
    """Measure checkpoints, write and show what was found, each beside the plain twin if that is among them."""
    if record:
        for name in names:
            find_local(name)
    device = Device.choose(device, compile=False).name
    images = data_for(names[0], data, root)
    with progress() as (_, tell):
        results = evaluate_corruptions(names, images, limit=limit, device=device, work=to / "work", tell=tell)
    for name, result in zip(names, results, strict=True):
        twin = twin_among(result, results)
        path = to / f"{result.about['checkpoint']}.json"
        result.write(path)
        text = corruption_report(result, twin)
        write_whole(path.with_suffix(".md"), text)
        Console().print(Markdown(text))
        print(f"written: {path}, {path.with_suffix('.md')}")
        if record:
            zoo.record(name, corruptions=card_record(result, twin))
            print(f"recorded: {find_local(name)}")
