"""Why bad light harms some networks less: python -m benchmarks.bad_light [NAME ...]

For each convolution: how the norms of its patches, their angles to the filters and its answers change as the contrast
of test images is multiplied by 0.25. Writes results/bad_light.json and docs/bad_light_layers.png.
"""

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib
import torch
from matplotlib.figure import Figure
from torch import Tensor

import zoo
from benchmarks import measure
from benchmarks.report import DOCS
from operators import OperatorConfig
from operators.functional import norms_and_products
from operators.observation import convolution_inputs
from zoo.corruptions.kinds import scaled_contrast
from zoo.data.measuring import data_for
from zoo.figures import STYLE, write_figure
from zoo.models.image_model import ImageModel
from zoo.robustness.pictures import colour_of

OUTPUT = measure.RESULTS / "bad_light.json"
PICTURE = DOCS / "bad_light_layers.png"
NAMES = ("cifar10_resnet20_conv", "cifar10_resnet20_tanh_cosine", "cifar10_resnet20_sphere_cosine")
CONTRAST = 0.25
IMAGES = 200
BINS = 60
# The layer of which the angles are drawn.
DRAWN = "conv1"


def seen_by_layers(model: ImageModel, images: Tensor) -> dict[str, tuple[Tensor, Tensor, Tensor]]:
    """Return for each convolution the norms of its patches, the cosines to its filters, and its answers."""
    found = {}
    for name, (layer, inputs) in convolution_inputs(model.network, lambda: model(images)).items():
        geometry = layer.stride, layer.padding, layer.dilation, layer.groups
        settings = {"eps": OperatorConfig.eps, "padding_mode": layer.padding_mode}
        with torch.no_grad():
            n, product = norms_and_products(inputs, layer.weight, *geometry, **settings)
            found[name] = n[:, 0], product / n, layer(inputs)
    return found


def measured(name: str, images: Tensor) -> dict[str, Any]:
    """Return how each convolution of a checkpoint sees images of low contrast, beside the images as they are."""
    model = zoo.load(name)
    clear, pale = (seen_by_layers(model, some) for some in (images, scaled_contrast(images, CONTRAST)))
    layers = {}
    for layer, (n, _, answers) in clear.items():
        pale_n, _, pale_answers = pale[layer]
        change = (pale_answers - answers).flatten(1).norm(dim=1) / answers.flatten(1).norm(dim=1)
        layers[layer] = {
            "norm": round((pale_n / n).median().item(), 4),
            "answer": round(change.mean().item(), 4),
        }
    pairs = {"clear": clear[DRAWN][1], "pale": pale[DRAWN][1]}
    cosines = {kind: histogram(values) for kind, values in pairs.items()}
    return {"images": len(images), "layers": layers, "cosines": cosines}


def histogram(cosines: Tensor) -> list[float]:
    """Return the share of cosines in each of so many equal parts of -1 to 1."""
    return [round(share, 5) for share in torch.histc(cosines, BINS, -1, 1).div(cosines.numel()).tolist()]


@matplotlib.rc_context(STYLE)
def draw(record: Mapping[str, Mapping[str, Any]], path: Path) -> None:
    """Write a PNG: what becomes of norms and answers, layer by layer, and of the angles in the first layer."""
    figure = Figure(figsize=(11, 3.6), layout="constrained")
    panels = figure.subplots(1, 3)
    titles = {
        "norm": f"patch norm at contrast × {CONTRAST}, ÷ before",
        "answer": "change of the layer's answer, relative",
    }
    for axes, (kind, title) in zip(panels[:2], titles.items(), strict=True):
        for name, found in record.items():
            values = [layer[kind] for layer in found["layers"].values()]
            axes.plot(range(1, len(values) + 1), values, marker="o", markersize=3, label=name, color=colour_of(name))
        axes.set(xlabel="convolution, from the image on", ylim=(0, None))
        axes.set_title(title, fontsize=10)
    panels[0].axhline(1, color="grey", linewidth=0.6)
    centres = [-1 + (2 * place + 1) / BINS for place in range(BINS)]
    for name, found in record.items():
        for kind, style in (("clear", "-"), ("pale", ":")):
            panels[2].plot(centres, found["cosines"][kind], linestyle=style, color=colour_of(name), linewidth=1.2)
    panels[2].plot([], [], "k-", label="as it is")
    panels[2].plot([], [], "k:", label=f"contrast × {CONTRAST}")
    panels[2].set_xlabel("cos θ")
    panels[2].set_title(f"cosines of {DRAWN}, share", fontsize=10)
    panels[2].set_ylim(0, 1.25 * panels[2].get_ylim()[1])
    panels[2].legend(frameon=False, fontsize=8, loc="upper left")
    panels[0].legend(frameon=False, fontsize=8)
    write_figure(figure, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", default=NAMES, metavar="NAME", help="checkpoints of the same images")
    parser.add_argument("--root", help="the folder of the images (default: as recorded)")
    parsed = parser.parse_args()
    images, _ = data_for(parsed.names[0], None, parsed.root).evenly_spaced("test", IMAGES)
    record = {name: measured(name, images) for name in parsed.names}
    measure.write(record, OUTPUT)
    draw(record, PICTURE)
    print(f"written: {PICTURE}")


if __name__ == "__main__":
    main()
