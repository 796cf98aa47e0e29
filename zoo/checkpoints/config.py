"""``config.json``: what it holds, and reading it strictly."""

import dataclasses
import json
from pathlib import Path
from typing import Any

from zoo.errors import CheckpointError
from zoo.hub.repository import CONFIG, LARGEST_TEXT

SCHEMA = 1

# Fields of config.json that may come after the weights.
RECORDED = ("licence", "measured_on", "metrics", "robustness", "speed")


@dataclasses.dataclass(frozen=True)
class Metric:
    """One measured number, e.g. accuracy 0.9917 on the 360 images of Digits' test split."""

    name: str
    value: float
    dataset: str
    split: str
    images: int


_FIELDS: dict[str, type | tuple[type, ...]] = {
    "name": str,
    "architecture": str,
    "model_args": dict,
    "operator": (dict, str),
    "class_names": list,
    "in_chans": int,
    "input_size": int,
    "mean": list,
    "std": list,
    "metrics": list,
    "training": dict,
    "licence": str,
    "parameters": int,
    "precision": str,
    "sha256": str,
    "fingerprint": list,
}


def read_config(folder: Path) -> dict[str, Any]:
    """Return ``config.json``, checked for its schema and fields.

    Raises:
        CheckpointError: it is missing, not JSON, of another schema, or a field is missing or of the wrong type.
    """
    path = folder / CONFIG
    try:
        with path.open(encoding="utf-8") as file:
            text = file.read(LARGEST_TEXT + 1)
        if len(text) > LARGEST_TEXT:
            raise ValueError(f"more than {LARGEST_TEXT:,} characters")
        config = json.loads(text)
    except FileNotFoundError as error:
        raise CheckpointError(
            f"{path} is missing: {folder} is no checkpoint folder; python -m zoo export or zoo.save writes one"
        ) from error
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error}); check the path and its permissions") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not JSON ({error}); fetch the checkpoint again") from error
    if not isinstance(config, dict) or config.get("schema") != SCHEMA:
        found = config.get("schema") if isinstance(config, dict) else None
        raise CheckpointError(f"{path} has schema {found!r}, this version reads {SCHEMA}; update decoupled-zoo")
    # Older checkpoints do not tell, since there was no other precision.
    config.setdefault("precision", "float32")
    for field, kind in _FIELDS.items():
        if not isinstance(config.get(field), kind):
            raise CheckpointError(f"{path}: {field!r} is missing or malformed; fetch the checkpoint again")
    layers = config.get("layer_settings", {})
    if not isinstance(layers, dict) or not all(isinstance(settings, dict) for settings in layers.values()):
        raise CheckpointError(f"{path}: 'layer_settings' is malformed; fetch the checkpoint again")
    for described in (config.get("measured_on", {}), config["training"].get("data", {})):
        if not isinstance(described, dict) or not isinstance(described.get("arguments", {}), dict):
            raise CheckpointError(f"{path}: what it was measured or trained on is malformed; fetch it again")
    columns = {field.name: field.type for field in dataclasses.fields(Metric)}
    for metric in config["metrics"]:
        if not isinstance(metric, dict) or metric.keys() != columns.keys():
            raise CheckpointError(f"{path}: a metric has other fields than {', '.join(sorted(columns))}")
        if not all(isinstance(metric[name], (int, float) if kind is float else kind) for name, kind in columns.items()):
            raise CheckpointError(f"{path}: a metric is malformed: {metric}")
    return config
