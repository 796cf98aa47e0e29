"""Numbers that are kept as they come, so that a killed run goes on."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from zoo.files import write_whole
from zoo.robustness.result import packed_number


def content_of(images: Tensor, labels: Tensor) -> str:
    """Return a hash of images and their labels."""
    return hashlib.sha256(images.numpy().tobytes() + labels.numpy().tobytes()).hexdigest()


class Ledger:
    """A file to which the numbers of each batch are added as they come, so that a killed run loses one batch at most.

    Args:
        folder, name: of the file, which is called after the name and the identity.
        identity: what the numbers are of, as JSON-able values; those of anything else have a file of their own.
    """

    def __init__(self, folder: Path, name: str, identity: Mapping[str, Any]) -> None:
        text = json.dumps(identity)
        self.path = folder / f"{name}-{hashlib.sha256(text.encode()).hexdigest()[:12]}.jsonl"
        folder.mkdir(parents=True, exist_ok=True)
        lines = self.path.read_text(encoding="utf-8").splitlines() if self.path.is_file() else [text]
        whole = [row for row in map(_parsed, lines) if row is not None]
        self.rows = {(row["key"], row["start"]): row for row in whole[1:]}
        # A line that a kill has cut off would spoil the next one.
        write_whole(self.path, "".join(json.dumps(row) + "\n" for row in whole))

    def add(self, key: str, start: int, values: Tensor, flags: Sequence[str]) -> None:
        row = {"key": key, "start": start, "values": [packed_number(v) for v in values.tolist()], "flags": [*flags]}
        self.rows[key, start] = row
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")


def _parsed(line: str) -> dict[str, Any] | None:
    try:
        return json.loads(line)
    except ValueError:
        return None
