"""From the Lightning checkpoint of a training to a checkpoint folder: measured, then saved."""

from pathlib import Path

import zoo
from zoo.checkpoints.saving import check_absent, save_built
from zoo.data import ImageData
from zoo.data.measuring import accuracies, portable_description, recorded_data
from zoo.models.building import build_from
from zoo.models.image_model import ImageModel
from zoo.models.names import check_name
from zoo.resuming.record import RunRecord, read_lightning_checkpoint, record_in

# Weights of more bytes are embedded in float16, for all checkpoints together have 40 MiB.
LARGEST_IN_FLOAT32 = 2**20


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
    data = data or recorded_data(record.data, root)
    metrics, _ = accuracies(model, data)
    training = {**record.training, "data": portable_description(record.data)}
    licence = licence or data.licence
    if source := record.source:
        training["started_from"] = source["name"]
        if source["licence"] != licence:
            licence = f"{licence} (images), {source['licence']} ({source['name']})"
    settings = {"licence": licence, "precision": precision, "overwrite": overwrite}
    save_built(model, folder, metrics=metrics, training=training, **settings)
    return metrics


def trained_model(checkpoint: Path) -> tuple[ImageModel, RunRecord]:
    """Return the network of a Lightning checkpoint, in evaluation mode, and what is recorded of its training.

    Raises:
        FileNotFoundError, ValueError: no such checkpoint, or one that cannot be read.
    """
    saved = read_lightning_checkpoint(checkpoint)
    record = record_in(saved, checkpoint)
    model = build_from(record.spec)
    prefix = "model."
    model.load_state_dict(
        {key.removeprefix(prefix): value for key, value in saved["state_dict"].items() if key.startswith(prefix)}
    )
    return model.eval(), record
