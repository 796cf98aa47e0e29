"""How faithful explanations are: python -m benchmarks.explanations [NAME ...] [--weights FILE --photographs FOLDER]

The grid pointing game: images of different classes that a network names right most confidently are put together to a
grid, and of each explanation of one of these classes the share is taken that lies in its cell. Deletion and insertion:
the pixels that an explanation calls most important are replaced by the mean colour, or put back first. How large β(x)
is beside the logit. With weights and photographs of ImageNet also a network of timm, plain and converted. Writes
results/explanations.json, where what it has of these checkpoints is kept, and the tables in docs/good_for.md.

Source: Böhle et al., Convolutional Dynamic Alignment Networks for Interpretable Classifications, CVPR 2021 (the grid
pointing game); Petsiuk et al., RISE, BMVC 2018 (deletion and insertion).
"""

import argparse
import os
import random
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy
import torch
import torch.nn.functional as F
from torch import Tensor

import zoo
from benchmarks import measure
from benchmarks.explained_networks import GRIDS, Explained, of_checkpoint, of_photographs
from benchmarks.explainers import EXPLAINERS
from benchmarks.imagenet import ARCHITECTURE
from benchmarks.report import DOCS
from zoo.files import write_whole
from zoo.markdown import filled, markdown_table
from zoo.models.image_model import ImageModel
from zoo.statistics import evenly_spaced

OUTPUT = measure.RESULTS / "explanations.json"
NAMES = ("cifar10_resnet20_conv", "cifar10_resnet20_tanh_cosine", "cifar10_resnet20_sphere_cosine")
BATCH = 25
# Maps are smoothed by a window of so many parts of an image's side.
SMOOTHING = 6
CURVE_STEPS = 16
COST_ROUNDS = 15
BOOTSTRAPS = 2000
BIAS = ("mean logit", "mean bias", "median of |bias| / |logit|")
PAGE = DOCS / "good_for.md"


def confident(model: ImageModel, images: Tensor, labels: Tensor) -> dict[int, list[int]]:
    """Return for each class the places of the images that are named right, the most confident first."""
    with torch.inference_mode():
        probabilities = torch.cat([model(batch) for batch in images.split(BATCH * 10)]).softmax(1)
    right = probabilities.argmax(1) == labels
    found = {}
    for label in range(len(model.class_names)):
        places = (right & (labels == label)).nonzero()[:, 0]
        found[label] = places[probabilities[places, label].argsort(descending=True)].tolist()
    return found


def make_grids(images: Tensor, places: dict[int, list[int]], side: int, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return grids (M, C, side · H, side · W), the class that is asked for in each, and its cell.

    Each image is in one grid, and each grid has ``side²`` classes. Of a class, the most confident images are taken
    first; where they are used up, there are fewer grids.
    """
    draw, left = random.Random(0), {label: list(found) for label, found in places.items()}
    grids, targets, cells = [], [], []
    for _ in range(count):
        # Those with most images left, so that all classes are used alike.
        order = sorted(left, key=lambda label: (-len(left[label]), draw.random()))
        chosen = order[: side**2]
        if not all(left[label] for label in chosen):
            break
        draw.shuffle(chosen)
        parts = images[[left[label].pop(0) for label in chosen]]
        rows = [torch.cat(list(parts[row * side : (row + 1) * side]), dim=2) for row in range(side)]
        cell = draw.randrange(side**2)
        grids.append(torch.cat(rows, dim=1))
        targets.append(chosen[cell])
        cells.append(cell)
    return torch.stack(grids), torch.tensor(targets), torch.tensor(cells)


def smoothed(maps: Tensor, size: int) -> Tensor:
    """Return maps (N, H, W), each pixel the mean of a window, odd and about ``size / SMOOTHING`` wide."""
    width = size // SMOOTHING // 2 * 2 + 1
    return F.avg_pool2d(maps.unsqueeze(1), width, 1, width // 2, count_include_pad=False)[:, 0]


def pointing(maps: Tensor, cells: Tensor, side: int, size: int) -> Tensor:
    """Return for each grid the share of the positive part of its smoothed map that lies in the cell asked for."""
    positive = smoothed(maps, size).clamp_min(0)
    shares = positive.unflatten(2, (side, -1)).unflatten(1, (side, -1)).sum((2, 4)).flatten(1)
    return shares.gather(1, cells[:, None])[:, 0] / shares.sum(1).clamp_min(1e-12)


def in_batches(explain: Callable[..., Tensor], model: ImageModel, images: Tensor, target: Tensor) -> Tensor:
    parts = zip(images.split(BATCH), target.split(BATCH), strict=True)
    return torch.cat([explain(model, *part).detach() for part in parts])


def curves(model: ImageModel, images: Tensor, target: Tensor, maps: Tensor) -> dict[str, Tensor]:
    """Return for each image the mean probability of its class as pixels are deleted, and as they are put back."""
    order = smoothed(maps, images.shape[-1]).flatten(1).argsort(1, descending=True).argsort(1).view(maps.shape)
    blank = model.mean.expand_as(images)
    found: dict[str, list[Tensor]] = {"deletion": [], "insertion": []}
    with torch.inference_mode():
        for step in range(CURVE_STEPS + 1):
            taken = (order < step * order[0].numel() / CURVE_STEPS).unsqueeze(1)
            for kind, changed in (
                ("deletion", torch.where(taken, blank, images)),
                ("insertion", torch.where(taken, images, blank)),
            ):
                probability = model(changed).softmax(1).gather(1, target[:, None])[:, 0]
                found[kind].append(probability)
    return {kind: torch.stack(values).mean(0) for kind, values in found.items()}


def summary(values: Tensor) -> dict[str, float | int]:
    """Return the mean of values of single images, its bootstrap interval of 95 %, and how many they are."""
    values = values.double().numpy()
    drawn = numpy.random.default_rng(0).integers(0, len(values), (BOOTSTRAPS, len(values)))
    low, high = numpy.quantile(values[drawn].mean(1), (0.025, 0.975))
    return {"mean": round(float(values.mean()), 4), "low": round(low, 4), "high": round(high, 4), "n": len(values)}


def measured(explained: Explained) -> dict[str, Any]:
    """Return what is measured of a network."""
    model, images, labels = explained.load()
    places = confident(model, images, labels)
    record: dict[str, Any] = {"checkpoint": explained.name, "sha256": explained.sha256, "data": explained.title}
    size = images.shape[-1]
    for side, count in explained.grids.items():
        together, target, cells = make_grids(images, places, side, count)
        game = record[f"pointing {side}×{side}"] = {}
        for name, explainer in EXPLAINERS.items():
            game[name] = summary(pointing(in_batches(explainer, model, together, target), cells, side, size))
            print(f"{explained.name}, {side}×{side}, {name}: {game[name]['mean']:.3f}", flush=True)
    # The same evenly spaced images for all networks.
    some = images[evenly_spaced(explained.curve_images, len(images))]
    with torch.no_grad():
        target = model(some).argmax(1)
    for name, explainer in EXPLAINERS.items():
        found = curves(model, some, target, in_batches(explainer, model, some, target))
        record[name] = {kind: summary(values) for kind, values in found.items()}
    parts = [zoo.explain(model, batch) for batch in some.split(BATCH)]
    logit, bias = (torch.cat([getattr(part, what) for part in parts]) for what in ("logit", "bias"))
    numbers = logit.mean(), bias.mean(), (bias.abs() / logit.abs()).median()
    record["bias"] = {what: round(value.item(), 3) for what, value in zip(BIAS, numbers, strict=True)}
    record["bias"]["n"] = len(some)
    record["cost"] = cost(model, some[:BATCH])
    return record


def cost(model: ImageModel, images: Tensor) -> dict[str, Any]:
    """Return how many forward passes an explanation of a batch takes, and how well it adds up."""
    explanation = zoo.explain(model, images)
    total = explanation.contributions.double().sum((1, 2, 3)) + explanation.bias
    error = ((total - explanation.logit).abs() / explanation.logits.abs().amax(1)).max().item()
    images = images.contiguous()
    steps = {measure.PLAIN: measure.inference_step(model, images), "explain": lambda: zoo.explain(model, images)}
    found = measure.compare(steps, COST_ROUNDS)["explain"]
    return {"forward passes": round(found["ratio"], 2), "largest error": error, "batch": len(images)}


def tables(rows: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Return the generated parts of the page by name."""
    header = ("network", *EXPLAINERS)
    games = {
        f"pointing_{side}": [
            [row["checkpoint"], *(_told(row[game][name]) for name in EXPLAINERS)] for row in rows if game in row
        ]
        for side, game in ((side, f"pointing {side}×{side}") for side in GRIDS)
    }
    games |= {
        kind: [[row["checkpoint"], *(_told(row[name][kind]) for name in EXPLAINERS)] for row in rows]
        for kind in ("deletion", "insertion")
    }
    found = {f"explanations_{name}": markdown_table(header, told) for name, told in games.items()}
    biases = []
    for row in rows:
        numbers, effort = row["bias"], row["cost"]
        told = [f"{numbers[what]:.1f}" for what in BIAS]
        biases.append([row["checkpoint"], *told, f"{effort['largest error']:.0e}", f"{effort['forward passes']:.1f}"])
    header = ("network", *BIAS, "largest error of the sum", "cost, forward passes")
    return found | {"explanations_bias": markdown_table(header, biases)}


def _told(found: Mapping[str, float]) -> str:
    return f"{found['mean']:.2f} ({found['low']:.2f}–{found['high']:.2f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "names", nargs="*", default=NAMES, metavar="NAME", help="checkpoints (default: those of CIFAR-10)"
    )
    parser.add_argument("--root", help="the folder of the images (default: as recorded)")
    parser.add_argument("--weights", type=Path, help=f"a file with the weights of {ARCHITECTURE}, trained on ImageNet")
    parser.add_argument("--photographs", type=Path, help="a folder as python -m benchmarks.imagenet takes it")
    parser.add_argument("--output", type=Path, default=OUTPUT, help="the file of results (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="CPU threads (default: %(default)s)")
    parsed = parser.parse_args()
    if (parsed.weights is None) != (parsed.photographs is None):
        parser.error("--weights and --photographs go together: the network, and what it is measured on")
    torch.set_num_threads(parsed.threads)
    networks = [of_checkpoint(name, parsed.root) for name in parsed.names]
    if parsed.weights is not None:
        networks += of_photographs(parsed.weights, parsed.photographs)
    rows = measure.earlier(parsed.output, {}).get("rows", [])
    for explained in networks:
        if not any((row["checkpoint"], row["sha256"]) == (explained.name, explained.sha256) for row in rows):
            rows = [row for row in rows if row["checkpoint"] != explained.name]
            rows.append(measured(explained))
            measure.write({**measure.describe("cpu", parsed.threads), "rows": rows}, parsed.output)
    if parsed.output == OUTPUT:
        page = PAGE.read_text(encoding="utf-8")
        write_whole(PAGE, filled(page, tables(rows), others=r"\w+"))


if __name__ == "__main__":
    main()
