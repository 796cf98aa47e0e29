"""What a repository of the Hugging Face Hub is called, and the files that it has: those of a checkpoint folder."""

import re

from huggingface_hub import errors
from huggingface_hub.utils import validate_repo_id

# The files of a checkpoint, in the order in which they are fetched; the last one is not needed to load it.
CONFIG, WEIGHTS, CARD = FILES = ("config.json", "model.safetensors", "README.md")

# Bytes that config.json and the card may have; the names of 22,000 classes take 1 MB.
LARGEST_TEXT = 1 << 24

COMMIT = "[0-9a-f]{40}"


def is_repository(name: str) -> bool:
    """Return whether ``name`` has the form ``owner/name``, and the Hub allows it."""
    try:
        validate_repo_id(name)
    except errors.HFValidationError:
        return False
    return "/" in name


def is_revision(name: str) -> bool:
    """Return whether ``name`` may be that of a branch or tag."""
    return bool(re.fullmatch(r"[\w.-]+(/[\w.-]+)*", name)) and ".." not in name
