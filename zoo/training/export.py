"""From the Lightning checkpoint of a training to a checkpoint folder: measured, then saved."""

import dataclasses
import inspect
from pathlib import Path
from typing import Any

import zoo
from operators.lookup import look_up
from zoo.checkpoints.loading import find_local, read_config
from zoo.data import DATA, ImageData
from zoo.models.building import ImageModel, ModelSpec
from zoo.runs.record import read_lightning_checkpoint, read_record
from zoo.training.classifier import check_data

# Weights of more bytes are embedded in float16, for all checkpoints together have 40 MiB.
LARGEST_IN_FLOAT32 = 2**20

# Arguments of data modules that hold on one machine only, or for one use.
MACHINE_ARGUMENTS = ("predict", "download", "num_workers", "memory_limit_mb")


def export(
    checkpoint: Path,
    folder: Path,
    *,
    data: ImageData | None = None,
    root: str | None = None,
    precision: str | None = "float32",
    licence: str | None = None,
    overwrite: bool = False,
) -> list[zoo.Metric]:
    """Measure the network of a Lightning checkpoint on validation and test images, and save it as ``folder``.

    Args:
        folder: its last part is called ``<data>_<architecture>_<operator>``.
        data: the images it was trained on, if they are at hand; otherwise they are read as the checkpoint records.
        root: the folder of the images, if it has moved since the training.
        precision: "float32", or "float16": weights are then rounded before they are measured. None is what an
            embedded checkpoint has, float32 only if it is small.
        licence: of the weights; that of the images by default.
        overwrite: replace a folder that exists.

    Raises:
        ValueError: a name that does not say what the network is, or a checkpoint that cannot be read.
        FileExistsError: the folder exists and ``overwrite`` is false.
        FileNotFoundError: no such checkpoint, or no images.
    """
    model, record = trained_model(checkpoint)
    check_name(folder.name, model.spec.architecture, model.spec.operator_name)
    check_absent(folder, overwrite)
    if precision is None:
        size = sum(tensor.nbytes for tensor in model.state_dict().values())
        precision = "float32" if size <= LARGEST_IN_FLOAT32 else "float16"
    if precision == "float16":
        zoo.round_weights(model)
    data = data or recorded_data(record["data"], root)
    metrics = accuracies(model, data)
    training = {**record["training"], "data": _portable(record["data"])}
    licence = licence or data.licence
    if source := record.get("source"):
        training["started_from"] = source["name"]
        if source["licence"] != licence:
            licence = f"{licence} (images), {source['licence']} ({source['name']})"
    settings = {"licence": licence, "precision": precision, "overwrite": overwrite}
    zoo.save(model, folder, metrics=metrics, training=training, **settings)
    return metrics


def measure(where: str | Path, data: ImageData) -> list[zoo.Metric]:
    """Measure a checkpoint folder on validation and test images, and write that into its config and card.

    What was recorded before is replaced.

    Args:
        where: the checkpoint's name or folder.
        data: images of its classes, channels and size.

    Raises:
        ValueError: no such checkpoint, a Hub repository, or images that are not the network's.
    """
    model = zoo.load(find_local(where))
    check_data(model.spec, data)
    metrics = accuracies(model, data)
    zoo.record(
        where, metrics=[dataclasses.asdict(metric) for metric in metrics], measured_on=_portable(data.describe())
    )
    return metrics


def accuracies(model: ImageModel, data: ImageData) -> list[zoo.Metric]:
    """Return the accuracy on validation and test images; on the former alone, if there are no others."""
    metrics = []
    for split in ("val",) if data.split("test") is data.split("val") else ("val", "test"):
        value, images = zoo.accuracy(model, data.evaluation_batches(split))
        metrics.append(zoo.Metric("accuracy", value, data.title, split, images))
    return metrics


def check_name(name: str, architecture: str, operator: str) -> None:
    """Refuse a checkpoint's name that does not say what the network is.

    Raises:
        ValueError: it is not called ``<data>_<architecture>_<operator>``.
    """
    expected = f"_{architecture}_{operator}"
    if not name.endswith(expected) or name == expected:
        raise ValueError(f"a checkpoint of this network is called <data>{expected}, got {name!r}")


def check_absent(folder: Path, overwrite: bool) -> None:
    """Refuse a folder that is there already.

    Raises:
        FileExistsError: the folder exists and ``overwrite`` is false.
    """
    if folder.exists() and not overwrite:
        raise FileExistsError(f"{folder} exists; choose another name or parent (--to), or replace it (--overwrite)")


def trained_model(checkpoint: Path) -> tuple[ImageModel, dict[str, Any]]:
    """Return the network of a Lightning checkpoint, in evaluation mode, and what is recorded of its training.

    Raises:
        FileNotFoundError, ValueError: no such checkpoint, or one that cannot be read.
    """
    saved = read_lightning_checkpoint(checkpoint)
    record = read_record(saved)
    model = ModelSpec.from_dict(record["spec"]).build()
    prefix = "model."
    model.load_state_dict(
        {key.removeprefix(prefix): value for key, value in saved["state_dict"].items() if key.startswith(prefix)}
    )
    return model.eval(), record


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


def recorded_data(record: dict[str, Any], root: str | None) -> ImageData:
    """Return the data module that a checkpoint records, with its images in ``root`` if that is given.

    Raises:
        ValueError: images in a folder that is neither recorded nor given.
    """
    arguments = dict(record["arguments"])
    kind = look_up(DATA, record["name"], "data set")
    parameter = inspect.signature(kind).parameters.get("root")
    if root is not None and parameter:
        arguments["root"] = root
    if parameter and parameter.default is parameter.empty and "root" not in arguments:
        raise ValueError(f"no folder is recorded for the images ({record['name']}): name it (--root FOLDER)")
    return kind(**arguments)


def _portable(record: dict[str, Any]) -> dict[str, Any]:
    """Return the description of a data module without what is this machine's own, as a folder named from the root."""
    arguments = {
        key: value for key, value in record["arguments"].items() if key not in MACHINE_ARGUMENTS and value is not None
    }
    if Path(arguments.get("root", "")).is_absolute():
        del arguments["root"]
    return {"name": record["name"], "arguments": arguments}
