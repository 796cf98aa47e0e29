"""Commands on images: preflight."""

from pathlib import Path

from rich.console import Console
from rich.table import Table

from zoo.commands.arguments import Commands
from zoo.data.folder import ImageFolder
from zoo.data.table import ImageTable


def add_commands(commands: Commands) -> None:
    """Add the command and what it takes."""
    command = commands.add_parser("preflight", help="open every image of a data set, and list all that cannot be read")
    command.description = "Open every image of train, val and test, and list all that cannot be read; then exit 1."
    command.add_argument(
        "root", metavar="ROOT", help="the folder that holds train (--data ImageFolder), or a table (--data ImageTable)"
    )
    for column in ("file", "label", "split"):
        command.add_argument(f"--{column}-column", help=f"the table's column of {column}s (default: {column})")
    command.add_argument("--grey", action="store_true", help="for a network that takes one channel")
    command.set_defaults(function=preflight)


def preflight(root: str, *, grey: bool = False, **columns: str | None) -> int:
    """Open every image of a folder or table, and list all that cannot be read; return 1 if there are any.

    Args:
        columns: the names of a table's columns, as :class:`ImageTable` takes them; None for its own.

    Raises:
        ValueError: columns of a folder.
    """
    kind = ImageTable if Path(root).is_file() else ImageFolder
    named = {column: name for column, name in columns.items() if name is not None}
    if named and kind is ImageFolder:
        raise ValueError(f"{root} is no table, which alone has columns; leave out {', '.join(named)}")
    survey = kind(root, in_chans=1 if grey else 3, **named).survey()
    table = Table("split", "images", "classes", "in the smallest", "cannot be read")
    for split, (labels, broken) in survey.items():
        counts = labels.bincount()
        table.add_row(split, f"{len(labels):,}", str(len(counts)), f"{counts.min():,}", str(len(broken)))
    Console().print(table)
    reasons = {file: reason for _, broken in survey.values() for file, reason in broken.items()}
    for file, reason in reasons.items():
        print(f"{file}: {reason}")
    return int(bool(reasons))
