"""Fine-tuning a converted timm network beside its plain twin: python -m benchmarks.finetune

resnet10t is trained on six classes of CIFAR-10 (JPEG) at 64 pixels, then fine-tuned on a thousand images of the other
four: as it is, converted, converted and calibrated, and, for comparison, from scratch. CIFAR-10 is expected in
data/cifar10/{train,test}/CLASS. What is in outputs/finetune and results/finetune.json already is kept.
"""

import argparse
import json
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks import measure
from zoo.data.contents import class_folders
from zoo.recipes.epochs import EpochLines
from zoo.training.cli import run
from zoo.training.export import export

OUTPUT = measure.RESULTS / "finetune.json"
IMAGES, WORK = Path("data/cifar10"), Path("outputs/finetune")
ARCHITECTURE, OPERATOR, SIZE = "resnet10t", "tanh_cosine", 64
SOURCE_CLASSES, SOURCE_IMAGES, SOURCE_EPOCHS = 6, 1000, 5
TARGET_IMAGES, TARGET_EPOCHS = 250, 6
SOURCE = WORK / f"cifar6_{ARCHITECTURE}_conv"
# What is compared, as options of train.py.
VARIANTS = {
    "plain": ["--model.init_from", str(SOURCE)],
    "converted": ["--model.init_from", str(SOURCE), "--model.operator", OPERATOR],
    "converted and calibrated": [
        *("--model.init_from", str(SOURCE), "--model.operator", OPERATOR),
        *("--model.calibrate", "0.99"),
    ],
    "plain, from scratch": ["--model.architecture", ARCHITECTURE, "--model.operator", "conv"],
}
RECIPE = ["--data.input_size", str(SIZE), "--data.batch_size", "32", "--trainer.logger", "false"]


def link_images(folder: Path, classes: list[str], images: int) -> None:
    """Make folder/train and folder/val of links to so many images a class of CIFAR's training and test images."""
    for split, source in (("train", "train"), ("val", "test")):
        for name in classes:
            target = folder / split / name
            target.mkdir(parents=True, exist_ok=True)
            for file in sorted((IMAGES / source / name).iterdir())[:images]:
                if not (target / file.name).exists():
                    (target / file.name).symlink_to(file.resolve())


def train_source() -> None:
    """Train the network that is converted later, unless it is there."""
    if SOURCE.is_dir():
        return
    words = ["fit", "--data", "ImageFolder", "--data.root", str(WORK / "source"), *RECIPE]
    words += ["--model.architecture", ARCHITECTURE, "--model.operator", "conv"]
    words += ["--trainer.max_epochs", str(SOURCE_EPOCHS), "--checkpoint.dirpath", str(WORK / "source_run")]
    run(words, callbacks=[EpochLines("source")])
    export(WORK / "source_run" / "last.ckpt", SOURCE)


def fine_tune(variant: str, seed: int) -> dict[str, Any]:
    """Return the validation accuracies after each epoch, and the seconds that all of it took."""
    lines = EpochLines(f"{variant}, seed {seed}")
    began = time.monotonic()
    words = ["fit", "--data", "ImageFolder", "--data.root", str(WORK / "target"), *RECIPE, *VARIANTS[variant]]
    words += ["--model.learning_rate", "0.001", "--seed_everything", str(seed)]
    with tempfile.TemporaryDirectory() as scratch:
        words += ["--trainer.max_epochs", str(TARGET_EPOCHS), "--checkpoint.dirpath", scratch]
        run(words, callbacks=[lines])
    accuracies = [epoch["val_accuracy"] for epoch in lines.epochs]
    return {"variant": variant, "seed": seed, "accuracies": accuracies, "seconds": round(time.monotonic() - began)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3, help="runs of each variant (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="CPU threads (default: %(default)s)")
    parsed = parser.parse_args()
    torch.set_num_threads(parsed.threads)
    classes = list(class_folders(IMAGES / "train"))
    link_images(WORK / "source", classes[:SOURCE_CLASSES], SOURCE_IMAGES)
    link_images(WORK / "target", classes[SOURCE_CLASSES:], TARGET_IMAGES)
    train_source()
    record = {**measure.describe("cpu", parsed.threads), "rows": []}
    if OUTPUT.is_file():
        record["rows"] = json.loads(OUTPUT.read_text(encoding="utf-8"))["rows"]
    done = {(row["variant"], row["seed"]) for row in record["rows"]}
    for seed in range(parsed.seeds):
        for variant in VARIANTS:
            if (variant, seed) not in done:
                record["rows"].append(fine_tune(variant, seed))
                measure.write(record, OUTPUT)


if __name__ == "__main__":
    main()
