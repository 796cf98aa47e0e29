"""Markdown: the model card of a checkpoint, generated from its ``config.json``, and tables."""

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any


def model_card(config: Mapping[str, Any]) -> str:
    """Return the card in Markdown, with the metadata header that the Hugging Face Hub reads."""
    name, operator = config["name"], config["operator"]
    plain = isinstance(operator, str)
    operator_name = operator if plain else f"{operator['magnitude']}_{operator['angular']}"
    convolutions = "ordinary convolutions" if plain else f"the decoupled operator `{operator_name}`"
    colours = {1: "grey", 3: "RGB"}.get(config["in_chans"], f"{config['in_chans']} channels")
    lines = [
        "---",
        f"license: {_licence_identifier(config['licence'])}",
        "pipeline_tag: image-classification",
        "library_name: decoupled-zoo",
        f"tags: [image-classification, decoupled-networks, {config['architecture']}, {operator_name}]",
        "---",
        "",
        f"# {name}",
        "",
        f"`{config['architecture']}` with {convolutions}, for {len(config['class_names'])} classes. It takes images of "
        f"{config['input_size']}×{config['input_size']} pixels in [0, 1], {colours}; "
        "normalisation is inside the model.",
        "",
        "```python",
        "from PIL import Image",
        "",
        "import zoo",
        "",
        "# The folder of this card; for a checkpoint that zoo.list_checkpoints() names, its name will do.",
        f'model = zoo.load("path/to/{name}")',
        'image = model.transform(Image.open("image.png"))',
        "probabilities = model(image[None]).softmax(1)[0]",
        "```",
        "",
    ]
    facts = [
        (
            f"{metric['name']} on {metric['dataset']}, {metric['split']} split, {metric['images']:,} images",
            f"{metric['value']:.4f}",
        )
        for metric in config["metrics"]
    ]
    facts.append(("parameters", f"{config['parameters']:,}"))
    if "speed" in config:
        speed = config["speed"]
        for mode in ("eager", "compiled"):
            rate, ratio = speed[f"{mode}_images_per_second"], speed[f"{mode}_ratio"]
            beside = "" if plain else f", {ratio:.2f} times the twin's"
            what = (
                f"images a second, {mode}, batches of {speed['batch']} on {speed['hardware']}, torch {speed['torch']}"
            )
            facts.append((what, f"{rate:,.0f}{beside}"))
    if not plain:
        facts.append(("operator", f"`{json.dumps(operator)}`"))
    if "layer_settings" in config:
        facts.append(("settings of single layers", f"{len(config['layer_settings'])} layers, listed in `config.json`"))
    for key, value in config["training"].items():
        facts.append((key, str(value) if isinstance(value, str | int) else f"`{json.dumps(value)}`"))
    facts += [
        ("classes", _names(config["class_names"])),
        ("licence of the weights", config["licence"]),
        ("sha256 of `model.safetensors`", f"`{config['sha256']}`"),
    ]
    lines.append(markdown_table(("", ""), facts))
    if not plain:
        twin = name.removesuffix(operator_name) + "conv"
        lines += ["", f"Compare it with its twin of ordinary convolutions, `{twin}`, where that is published."]
    return "\n".join(lines) + "\n"


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table in Markdown."""
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (header, ["---"] * len(header), *rows))


def _names(names: Sequence[str]) -> str:
    # Names of ImageNet's classes are lists of synonyms themselves.
    return ("; " if any("," in name for name in names) else ", ").join(names)


def _licence_identifier(licence: str) -> str:
    """Return the Hub's identifier of an SPDX name without spaces; anything else is ``other``."""
    return licence.lower() if " " not in licence else "other"
