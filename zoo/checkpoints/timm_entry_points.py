"""Our networks among timm's: ``timm.create_model`` builds them and loads our checkpoints, decoupled ones too.

timm.create_model("resnet20")
timm.create_model("local-dir:outputs/photos_resnet20_tanh_cosine", pretrained=True)
timm.create_model("hf-hub:owner/name", pretrained=True)

These are the networks alone, as timm has them: they take images that are normalised already, by the mean and std of
``pretrained_cfg``.

Others read ``config.json`` as timm's, too, and ask timm for its architecture: transformers, for one. They would get a
plain network for a decoupled checkpoint, and are refused.
"""

import inspect
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import timm
from torch import nn

from operators.convert import stand_in_for
from zoo.architectures import ARCHITECTURES
from zoo.checkpoints.catalogue import HUB, find
from zoo.checkpoints.config import read_config
from zoo.checkpoints.loading import load, load_untrained
from zoo.models.spec import PLAIN, STAND_IN


def register() -> None:
    """Make our names known to timm."""
    for name, function in {**ARCHITECTURES, STAND_IN: stand_in}.items():
        timm.models.register_model(entry_point(name, function))


def stand_in(**arguments: Any) -> nn.Module:
    """Stand for the architecture of a checkpoint, which describes a network that no architecture alone does.

    Raises:
        ValueError: always.
    """
    raise ValueError(
        f"{STAND_IN!r} is built from its checkpoint alone, by zoo.load('owner/name' or 'FOLDER') or, as a network of "
        "timm, by timm.create_model('hf-hub:owner/name' or 'local-dir:FOLDER', pretrained=True); to decouple a network "
        "of timm, use operators.convert_decoupled"
    )


def entry_point(name: str, function: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
    """Return what ``timm.create_model(name)`` calls: ``function``, or what loads a checkpoint that timm has found."""

    def create(
        pretrained: bool = False,
        pretrained_cfg: Mapping[str, Any] | None = None,
        pretrained_cfg_overlay: object = None,
        pretrained_model_args: Mapping[str, Any] | None = None,
        cache_dir: object = None,
        **arguments: Any,
    ) -> nn.Module:
        source = pretrained_cfg.get("source") if isinstance(pretrained_cfg, Mapping) else None
        if source and cache_dir is not None:
            raise ValueError("cache_dir is not for checkpoints of the zoo: HF_HUB_CACHE names the Hub's cache")
        if source == "hf-hub":
            repository, _, revision = pretrained_cfg["hf_hub_id"].partition("@")
            return create_trained(f"{HUB}{repository}", revision or None, pretrained, arguments)
        if source == "local-dir":
            return create_trained(Path(pretrained_cfg["file"]), None, pretrained, arguments)
        if pretrained:
            raise ValueError(f"{name} has no weights in timm; trained ones are loaded by zoo.load")
        _refuse_transformers(name)
        return function(**arguments)

    create.__name__ = name
    create.__doc__ = function.__doc__
    create.__module__ = function.__module__
    return create


def _refuse_transformers(name: str) -> None:
    """Refuse to build a plain network for transformers, if it has a decoupled checkpoint at hand.

    Checkpoints of earlier versions give the name of the plain architecture, which is all that timm is told; so the
    caller is looked at.

    Raises:
        ValueError: transformers asks for the network of a decoupled checkpoint.
    """
    frame = inspect.currentframe()
    while frame is not None:
        if str(frame.f_globals.get("__name__")).startswith("transformers.models.timm_wrapper"):
            config = frame.f_locals.get("config")
            if getattr(config, "operator", PLAIN) != PLAIN:
                where = getattr(config, "name_or_path", None) or "FOLDER"
                raise ValueError(
                    f"transformers would build a plain {name}, but {where} is decoupled: zoo.load({where!r}) loads it"
                )
        frame = frame.f_back


def create_trained(
    where: str | Path, revision: str | None, pretrained: bool, arguments: Mapping[str, Any]
) -> nn.Module:
    """Return the network of a checkpoint, with its weights if ``pretrained``.

    Args:
        arguments: those of :func:`zoo.load` or :func:`zoo.load_untrained`; others must be as the checkpoint has them.

    Raises:
        TypeError: an argument that would build another network.
    """
    folder = find(where, revision=revision)
    # All is read from one commit, though the branch may move meanwhile.
    revision = folder.name if isinstance(where, str) else None
    config = read_config(folder)
    held = {"in_chans": config["in_chans"], **config["model_args"]}
    create, legal = (load, ("num_classes", "in_chans")) if pretrained else (load_untrained, ("num_classes",))
    for argument, value in arguments.items():
        if argument not in legal and held.get(argument) != value:
            raise TypeError(f"{config['name']} is built as its checkpoint says, so {argument}={value!r} is refused")
    settings = {argument: value for argument, value in arguments.items() if argument in legal}
    # No class means to timm that the features are wanted.
    features_alone = settings.get("num_classes") == 0
    if features_alone:
        del settings["num_classes"]
    model = create(where, revision=revision, **settings)
    network = model.network
    if features_alone:
        network.reset_classifier(0)
    # timm saves a network with these, and with the name that builds it again.
    network.pretrained_cfg = {**config.get("pretrained_cfg", {}), "architecture": model.spec.architecture}
    network.default_cfg = network.pretrained_cfg
    if model.spec.operator:
        stand_in_for(network)
    return network
