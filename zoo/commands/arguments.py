"""Words of the command line that several commands read."""

import argparse
import re
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

# The type of what add_subparsers returns, to which each family adds its commands.
Commands = argparse._SubParsersAction

OUTPUTS = Path("outputs")


def pixels(text: str) -> float:
    """Read a change of pixels, such as 8/255 or 0.03."""
    try:
        if 0 < (value := float(Fraction(text))) <= 1:
            return value
    except (ValueError, ZeroDivisionError):
        pass
    raise argparse.ArgumentTypeError(f"must be a part of the range of pixels, above 0 and up to 1, got {text!r}")


def checkpoint_name(text: str) -> str:
    """Read a checkpoint's name."""
    if not re.fullmatch(r"[\w.-]+", text):
        raise argparse.ArgumentTypeError(
            f"a name has letters, digits, '.', '-' and '_' alone (--to names the folder it is put into), got {text!r}"
        )
    return text


def positive(kind: type[float]) -> Callable[[str], float]:
    """Return a function that reads a positive number of that kind."""

    def read(text: str) -> float:
        try:
            if (value := kind(text)) > 0:
                return value
        except ValueError:
            pass
        raise argparse.ArgumentTypeError(f"must be a {'whole ' * (kind is int)}number above 0, got {text!r}")

    return read


def add_device(command: argparse.ArgumentParser) -> None:
    """Add --device."""
    command.add_argument("--device", default="auto", help="auto, cpu or cuda (default: %(default)s)")


def add_new_folder(command: argparse.ArgumentParser) -> None:
    """Add --to and --overwrite, of a command that writes a checkpoint folder."""
    command.add_argument("--to", type=Path, default=OUTPUTS, help="parent of the new folder (default: %(default)s)")
    command.add_argument("--overwrite", action="store_true", help="replace a folder that exists")
