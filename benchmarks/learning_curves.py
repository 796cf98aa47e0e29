"""What benchmarks that train share: each variant is trained with each seed by train.py fit, and its curve is kept."""

import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks import measure
from zoo.recipes.epochs import EpochLines
from zoo.training.cli import run


def fill(
    output: Path, settings: dict[str, str], variants: Mapping[str, Sequence[str]], seeds: int, threads: int
) -> None:
    """Train what is missing in a file of results, and write it after each run.

    Args:
        settings: what all runs have in common, and is written beside them; ``precision`` is that of the trainer.
        variants: the options of ``train.py fit`` for each variant.
        seeds: runs of each variant.
        threads: of the CPU.
    """
    torch.set_num_threads(threads)
    rows = measure.earlier(output, settings).get("rows", [])
    done = {(row["variant"], row["seed"]) for row in rows}
    for seed in range(seeds):
        for variant, words in variants.items():
            if (variant, seed) not in done:
                rows.append(_train(variant, seed, words, settings["precision"]))
                measure.write({**settings, **measure.describe("cpu", threads), "rows": rows}, output)


def _train(variant: str, seed: int, words: Sequence[str], precision: str) -> dict[str, Any]:
    """Return the validation accuracies of a run after each epoch, and the seconds that all of it took."""
    lines = EpochLines(f"{variant}, seed {seed}", precision, precision)
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as scratch:
        options = ["--seed_everything", str(seed), "--trainer.precision", precision, "--trainer.logger", "false"]
        run(["fit", *words, *options, "--checkpoint.dirpath", scratch], callbacks=[lines])
    accuracies = [epoch["val_accuracy"] for epoch in lines.epochs]
    return {"variant": variant, "seed": seed, "accuracies": accuracies, "seconds": round(time.monotonic() - began)}
