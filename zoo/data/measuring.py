"""Accuracies of a checkpoint, and the images on which they were measured."""

import dataclasses
import inspect
from pathlib import Path
from typing import Any

import zoo
from operators.lookup import look_up
from zoo.checkpoints.catalogue import find_local
from zoo.checkpoints.config import read_config
from zoo.checkpoints.verification import class_counts
from zoo.data.module import ImageData
from zoo.data.registry import DATA, recorded_arguments
from zoo.models.image_model import ImageModel
from zoo.models.spec import ModelSpec, composed

# Of a class by its name: how many of its images are named rightly, and how many there are.
ClassCounts = dict[str, tuple[int, int]]

# Data modules of people's own images, which take any shape and title.
OWN = ("ImageFolder", "ImageTable")

# The argument of a data module that says where its images are.
PLACES = ("root", "table")

# Arguments of data modules that hold on one machine only, or for one use.
MACHINE_ARGUMENTS = ("predict", "corruption", "download", "num_workers", "memory_limit_mb")


def measure(where: str | Path, data: ImageData) -> tuple[list[zoo.Metric], ClassCounts]:
    """Measure a checkpoint folder on validation and test images, and write that into its config and card.

    What was recorded before is replaced. It returns what :func:`accuracies` does.

    Args:
        where: the checkpoint's name or folder.
        data: images of its classes, channels and size.

    Raises:
        ValueError: no such checkpoint, a Hub repository, or images that are not the network's.
    """
    model = zoo.load(find_local(where))
    check_data(model.spec, data)
    metrics, by_class = accuracies(model, data)
    zoo.record(
        where,
        metrics=[dataclasses.asdict(metric) for metric in metrics],
        measured_on=portable_description(data.describe()),
    )
    return metrics, by_class


def accuracies(model: ImageModel, data: ImageData) -> tuple[list[zoo.Metric], ClassCounts]:
    """Return what is measured of a network on validation and test images; on the former alone, if there are no others.

    Returns:
        The accuracy and the balanced accuracy (the mean over the classes of each one's own) of each split; and of each
        class that the last one has, how many images are named rightly, and how many there are.
    """
    metrics, by_class = [], {}
    for split in ("val",) if data.split("test") is data.split("val") else ("val", "test"):
        correct, total = class_counts(model, data.evaluation_batches(split))
        counts = zip(data.class_names, correct.tolist(), total.tolist(), strict=True)
        by_class = {name: (right, number) for name, right, number in counts if number}
        shares, images = [right / number for right, number in by_class.values()], int(total.sum())
        values = {"accuracy": int(correct.sum()) / images, "balanced_accuracy": sum(shares) / len(shares)}
        metrics += [zoo.Metric(name, value, data.title, split, images) for name, value in values.items()]
    return metrics, by_class


def measured_data(where: str | Path, root: str | None) -> ImageData:
    """Return the data module of the images that a checkpoint was measured on.

    Raises:
        ValueError: it records none, or images in a folder that is neither recorded nor given.
    """
    config = read_config(zoo.find(where))
    record = config.get("measured_on") or config["training"].get("data")
    if not record or not config["metrics"]:
        raise ValueError(
            f"{where} does not record what was measured on which data, so it cannot be checked; python -m zoo measure "
            "measures and records it"
        )
    return recorded_data(record, root)


def data_for(where: str | Path, kind: str | None, root: str | None, title: str | None = None) -> ImageData:
    """Return the data module that is named, with images as a checkpoint's network takes them.

    Args:
        kind: a name of ``DATA``; by default what the checkpoint was measured on.
        root: the folder of the images, or the CSV file of an ImageTable.
        title: of images of one's own, as shown beside the numbers.

    Raises:
        ValueError: no such checkpoint or data, or a title for data that has its own.
    """
    if kind is None:
        return measured_data(where, root)
    settings = {}
    if kind in OWN:
        config = read_config(zoo.find(where))
        settings = {"input_size": config["input_size"], "in_chans": config["in_chans"], "title": title}
        record = config.get("measured_on") or config["training"].get("data") or {}
        if record.get("name") == kind:
            # Another table of the kind calls its columns the same.
            columns = ("file_column", "label_column", "split_column")
            settings |= {name: value for name, value in record["arguments"].items() if name in columns}
    elif title:
        raise ValueError(f"--title is that of images of your own ({', '.join(OWN)}); {kind} has its own")
    return recorded_data({"name": kind, "arguments": {"draft": True, **settings} if kind in OWN else settings}, root)


def recorded_data(record: dict[str, Any], root: str | None) -> ImageData:
    """Return the data module that a checkpoint records, with its images in ``root`` (or its table) if that is given.

    Raises:
        ValueError: images in a folder that is neither recorded nor given.
    """
    arguments = recorded_arguments(record)
    kind = look_up(DATA, record["name"], "data set")
    parameters = inspect.signature(kind).parameters
    for place in (parameters[name] for name in PLACES if name in parameters):
        if root is not None:
            arguments[place.name] = root
        if place.default is place.empty and place.name not in arguments:
            what, value = ("folder", "FOLDER") if place.name == "root" else ("table", "FILE")
            raise ValueError(f"no {what} is recorded for the images ({record['name']}): name it (--root {value})")
    return kind(**arguments)


def portable_description(record: dict[str, Any]) -> dict[str, Any]:
    """Return the description of a data module without what is this machine's own, such as an absolute path."""
    arguments = {
        key: value for key, value in record["arguments"].items() if key not in MACHINE_ARGUMENTS and value is not None
    }
    for place in PLACES:
        if Path(arguments.get(place, "")).is_absolute():
            del arguments[place]
    return {"name": record["name"], "arguments": arguments}


def check_data(spec: ModelSpec, data: ImageData) -> None:
    """Refuse to train or measure a network on images of other classes, channels or size than its own.

    Raises:
        ValueError: they differ.
    """
    for what in ("class_names", "in_chans", "input_size"):
        mine, theirs = getattr(spec, what), getattr(data, what)
        names = tuple(map(composed, theirs)) if what == "class_names" else theirs
        if mine != names:
            order = ", the same in another order" if what == "class_names" and set(mine) == set(names) else ""
            raise ValueError(
                f"the network has {what} {mine}, but {data.title} has {theirs}{order}; choose the data it was trained "
                "on (--data), or train again"
            )
