"""Where numbers come from: the command, the commit and the machine."""

import functools
import os
import platform
import shlex
import subprocess
import sys
from pathlib import Path

import torch

from zoo.files import relative


def origin(device: torch.device) -> dict[str, str]:
    """Return what a training's numbers depend on beside its recipe: commit, hardware and torch."""
    return {"commit": commit(), "hardware": _hardware(device), "torch": str(torch.__version__)}


@functools.cache
def commit() -> str:
    """Return the commit of this code, with ``-dirty`` if files differ from it."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        git = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent)
    except OSError:
        return "none"
    return git.stdout.strip() if git.returncode == 0 else "none"


def _hardware(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{os.cpu_count()} CPU cores ({platform.machine()})"


def program(otherwise: str) -> list[str]:
    """Return the words by which this program was called: those of ``decoupled-zoo`` or ``python -m zoo``, if it is one.

    Args:
        otherwise: the words of any other program.
    """
    called = Path(sys.argv[0])
    if called.stem == "decoupled-zoo":
        return ["decoupled-zoo"]
    if called.parts[-2:] == ("zoo", "__main__.py"):
        return ["python", "-m", "zoo"]
    return otherwise.split()


def command_of(*words: str) -> str:
    """Return a command as it is recorded and published: without the folders above this one."""
    return shlex.join(portable(word) for word in words)


def portable(word: str) -> str:
    """Return a word of a command line in which an absolute path is told from this folder, or by its last part alone.

    One on another drive of Windows stays as it is.
    """
    option, equals, value = word.rpartition("=")
    if not os.path.isabs(value):
        return word
    seen = relative(value)
    outside = seen.replace(os.path.sep, "/").split("/")[0] == os.path.pardir
    return option + equals + (os.path.basename(os.path.normpath(value)) if outside else seen)
