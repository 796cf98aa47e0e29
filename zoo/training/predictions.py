"""The table of predictions."""

import csv
import io
from itertools import chain
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import BasePredictionWriter
from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch import Tensor

from zoo.files import refuse_file_above, write_whole


class PredictionTable(BasePredictionWriter):
    """Show the predicted classes as a table, and write them all as CSV.

    Args:
        output: the CSV file (columns: image, then class and probability of the likeliest classes), whose name ends in
            .csv; none by default.
        top: how many of the likeliest classes are shown.
        rows: how many images the table on the screen shows; the file has all.

    Raises:
        ValueError: ``top`` or ``rows`` below 1, or an ``output`` that is no name of a CSV file.
    """

    def __init__(self, output: str | None = None, top: int = 3, rows: int = 20) -> None:
        super().__init__(write_interval="epoch")
        if min(top, rows) < 1:
            raise ValueError(f"top and rows must be at least 1, got {top} and {rows}")
        if output is not None and (Path(output).suffix.lower() != ".csv" or Path(output).is_dir()):
            raise ValueError(f"the predictions are written as CSV, so output ends in .csv, got {output}")
        if output is not None:
            refuse_file_above(Path(output))
        self.output = output
        self.top = top
        self.rows = rows

    def write_on_epoch_end(
        self, trainer: L.Trainer, module: L.LightningModule, predictions: list[Tensor], batch_indices: Any
    ) -> None:
        probabilities, labels = torch.cat(predictions).cpu().sort(1, descending=True)
        names = module.model.class_names
        places = range(min(self.top, len(names)))
        files = [trainer.datamodule.predict_files[index] for batch in batch_indices[0] for index in batch]
        rows = [
            [(file, ""), *((names[order[place]], f"{values[place]:.4f}") for place in places)]
            for file, order, values in zip(files, labels, probabilities, strict=True)
        ]
        # The file is written first, whatever the terminal can show.
        if self.output:
            header = ["image", *(f"{what} {place + 1}" for place in places for what in ("class", "probability"))]
            self._write(Path(self.output), [header, *([file, *chain(*guesses)] for (file, _), *guesses in rows)])
        self._show(rows)

    def _show(self, rows: list[list[tuple[str, str]]]) -> None:
        table = Table(caption=f"{min(self.rows, len(rows))} of {len(rows)} images")
        table.add_column("image", overflow="fold")
        for place in range(1, len(rows[0])):
            table.add_column(f"class {place}", no_wrap=True)
        for row in rows[: self.rows]:
            # Text, in which brackets are brackets.
            table.add_row(*(Text(" ".join(cell)) for cell in row))
        Console().print(table)

    def _write(self, path: Path, rows: list[list[str]]) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        text = io.StringIO(newline="")
        csv.writer(text).writerows(rows)
        write_whole(path, text.getvalue())
        print(f"written: {path}")
