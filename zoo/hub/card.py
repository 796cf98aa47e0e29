"""The model card of a checkpoint, generated from its ``config.json``."""

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from zoo.markdown import markdown_table
from zoo.models.names import twin_of

# The Hub's names of data sets, by those of our data modules.
HUB_DATASETS = {"MNIST": "ylecun/mnist", "CIFAR10": "uoft-cs/cifar10", "CIFAR100": "uoft-cs/cifar100"}


def model_card(config: Mapping[str, Any]) -> str:
    """Return the card in Markdown, with the metadata that the Hugging Face Hub reads."""
    name, operator = config["name"], config["operator"]
    plain = isinstance(operator, str)
    operator_name = operator if plain else f"{operator['magnitude']}_{operator['angular']}"
    architecture = config["model_args"].get("architecture", config["architecture"])
    convolutions = "ordinary convolutions" if plain else f"the decoupled operator `{operator_name}`"
    colours = {1: "grey", 3: "RGB"}.get(config["in_chans"], f"{config['in_chans']} channels")
    lines = [
        "---",
        metadata(config, architecture, operator_name).to_yaml(),
        "---",
        "",
        f"# {name}",
        "",
        f"`{architecture}` with {convolutions}, for {len(config['class_names'])} classes. It takes images of "
        f"{config['input_size']}×{config['input_size']} pixels in [0, 1], {colours}; "
        "normalisation is inside the model.",
        "",
        "```python",
        "import zoo",
        "",
        '# A Hub repository is called "owner/name"; one that zoo.list_checkpoints() has, by its name.',
        f'model = zoo.load("path/to/{name}")',
        'for name, probability in model.classify("image.png"):',
        '    print(f"{name}: {probability:.1%}")',
        "```",
        "",
        "`zoo` is that of decoupled-zoo. After `import zoo`, timm loads a Hub repository, too: "
        '`timm.create_model("hf-hub:owner/name", pretrained=True)`, whose images have to be normalised.',
        "",
    ]
    lines.append(markdown_table(("", ""), _facts(config, plain)))
    if data := config["training"].get("data"):
        title = data["arguments"].get("title") or data["name"]
        lines += ["", f"The weights were trained on {title}, whose terms they follow: {config['licence']}."]
    if not plain:
        twin = twin_of(name, operator_name)
        lines += ["", f"Compare it with its twin of ordinary convolutions, `{twin}`, where that is published."]
    return "\n".join(lines) + "\n"


def _facts(config: Mapping[str, Any], plain: bool) -> list[tuple[str, str]]:
    """Return the rows of the card's table: what it is, and its value."""
    facts = [
        (
            f"{metric['name']} on {metric['dataset']}, {metric['split']} split, {metric['images']:,} images",
            f"{metric['value']:.4f}",
        )
        for metric in config["metrics"]
    ]
    facts.append(("parameters", f"{config['parameters']:,}"))
    facts.append(("mean and std of the pixels", f"{config['mean']}, {config['std']}"))
    if alarms := config["training"].get("alarms"):
        facts.append(("catastrophic overfitting", "; ".join(alarms)))
    if robustness := config.get("robustness"):
        where = f"pixels changed by at most {robustness['eps']}, {robustness['images']} test images"
        shares = {**robustness["accuracy"], "the worst of all attacks": robustness["worst_case"]}
        facts += [(f"accuracy under {attack}, {where}", f"{share:.3f}") for attack, share in shares.items()]
        doubts = "; ".join(robustness["suspected"])
        facts.append(("masked gradients", f"suspected: {doubts}" if doubts else "not suspected"))
    if corruptions := config.get("corruptions"):
        facts += _corruption_facts(corruptions, plain)
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
        facts.append(("operator", f"`{json.dumps(config['operator'])}`"))
    if "layer_settings" in config:
        facts.append(("settings of single layers", f"{len(config['layer_settings'])} layers, listed in `config.json`"))
    if config.get("plain_layers"):
        facts.append(("ordinary convolutions", f"{len(config['plain_layers'])} layers, listed in `config.json`"))
    for key, value in config["training"].items():
        facts.append((key, str(value) if isinstance(value, str | int) else f"`{json.dumps(value)}`"))
    facts += [
        ("classes", _names(config["class_names"])),
        ("licence of the weights", config["licence"]),
        ("sha256 of `model.safetensors`", f"`{config['sha256']}`"),
    ]
    return facts


def _corruption_facts(record: Mapping[str, Any], plain: bool) -> list[tuple[str, str]]:
    images = f"{record['images']:,} test images"
    facts = [(f"mean accuracy under 15 corruptions at 5 severities, {images}", f"{record['mean']:.3f}")]
    if "corruption_error" in record and not plain:
        facts.append(("mean corruption error, the twin's being 1", f"{record['corruption_error']:.3f}"))
    by_corruption = ", ".join(f"{name} {share:.3f}" for name, share in record["by_corruption"].items())
    facts.append((f"accuracy by corruption, {images}", by_corruption))
    by_light = ", ".join(f"{way.replace(' x ', ' × ')} {share:.3f}" for way, share in record["by_light"].items())
    facts.append((f"accuracy in bad light, {images} (as they are: {record['clean']:.3f})", by_light))
    return facts


def metadata(config: Mapping[str, Any], architecture: str, operator_name: str) -> ModelCardData:
    """Return what the Hub shows and searches."""
    licence = config["licence"]
    # The Hub's identifiers are those of SPDX in small letters; anything else is "other", with a name.
    known = " " not in licence
    trained_on = HUB_DATASETS.get(config["training"].get("data", {}).get("name"))
    measured_on = config.get("measured_on") or config["training"].get("data", {})
    # The Hub's name of any images and labels in files.
    known_data = {**HUB_DATASETS, "ImageFolder": "imagefolder", "ImageTable": "imagefolder"}
    results = [
        EvalResult(
            task_type="image-classification",
            dataset_type=known_data.get(measured_on.get("name"), metric["dataset"]),
            dataset_name=metric["dataset"],
            dataset_split=metric["split"],
            metric_type=metric["name"],
            metric_value=metric["value"],
            metric_name=f"{metric['name']} on {metric['images']:,} images",
        )
        for metric in config["metrics"]
    ]
    return ModelCardData(
        license=licence.lower() if known else "other",
        license_name=None if known else re.sub("[^a-z0-9.]+", "-", licence.lower()).strip("-"),
        # No library is named, nor tagged: downloads are counted by config.json then, and by nothing for a library that
        # the Hub does not know; of one that it knows, such as timm, it shows how to load the network without the zoo.
        pipeline_tag="image-classification",
        tags=["image-classification", "decoupled-networks", architecture, operator_name],
        datasets=[trained_on] if trained_on else None,
        # The Hub wants a model's name beside results, and nowhere else.
        model_name=config["name"] if results else None,
        eval_results=results or None,
    )


def _names(names: Sequence[str]) -> str:
    # Names of ImageNet's classes are lists of synonyms themselves.
    return ("; " if any("," in name for name in names) else ", ").join(names)
