"""What a training's numbers depend on beside its recipe."""

import functools
import os
import platform
import subprocess
from pathlib import Path

import torch


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
