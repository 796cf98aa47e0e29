"""Settings that Lightning takes, and that would lose work, or train, measure or predict nothing."""

from collections import Counter
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import Namespace

from operators.lookup import unknown_name
from zoo.files import is_url

# What is logged of validation, by which the best checkpoint can be told.
MONITORED = ("val_accuracy", "val_balanced_accuracy", "val_loss")
# With adversarial training.
MONITORED_UNDER_ATTACK = ("val_fgsm_accuracy", "val_pgd_accuracy")

# The smallest value of these at which a stage does anything.
AT_LEAST_SOME = ("limit_train_batches", "val_check_interval", "check_val_every_n_epoch")
OF_STAGE = {"test": "limit_test_batches", "validate": "limit_val_batches", "predict": "limit_predict_batches"}


def put_logs_below_root(trainer: Namespace, usual: str) -> None:
    """Let loggers that would write to the ``usual`` folder, and the checkpoints with them, write to the trainer's."""
    loggers = trainer.logger if isinstance(trainer.logger, list) else [trainer.logger]
    for logger in loggers:
        given = logger.get("init_args") if isinstance(logger, Namespace) else None
        if given and given.get("save_dir") == usual:
            given.save_dir = str(trainer.default_root_dir or usual)


def choose_mode(checkpoint: Namespace) -> None:
    """Let the best checkpoint be that of the lowest loss; by default it is that of the highest accuracy."""
    if checkpoint.monitor and checkpoint.monitor.endswith("_loss"):
        checkpoint.mode = "min"


def refuse_repeated_keys(file: Path) -> None:
    """Refuse a configuration file that says something twice, of which YAML would take the last alone.

    Raises:
        ValueError: a key stands twice in one block, or the file is not in UTF-8.
    """
    try:
        # Settings may stand on the command line itself, in a file's place.
        if not file.is_file():
            return
        yaml.load(file.read_text(encoding="utf-8-sig"), Loader=_StrictLoader)
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not in UTF-8 ({error}); save it as UTF-8") from error
    except _RepeatedKey as error:
        raise ValueError(
            f"{file}: {error} stands twice in one block, of which only one would count; join them"
        ) from None
    # Whatever else is wrong with it, the parser says.
    except (yaml.YAMLError, OSError, TypeError):
        return


class _RepeatedKey(Exception):
    pass


class _StrictLoader(yaml.SafeLoader):
    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        scalars = (key for key, _ in node.value if isinstance(key, yaml.ScalarNode))
        keys = Counter(key.value for key in scalars if key.tag != "tag:yaml.org,2002:merge")
        for key, times in keys.items():
            if times > 1:
                raise _RepeatedKey(repr(key))
        return super().construct_mapping(node, deep)


def refuse_settings(subcommand: str, settings: Namespace) -> None:
    """Raise ValueError for settings that Lightning takes, and that would train or test nothing."""
    if settings.checkpoint.save_last:
        raise ValueError("leave out --checkpoint.save_last: last.ckpt is always written (--last.every_n_steps)")
    if is_url(settings.checkpoint.dirpath or ""):
        raise ValueError(
            f"--checkpoint.dirpath is a folder of this machine, or one mounted there, got {settings.checkpoint.dirpath}"
        )
    if subcommand == "fit":
        _refuse_lost_checkpoints(settings)
    _refuse_of_lightning(settings.trainer)
    trainer = settings.trainer
    if trainer.accumulate_grad_batches < 1:
        raise ValueError(f"--trainer.accumulate_grad_batches must be at least 1, got {trainer.accumulate_grad_batches}")
    if (trainer.gradient_clip_val or 0) < 0:
        raise ValueError(f"--trainer.gradient_clip_val must not be negative, got {trainer.gradient_clip_val}")
    for name in ("max_epochs", "max_steps"):
        if trainer[name] == 0:
            raise ValueError(f"--trainer.{name} must be at least 1 (-1 for no end), got 0")
    needed = AT_LEAST_SOME if subcommand == "fit" else (OF_STAGE[subcommand],)
    for name in needed:
        if trainer[name] == 0:
            raise ValueError(f"--trainer.{name} must be more than 0, got 0")
    if subcommand != "fit" and not settings.ckpt_path and not settings.model.init_from:
        raise ValueError(
            f"{subcommand} needs a trained network: --ckpt_path outputs/.../best.ckpt (what fit wrote), or "
            "--model.init_from NAME (a checkpoint of the zoo)"
        )


def _refuse_lost_checkpoints(settings: Namespace) -> None:
    """Refuse settings with which the best checkpoint would be another one, or none."""
    checkpoint, attacked = settings.checkpoint, settings.model.adversarial
    legal = MONITORED + (MONITORED_UNDER_ATTACK if attacked else ())
    if checkpoint.monitor is not None and checkpoint.monitor not in legal:
        raise ValueError(unknown_name("quantity to monitor (--checkpoint.monitor)", checkpoint.monitor, legal))
    if checkpoint.mode == "min" and checkpoint.monitor and not checkpoint.monitor.endswith("_loss"):
        raise ValueError(f"the best {checkpoint.monitor} is the highest; leave out --checkpoint.mode min")
    if checkpoint.save_top_k not in (0, 1) and "{" not in (checkpoint.filename or "{"):
        raise ValueError(
            f"--checkpoint.save_top_k {checkpoint.save_top_k} keeps several checkpoints, and --checkpoint.filename "
            f"{checkpoint.filename} is one; tell them apart: --checkpoint.filename '{{epoch}}'"
        )


def _refuse_of_lightning(trainer: Namespace) -> None:
    """Refuse options of the trainer that do not go with the zoo's loaders and checkpoints."""
    if trainer.overfit_batches:
        raise ValueError(
            f"--trainer.overfit_batches {trainer.overfit_batches} is not to be had; --trainer.limit_train_batches "
            "N --data.augment none trains on few images"
        )
    if trainer.barebones or trainer.enable_checkpointing is False:
        option = "barebones" if trainer.barebones else "enable_checkpointing"
        raise ValueError(
            f"leave out --trainer.{option}: each run keeps its last checkpoint; --trainer.fast_dev_run true tries a "
            "run and keeps nothing"
        )
