"""What a network trained on ImageNet keeps: python -m benchmarks.imagenet WEIGHTS IMAGES

WEIGHTS is a file with the weights of a network of timm, IMAGES a folder of photographs whose names begin with the
number of their class, such as 000_tench.jpg. The network is converted to every magnitude, with cosine and with
square_cosine, without its depthwise convolutions and with them. One half of the images calibrates it; on the other half
are measured: the plain network, the converted one, the calibrated one and, for the cells that --distil names, the one
that has learned from the plain network by the first half. What results/imagenet.json has already is kept.
"""

import argparse
import copy
import fnmatch
import itertools
import os
import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import measure
from operators import MAGNITUDES
from operators.observation import divergence
from zoo.checkpoints.starting_points import start_from
from zoo.data.augmentation import to_float
from zoo.data.image_files import find_images, read_files
from zoo.models.conversion import convert
from zoo.models.image_model import ImageModel
from zoo.training.recovery import calibrated, distilled

OUTPUT = measure.RESULTS / "imagenet.json"
ARCHITECTURE = "tf_efficientnet_lite0"
SHOWN_ANGULARS = ("cosine", "square_cosine")
# What becomes of depthwise convolutions, the default first.
DEPTHWISE = ("plain", "decoupled")
BATCH = 50
DISTILLED = "*_cosine plain"


def operators(angulars: Sequence[str] = SHOWN_ANGULARS) -> list[str]:
    """Return the operators that are measured: every magnitude with each of the angular functions."""
    return [f"{magnitude}_{angular}" for angular in angulars for magnitude in MAGNITUDES]


def cells() -> list[str]:
    """Return the names of the cells: an operator, and what becomes of depthwise convolutions."""
    return [f"{operator} {depthwise}" for operator, depthwise in itertools.product(operators(), DEPTHWISE)]


class Halves:
    """The images of a folder: those of even places to fit a network to, the others to measure it on."""

    def __init__(self, folder: Path, model: ImageModel) -> None:
        pixels, files = read_files(find_images(folder), model.transform)
        wrong = [file.name for file in files if not re.match(r"\d+", file.name)]
        if wrong:
            raise ValueError(f"{wrong[0]} in {folder} does not begin with the number of its class")
        labels = torch.tensor([int(re.match(r"\d+", file.name)[0]) for file in files])
        images = to_float(pixels)
        self.fitted, self.images, self.labels = images[::2], images[1::2], labels[1::2]
        self.teacher = self.logits(model)

    @torch.inference_mode()
    def logits(self, model: ImageModel) -> Tensor:
        return torch.cat([model.eval()(images) for images in self.images.split(BATCH)])

    def measured(self, model: ImageModel) -> dict[str, float]:
        """Return how a model names the images, and how far it is from the plain one."""
        logits = self.logits(model)
        places = logits.topk(5).indices == self.labels[:, None]
        agreement, distance = divergence(self.teacher, logits)
        return {
            "top1": places[:, 0].float().mean().item(),
            "top5": places.any(1).float().mean().item(),
            "agreement": agreement,
            "divergence": distance,
        }


def measure_cell(name: str, plain: ImageModel, halves: Halves, epochs: int) -> dict[str, Any]:
    """Return what is left of the plain network after each step of its conversion, and the seconds that each took."""
    operator, depthwise = name.split()
    model = copy.deepcopy(plain)
    report = convert(model, operator, depthwise=depthwise == DEPTHWISE[1])
    row: dict[str, Any] = {"converted": halves.measured(model), "layers": len(report.converted)}
    began = time.monotonic()
    found = calibrated(model, halves.fitted, "auto")
    row["calibrated"] = {**_seconds(began), **halves.measured(model)}
    row["advice"] = found.advice()
    if epochs:
        began = time.monotonic()
        outcome = distilled(model, copy.deepcopy(plain), halves.fitted, epochs)
        row["distilled"] = {**_seconds(began), **halves.measured(model), "epochs": epochs, "kept": outcome.kept}
    return row


def _seconds(began: float) -> dict[str, float]:
    return {"seconds": round(time.monotonic() - began, 1)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("weights", type=Path, help="a file (.safetensors, .pth)")
    parser.add_argument("images", type=Path, help="a folder of images")
    parser.add_argument("--architecture", default=ARCHITECTURE, help="of timm (default: %(default)s)")
    parser.add_argument("--only", default="*", metavar="GLOB", help="only cells with such a name, e.g. 'tanh_*'")
    parser.add_argument("--distil", default=DISTILLED, metavar="GLOB", help="cells to distil (default: '%(default)s')")
    parser.add_argument("--epochs", type=int, default=100, help="of distillation (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="CPU threads (default: %(default)s)")
    parsed = parser.parse_args()
    torch.set_num_threads(parsed.threads)
    plain = start_from(f"timm:{parsed.architecture}", weights=parsed.weights)
    halves = Halves(parsed.images, plain)
    settings = {"architecture": parsed.architecture, "fitted": len(halves.fitted), "images": len(halves.images)}
    record = {**settings, **measure.describe("cpu", parsed.threads), "plain": halves.measured(plain)}
    record["rows"] = measure.earlier(OUTPUT, settings).get("rows", {})
    for name in fnmatch.filter(cells(), parsed.only):
        epochs = parsed.epochs if fnmatch.fnmatch(name, parsed.distil) else 0
        done = record["rows"].get(name, {})
        if done.get("distilled", {}).get("epochs", 0) < epochs or not done:
            record["rows"][name] = measure_cell(name, plain, halves, epochs)
            print(name, record["rows"][name], flush=True)
            measure.write(record, OUTPUT)


if __name__ == "__main__":
    main()
