"""What a training step spends outside forward, backward and optimiser: python -m benchmarks.pipeline

A network trains on generated images of CIFAR's size with the trainer, loader, augmentation and logging of every recipe.
Its share is the time between the optimiser's steps over all the time. Lightning runs forward and backward inside that
step, with the check that the gradient is finite and the handing over of what is logged; these count as inside. The
device is waited for at each border, so that nothing is hidden behind its work.
"""

import argparse
import logging
import os
import statistics
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import lightning as L
import torch

from benchmarks import measure
from zoo.data import CIFAR10
from zoo.data.image_sets import MemoryImages
from zoo.training.classifier import Classifier
from zoo.training.device import Device

NETWORKS = ("conv", "tanh_cosine")
# The first steps compile, or find out which kernels are fastest.
WARM_UP = 10


class Generated(CIFAR10):
    """Random images of CIFAR's size: training needs no file."""

    images = 20_000

    def load_split(self, split: str) -> MemoryImages:
        shape = (self.images, self.in_chans, self.input_size, self.input_size)
        return MemoryImages(torch.randint(256, shape, dtype=torch.uint8), torch.randint(10, (self.images,)))


class Timed(Classifier):
    """A classifier that keeps, for each step, the seconds inside and those since the step before."""

    def on_train_start(self) -> None:
        self.inside: list[float] = []
        self.outside: list[float] = []
        self.left: float | None = None

    def optimizer_step(self, *arguments: Any, **settings: Any) -> None:
        entered = self._now()
        if self.left is not None:
            self.outside.append(entered - self.left)
        super().optimizer_step(*arguments, **settings)
        self.left = self._now()
        self.inside.append(self.left - entered)

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()


def shares(operator: str, device: Device, batch: int, steps: int) -> dict[str, float]:
    """Return the milliseconds of a step inside and outside, and the share of the latter."""
    data = Generated(batch_size=batch, augment="crop_flip_cutout")
    model = Timed("resnet20", operator, optimizer="sgd", learning_rate=0.01, compile=device.compile)
    with tempfile.TemporaryDirectory() as folder:
        trainer = L.Trainer(
            default_root_dir=folder,
            accelerator=device.accelerator,
            devices=1,
            precision=device.precision,
            max_steps=WARM_UP + steps,
            limit_val_batches=0,
            logger=L.pytorch.loggers.CSVLogger(folder),
            log_every_n_steps=10,
            enable_checkpointing=False,
            enable_model_summary=False,
            enable_progress_bar=False,
        )
        trainer.fit(model, datamodule=data)
    inside, outside = (1e3 * statistics.mean(times[WARM_UP:]) for times in (model.inside, model.outside))
    return {"inside_ms": inside, "outside_ms": outside, "share": outside / (inside + outside)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=128, help="images a batch (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=50, help="steps to measure (default: %(default)s)")
    parser.add_argument("--output", type=Path, default=measure.RESULTS / "pipeline.json", help="where the numbers go")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="CPU threads (default: %(default)s)")
    parsed = parser.parse_args()
    torch.set_num_threads(parsed.threads)
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", module="lightning")
    device = Device.choose(parsed.device)
    rows = []
    for operator in NETWORKS:
        numbers = shares(operator, device, parsed.batch, parsed.steps)
        rows.append({"operator": operator, "batch": parsed.batch, **numbers})
        print(
            f"resnet20, {operator}: {numbers['inside_ms']:.1f} ms in forward, backward and optimiser, "
            f"{numbers['outside_ms']:.2f} ms outside, {numbers['share']:.1%}"
        )
    record = {**measure.describe(device.name, parsed.threads), "steps": parsed.steps}
    measure.write({**record, "precision": device.precision, "compiled": device.compile, "rows": rows}, parsed.output)


if __name__ == "__main__":
    main()
