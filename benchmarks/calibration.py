"""What trained plain networks keep when they are converted and calibrated: python -m benchmarks.calibration

The plain checkpoints of the zoo are converted to each magnitude with the angular function cosine, weighted by the
filters' norms, and measured on all test images: as they were, after conversion alone, after calibration on 512 training
images, and, at the quantile 0.99, after one epoch of training without augmentation. MNIST and CIFAR-10 are expected in
data/, as by python -m zoo train-zoo. What results/calibration.json has already is kept.
"""

import argparse
import dataclasses
import fnmatch
import functools
import json
import os
import statistics
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

import zoo
from benchmarks import measure
from operators import MAGNITUDES, calibrate, diagnose
from zoo.checkpoints.catalogue import PRETRAINED
from zoo.checkpoints.config import read_config
from zoo.data import ImageData
from zoo.data.measuring import recorded_data
from zoo.models.conversion import convert
from zoo.models.image_model import ImageModel
from zoo.models.spec import PLAIN
from zoo.training.cli import run

OUTPUT = measure.RESULTS / "calibration.json"
TWINS = ("digits_cnn6_conv", "mnist_cnn6_conv", "cifar10_resnet20_conv")
QUANTILES = (0.9, 0.99, 0.999)
TRAINED_AT = 0.99
CALIBRATION_IMAGES = 512
# Of the validation batches, this many make one that is diagnosed, which takes longer than to measure accuracy.
DIAGNOSED_EVERY = 8
# Of AdamW, falling to 0 over the epoch. Chosen on the validation images of CIFAR-10 with SphereConv, which is hardest.
LEARNING_RATE = 1e-3


@dataclasses.dataclass(frozen=True)
class Cell:
    """A network, the magnitude it is converted to (or ``"conv"``), and the quantile it is calibrated with."""

    twin: str
    magnitude: str
    quantile: float

    @property
    def name(self) -> str:
        return f"{self.twin} {self.magnitude} {self.quantile}"


def cells() -> Iterator[Cell]:
    """Yield every cell of the table; magnitudes without a radius do not depend on the quantile."""
    for twin in TWINS:
        yield Cell(twin, PLAIN, TRAINED_AT)
        for name, magnitude in MAGNITUDES.items():
            for quantile in QUANTILES if magnitude.uses_radius else [TRAINED_AT]:
                yield Cell(twin, name, quantile)


def measure_cell(cell: Cell, data: ImageData, train: bool) -> dict[str, Any]:
    """Return a row: accuracies on the test images, and what ``diagnose`` says, averaged over layers."""
    row: dict[str, Any] = dataclasses.asdict(cell)
    row["before"], row["images"] = as_converted(cell.twin, PLAIN, data)
    model = zoo.load(cell.twin)
    if cell.magnitude != PLAIN:
        row["converted"], _ = as_converted(cell.twin, cell.magnitude, data)
        convert(model, f"{cell.magnitude}_cosine")
        calibrate(model, [data.sample(CALIBRATION_IMAGES)], cell.quantile)
        row["calibrated"], _ = zoo.accuracy(model, data.evaluation_batches("test"))
        layers = diagnose(model, list(data.evaluation_batches("val"))[::DIAGNOSED_EVERY]).layers
        row["error"] = statistics.mean(layer.error for layer in layers)
        if layers[0].beyond is not None:
            row["beyond"] = statistics.mean(layer.beyond for layer in layers)
    if train and cell.quantile == TRAINED_AT:
        row["trained"], _ = zoo.accuracy(trained(model, cell, data), data.evaluation_batches("test"))
    return row


@functools.cache
def as_converted(twin: str, magnitude: str, data: ImageData) -> tuple[float, int]:
    """Return the accuracy of a network that was at most converted, and the number of test images."""
    model = zoo.load(twin)
    if magnitude != PLAIN:
        convert(model, f"{magnitude}_cosine")
    return zoo.accuracy(model, data.evaluation_batches("test"))


def read_rows() -> dict[str, Any]:
    """Return the rows that are measured already."""
    return json.loads(OUTPUT.read_text(encoding="utf-8"))["rows"] if OUTPUT.is_file() else {}


def trained(model: ImageModel, cell: Cell, data: ImageData) -> ImageModel:
    """Return a copy of a model after one epoch on the images that its twin was trained on."""
    with tempfile.TemporaryDirectory() as scratch:
        start = zoo.save(model, Path(scratch) / "start")
        words = ["fit", "--config", f"configs/{cell.twin}.yaml", "--checkpoint.dirpath", f"{scratch}/run"]
        words += ["--model.architecture", "null", "--model.operator", "null", "--model.init_from", str(start)]
        words += ["--model.optimizer", "adamw", "--model.learning_rate", str(LEARNING_RATE), "--model.warmup", "0"]
        words += ["--data.augment", "none", "--trainer.max_epochs", "1", "--trainer.logger", "false"]
        return run(words, callbacks=[], shared=data).model.model.eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="*", metavar="GLOB", help="only cells with such a name, e.g. 'digits*'")
    parser.add_argument("--no-training", dest="train", action="store_false", help="leave out the epoch of training")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="CPU threads (default: %(default)s)")
    parsed = parser.parse_args()
    torch.set_num_threads(parsed.threads)
    sets: dict[str, ImageData] = {}
    for cell in cells():
        done = read_rows().get(cell.name)
        complete = done and ("trained" in done or cell.quantile != TRAINED_AT or not parsed.train)
        if complete or not fnmatch.fnmatch(cell.name, parsed.only):
            continue
        if cell.twin not in sets:
            sets = {cell.twin: recorded_data(read_config(PRETRAINED / cell.twin)["training"]["data"], None)}
        row = measure_cell(cell, sets[cell.twin], parsed.train)
        print(row, flush=True)
        # Read again, for another process may have measured other rows meanwhile.
        measure.write({**measure.describe("cpu", parsed.threads), "rows": read_rows() | {cell.name: row}}, OUTPUT)


if __name__ == "__main__":
    main()
