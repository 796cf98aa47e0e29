"""Training on one and on several processes, and what ImageNet would take: python -m benchmarks.scaling

Measures images a second of one and two processes in interleaved repeats, how fast a CPU decodes photographs and what
memory an image takes in training. Writes results/scaling.json and the tables in docs/scaling.md.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning as L
import timm
import torch
from lightning.pytorch.strategies import ModelParallelStrategy

from benchmarks import measure
from benchmarks.photos import photographs
from benchmarks.pipeline import Generated
from benchmarks.report import DOCS, read
from operators import OperatorConfig, convert_decoupled
from zoo.files import write_whole
from zoo.markdown import filled, markdown_table
from zoo.models.transform import ImageTransform
from zoo.training.classifier import Classifier

OUTPUT = measure.RESULTS / "scaling.json"
PAGE = DOCS / "scaling.md"
TITLES = {
    "one": "1 process, 1 thread",
    "threads": "1 process, 2 threads",
    "ddp": "2 processes, DDP",
    "fsdp": "2 processes, FSDP",
}
NETWORKS = ("conv", "tanh_cosine")
# Images of a step of all processes together, steps that are not timed, and steps that are.
BATCH, WARM_UP, STEPS = 128, 3, 12
# Side of the photographs that are decoded, about that of ImageNet's, and of what a crop is taken from.
PHOTOGRAPH, STORED = (500, 375), 256

# Training images a second of a plain network on one RTX 3090 (AMP, channels last, torch 1.12), as timm publishes them
# in results/benchmark-train-amp-nhwc-pt112-cu113-rtx3090.csv.
PUBLISHED = {"resnet18": 3481.78, "resnet50": 1218.01}
IMAGES, EPOCHS, GPUS = 1_281_167, 90, 8
# Assumed, and not measured: what eight GPUs of a machine give together, as a share of eight times one.
EFFICIENCY = 0.9


class Clock(L.Callback):
    """Keeps the seconds from the end of the warm-up to the last step."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        self.times.append(time.perf_counter())


def train(way: str, operator: str) -> None:
    """Train in this process and those that it starts; print images a second."""
    warnings.filterwarnings("ignore")
    torch.set_num_threads(2 if way == "threads" else 1)
    processes = 2 if way in ("ddp", "fsdp") else 1
    sharding = {"data_parallel_size": 2, "tensor_parallel_size": 1, "save_distributed_checkpoint": False}
    strategy = {"ddp": "ddp", "fsdp": ModelParallelStrategy(**sharding, process_group_backend="gloo")}.get(way, "auto")
    clock = Clock()
    with tempfile.TemporaryDirectory() as folder:
        trainer = L.Trainer(
            default_root_dir=folder,
            accelerator="cpu",
            devices=processes,
            strategy=strategy,
            max_steps=WARM_UP + STEPS,
            limit_val_batches=0,
            callbacks=[clock],
            logger=False,
            enable_checkpointing=False,
            enable_model_summary=False,
            enable_progress_bar=False,
        )
        trainer.fit(Classifier("resnet20", operator), Generated(batch_size=BATCH // processes))
    if trainer.is_global_zero:
        print(json.dumps(STEPS * BATCH / (clock.times[-1] - clock.times[WARM_UP - 1])))


def images_per_second(rounds: int) -> list[dict[str, Any]]:
    """Return for each way of training and each network the median over the rounds, and that of the ratios to "one"."""
    found: dict[tuple[str, str], list[float]] = {}
    for _ in range(rounds):
        for operator in NETWORKS:
            for way in TITLES:
                command = [sys.executable, "-m", "benchmarks.scaling", "--run", way, operator]
                run = subprocess.run(command, capture_output=True, text=True, check=True)
                found.setdefault((way, operator), []).append(float(run.stdout.split()[-1]))
                print(f"{TITLES[way]}, {operator}: {found[way, operator][-1]:.1f} images/s", flush=True)
    rows = []
    for (way, operator), rates in found.items():
        ratios = [mine / base for mine, base in zip(rates, found["one", operator], strict=True)]
        rows.append(
            {"way": way, "operator": operator, "rate": statistics.median(rates), "ratio": statistics.median(ratios)}
        )
    return rows


def decoded_per_second(repeats: int = 40) -> float:
    """Return how many photographs of ImageNet's size one thread reads, decodes and resizes in a second."""
    with tempfile.TemporaryDirectory() as folder:
        files = []
        for name, image in photographs().items():
            files.append(Path(folder) / f"{name}.jpg")
            image.resize(PHOTOGRAPH).save(files[-1], quality=90)
        transform = ImageTransform(3, STORED)
        start = time.perf_counter()
        for place in range(repeats):
            transform.read(files[place % len(files)])
        return repeats / (time.perf_counter() - start)


def bytes_per_image(architecture: str, operator: str | None) -> float:
    """Return the memory that a training step in float32 needs for each further image of 224×224."""
    network = timm.create_model(architecture)
    if operator:
        convert_decoupled(network, OperatorConfig.parse(operator))
    peaks = []
    for count in (2, 4):
        images = torch.randn(count, 3, 224, 224).contiguous(memory_format=torch.channels_last).requires_grad_()
        network.to(memory_format=torch.channels_last)
        peaks.append(measure.peak_bytes(measure.training_step(network, images), network, images))
    return (peaks[1] - peaks[0]) / 2


def process_table(rows: list[Mapping[str, Any]]) -> str:
    cells = {(row["way"], row["operator"]): f"{row['rate']:.0f} ({row['ratio']:.2f})" for row in rows}
    header = ("images/s (times one process)", *NETWORKS)
    return markdown_table(header, [(title, *(cells[way, name] for name in NETWORKS)) for way, title in TITLES.items()])


def imagenet_table(record: Mapping[str, Any]) -> str:
    """Return what 90 epochs of ImageNet take on eight GPUs, from published rates and our ratios."""
    measured = {
        row["network"]: {name: numbers["ratio"] for name, numbers in row["numbers"].items()}
        for row in read("models.json")["rows"]
        if row["network"] in PUBLISHED and row["training"] and not row["compiled"]
    }
    header = ("network", "convolutions", "ratio", f"images/s, {GPUS} GPUs", f"hours, {EPOCHS} epochs")
    header += ("GiB, 256 images a GPU", "decoding threads")
    rows = []
    for network, rate in PUBLISHED.items():
        for name in ("plain", "tanh_cosine", "tanh_cosine, radius by channel"):
            ratio = measured[network][name]
            together = GPUS * EFFICIENCY * rate / ratio
            # Activations are half as large in half precision.
            held = record["bytes_per_image"].get(f"{network} {name}")
            memory = f"{256 * held / 2 / 2**30:.1f}" if held else "–"
            threads = f"{together / record['decoded_per_second']:.0f}"
            hours = IMAGES * EPOCHS / together / 3600
            rows.append((network, name, f"{ratio:.2f}", f"{together:,.0f}", f"{hours:.1f}", memory, threads))
    return markdown_table(header, rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3, help="interleaved repeats (default: %(default)s)")
    parser.add_argument("--run", nargs=2, metavar=("WAY", "OPERATOR"), help="train once, and print images a second")
    arguments = parser.parse_args()
    if arguments.run:
        train(*arguments.run)
        return
    rows = images_per_second(arguments.rounds)
    torch.set_num_threads(1)
    operators = {"plain": None, "tanh_cosine": "tanh_cosine"}
    held = {f"{n} {name}": bytes_per_image(n, operator) for n in PUBLISHED for name, operator in operators.items()}
    record = {
        **measure.describe("cpu", os.cpu_count()),
        "batch": BATCH,
        "rows": rows,
        "decoded_per_second": decoded_per_second(),
        "bytes_per_image": held,
    }
    measure.write(record, OUTPUT)
    blocks = {"scaling": process_table(rows), "imagenet": imagenet_table(record)}
    write_whole(PAGE, filled(PAGE.read_text(encoding="utf-8"), blocks))
    print(f"written: {PAGE}")


if __name__ == "__main__":
    main()
