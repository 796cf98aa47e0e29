"""``config.json``: what it holds, and reading it strictly."""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from operators.convert import STAND_IN
from zoo.errors import CheckpointError
from zoo.hub.repository import CONFIG, LARGEST_TEXT
from zoo.models.spec import PLAIN

SCHEMA = 1

# The key of a Lightning checkpoint of the zoo that holds what is recorded of its run.
RUN_RECORD = "decoupled_zoo"

# Fields of config.json that may come after the weights.
RECORDED = ("corruptions", "licence", "measured_on", "metrics", "robustness", "speed")


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


def headline(config: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """Return the accuracy that a config is shown with, that of its last split; None if none was measured."""
    accuracies = [metric for metric in config["metrics"] if metric["name"] == "accuracy"]
    return accuracies[-1] if accuracies else None


def read_config(folder: Path) -> dict[str, Any]:
    """Return ``config.json``, checked for its schema and fields.

    Raises:
        CheckpointError: it is missing, not JSON, of another schema, or a field is missing or of the wrong type.
    """
    path = folder / CONFIG
    config = read_json(folder)
    if not isinstance(config, dict) or config.get("schema") != SCHEMA:
        raise CheckpointError(f"{path} {_what_else(folder, config)}")
    # Older checkpoints do not tell, since there was no other precision.
    config.setdefault("precision", "float32")
    check_config(config, path)
    return config


def check_config(config: Mapping[str, Any], path: Path) -> None:
    """Refuse the content of a ``config.json`` of which a field is missing or of the wrong type.

    Raises:
        CheckpointError: one is.
    """
    for field, kind in _FIELDS.items():
        if not isinstance(config.get(field), kind):
            raise CheckpointError(f"{path}: {field!r} is missing or malformed; fetch the checkpoint again")
    layers = config.get("layer_settings", {})
    if not isinstance(layers, dict) or not all(isinstance(settings, dict) for settings in layers.values()):
        raise CheckpointError(f"{path}: 'layer_settings' is malformed; fetch the checkpoint again")
    plain = config.get("plain_layers", [])
    if not isinstance(plain, list) or not all(isinstance(name, str) for name in plain):
        raise CheckpointError(f"{path}: 'plain_layers' is malformed; fetch the checkpoint again")
    for described in (config.get("measured_on", {}), config["training"].get("data", {})):
        if not isinstance(described, dict) or not isinstance(described.get("arguments", {}), dict):
            raise CheckpointError(f"{path}: what it was measured or trained on is malformed; fetch it again")
    columns = {field.name: field.type for field in dataclasses.fields(Metric)}
    for metric in config["metrics"]:
        if not isinstance(metric, dict) or metric.keys() != columns.keys():
            raise CheckpointError(f"{path}: a metric has other fields than {', '.join(sorted(columns))}")
        if not all(isinstance(metric[name], (int, float) if kind is float else kind) for name, kind in columns.items()):
            raise CheckpointError(f"{path}: a metric is malformed: {metric}")


def timm_config_in(folder: Path) -> dict[str, Any] | None:
    """Return ``config.json`` of a folder that holds a plain network as timm saves it; None of any other.

    Raises:
        CheckpointError: there is none, or it is not JSON.
    """
    config = read_json(folder)
    return config if isinstance(config, dict) and _is_timms(config) else None


def _is_timms(config: Mapping[str, Any]) -> bool:
    architecture = config.get("architecture")
    return not config.keys() & {"schema", "operator"} and isinstance(architecture, str) and architecture != STAND_IN


def _what_else(folder: Path, config: object) -> str:
    """Say what a config.json is that is none of this version of the zoo, and what to do with it."""
    if not isinstance(config, dict):
        return f"is no description of a network, but {type(config).__name__}; fetch the checkpoint again"
    if _is_timms(config):
        return (
            f"is of a plain network of timm, {config['architecture']}: start from it (--model.init_from {folder}) or "
            f"convert it (python -m zoo convert {folder} NAME)"
        )
    if config.get("architecture") == STAND_IN and "schema" not in config:
        return (
            "was saved by timm of a network that had been converted, and does not tell its operator: make the network "
            "again (timm.create_model, convert_decoupled), and load_state_dict the weights; zoo.save keeps all"
        )
    if "schema" in config:
        return f"has schema {config['schema']!r}, this version reads {SCHEMA}; update decoupled-zoo"
    kind = config.get("model_type")
    told = f"a network of transformers ({kind})" if kind else "another program"
    return f"is of {told}, which the zoo cannot build; it loads its own checkpoints, and networks of timm"


def is_decoupled(config: object) -> bool:
    """Return whether the content of a ``config.json`` is that of a decoupled network, which zoo or timm has saved."""
    if not isinstance(config, dict):
        return False
    return config.get("operator", PLAIN) != PLAIN if "schema" in config else config.get("architecture") == STAND_IN


def read_json(folder: Path) -> Any:
    """Return the content of a folder's ``config.json``, whoever has written it.

    Raises:
        CheckpointError: it is missing, cannot be read, or is not JSON.
    """
    path = folder / CONFIG
    try:
        with path.open(encoding="utf-8") as file:
            text = file.read(LARGEST_TEXT + 1)
        if len(text) > LARGEST_TEXT:
            raise ValueError(f"more than {LARGEST_TEXT:,} characters")
        return json.loads(text)
    except FileNotFoundError as error:
        raise CheckpointError(
            f"{path} is missing: {folder} is no checkpoint folder; python -m zoo export or zoo.save writes one"
        ) from error
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error}); check the path and its permissions") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not JSON ({error}); fetch the checkpoint again") from error
