"""How fast networks and their layers change with the image: python -m benchmarks.smoothness [NAME ...]

Largest spectral norm of the Jacobian and largest quotient of differences, over test images, of embedded checkpoints.
Writes results/smoothness.json and the table in docs/robustness.md.
"""

import argparse
import dataclasses
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import torch

import zoo
from benchmarks import measure
from benchmarks.report import DOCS, read
from zoo.data.measuring import measured_data
from zoo.files import write_whole
from zoo.markdown import filled, markdown_table
from zoo.models.names import is_plain
from zoo.provenance import origin
from zoo.robustness.smoothness import by_layer

OUTPUT = measure.RESULTS / "smoothness.json"
PAGE = DOCS / "robustness.md"
IMAGES = 64
# Of which each convolution is shown.
FAMILIES = ("cifar10_resnet20", "mnist_cnn6")


def measured(name: str) -> dict[str, Any]:
    """Return the smoothness of a checkpoint's network and of each of its convolutions."""
    images, _ = measured_data(name, None).evenly_spaced("test", IMAGES)
    layers = {layer: dataclasses.asdict(found) for layer, found in by_layer(zoo.load(name), images).items()}
    return {"images": IMAGES, "layers": layers, **origin(torch.device("cpu"))}


def table(record: Mapping[str, Any]) -> str:
    """Return for each checkpoint the constants of the network, and the medians over its convolutions."""
    header = ("largest change of the output over that of the input", "network", "network, relative to the logits")
    header += ("pairs of images", "layers, median", "layers, median relative to the output")
    rows = []
    for name, found in record.items():
        layers = [values for layer, values in found["layers"].items() if layer != "network"]
        whole = found["layers"]["network"]
        medians = (statistics.median(values[kind] for values in layers) for kind in ("gradient", "relative"))
        rows.append(
            (name, *(f"{value:.2f}" for value in (whole["gradient"], whole["relative"], whole["pairs"], *medians)))
        )
    return markdown_table(header, rows)


def layer_table(record: Mapping[str, Any], names: Sequence[str]) -> str:
    """Return the largest spectral norm of each convolution, one column a checkpoint, in brackets the relative one."""
    layers = [layer for layer in record[names[0]]["layers"] if layer != "network"]
    rows = []
    for layer in layers:
        found = (record[name]["layers"][layer] for name in names)
        rows.append((layer, *(f"{values['gradient']:.2f} ({values['relative']:.2f})" for values in found)))
    return markdown_table(("layer", *names), rows)


def blocks() -> dict[str, str]:
    """Return the generated parts of the page."""
    record = read(OUTPUT.name)
    found = {"smoothness": table(record)}
    for family in FAMILIES:
        names = [name for name in record if name.startswith(f"{family}_")]
        # The plain twin stands first.
        names.sort(key=is_plain, reverse=True)
        found[f"smoothness_{family}"] = layer_table(record, names)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", default=zoo.list_checkpoints(), metavar="NAME", help="all by default")
    record = {}
    for name in parser.parse_args().names:
        record[name] = measured(name)
        print(f"{name}: {record[name]['layers']['network']['gradient']:.2f}", flush=True)
    measure.write(record, OUTPUT)
    write_whole(PAGE, filled(PAGE.read_text(encoding="utf-8"), blocks(), others=r"\w+"))
    print(f"written: {PAGE}")


if __name__ == "__main__":
    main()
