"""Lightning's command line for the networks and images of the zoo."""

import argparse
import contextlib
import inspect
import logging
import re
import sys
import warnings
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import lightning as L
import torch
from jsonargparse import DefaultHelpFormatter, Namespace
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch.callbacks import Callback, ModelCheckpoint, ProgressBar, RichProgressBar
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.utilities import rank_zero_info

from operators.lookup import look_up, unknown_name
from zoo.checkpoints.starting_points import shape_of
from zoo.data import DATA, ImageData
from zoo.data.image_files import unreadable
from zoo.files import relative
from zoo.provenance import command_of, program
from zoo.resuming.files import LAST, SafeCheckpointIO
from zoo.resuming.folder import left_by, refuse_folder_of_another_run
from zoo.resuming.last_checkpoint import LastCheckpoint, best_checkpoint
from zoo.resuming.record import record_of
from zoo.training.ckpt_path import config_files, going_on, hash_of, network_settings
from zoo.training.classifier import Classifier
from zoo.training.predictions import PredictionTable
from zoo.training.settings import choose_mode, put_logs_below_root, refuse_repeated_keys, refuse_settings

# Lightning's advertisement, and a deprecated function that it calls itself.
logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(lambda record: "litlogger" not in record.msg)
warnings.filterwarnings("ignore", message=".*LeafSpec", module="lightning")

# The packages of Lightning's loggers, each an extra of its own.
LOGGERS = {"TensorBoardLogger": "tensorboard", "WandbLogger": "wandb", "MLFlowLogger": "mlflow"}

TRAINER_DEFAULTS = {
    "max_epochs": 40,
    "accelerator": "auto",
    "devices": 1,
    "default_root_dir": "outputs",
    "log_every_n_steps": 10,
    "num_sanity_val_steps": 0,
    "enable_model_summary": False,
    "logger": {
        "class_path": "lightning.pytorch.loggers.CSVLogger",
        "init_args": {"save_dir": "outputs", "name": "runs"},
    },
}


class ZooCLI(LightningCLI):
    """``LightningCLI`` with a checkpoint of the best and the last epoch, and a table of predictions.

    ``--ckpt_path FILE`` stands for its folder and for the model, data and number of epochs it was trained with,
    whatever a configuration file beside it says of these; the options of the command line override both.

    Raises:
        FileExistsError: ``fit`` into a folder that has another run's checkpoints.
        ValueError: ``test``, ``validate`` or ``predict`` of an untrained network, ``predict`` on several devices, a
            checkpoint that cannot be read, or, once the others are predicted, images that cannot be read.
        FileNotFoundError: no such checkpoint.
    """

    def __init__(self, *arguments: Any, shared: ImageData | None = None, **settings: Any) -> None:
        self.shared = shared
        super().__init__(*arguments, **settings)

    def init_parser(self, **settings: Any) -> LightningArgumentParser:
        return super().init_parser(**{"prog": " ".join(program("train.py")), **settings})

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_lightning_class_args(ModelCheckpoint, "checkpoint")
        parser.set_defaults(
            {
                "checkpoint.monitor": "val_accuracy",
                "checkpoint.mode": "max",
                "checkpoint.filename": "best",
                # A run that goes on writes it again, and no best-v1.ckpt beside it.
                "checkpoint.enable_version_counter": False,
                "data": {"class_path": "zoo.data.Digits"},
            }
        )
        parser.add_lightning_class_args(LastCheckpoint, "last")
        parser.add_lightning_class_args(PredictionTable, "predictions")

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        arguments = sys.argv[1:] if args is None else list(args)
        # Other programs, such as train-zoo, give the arguments of a command that train.py has, too.
        called = program("python train.py") if args is None else ["python", "train.py"]
        self.command = command_of(*called, *arguments)
        for file in config_files(arguments):
            refuse_repeated_keys(file)
        subcommand = next((place for place, word in enumerate(arguments, 1) if word in self.subcommands()), 0)
        self.config = self._parsed(parser, arguments, subcommand)
        fit = self.config.get("fit")
        self.settings = hash_of(fit) if fit else None
        if left := self._left_by_the_same_command():
            rank_zero_info(f"going on with {left}, which the same command has left")
            self.config = self._parsed(parser, [*arguments, "--ckpt_path", left], subcommand)
        self.asked = self.config.clone()

    def _parsed(self, parser: LightningArgumentParser, arguments: list[str], subcommand: int) -> Namespace:
        """Parse arguments, of which the subcommand is that one, and what their checkpoint stands for."""
        settings = []
        if subcommand:
            settings, rest = going_on(arguments[subcommand:])
            arguments = [*arguments[:subcommand], *settings, *rest]
        try:
            return parser.parse_args(arguments)
        except argparse.ArgumentError as error:
            if unknown := re.search(r'key "data"[\s\S]*Expected a dot import path string: (\S+)', str(error)):
                raise ValueError(unknown_name("data set", unknown[1], DATA)) from error
            if unknown := re.search(r"class_path '[\w.]*?(\w+)':\s+Option '(\w+)' is not accepted", str(error)):
                legal = inspect.signature(look_up(DATA, unknown[1], "data set")).parameters
                message = unknown_name(f"setting (--data) of {unknown[1]}", unknown[2], legal)
                if others := [name for name, kind in DATA.items() if unknown[2] in inspect.signature(kind).parameters]:
                    message += f" Or is it a setting of {' or '.join(others)} (--data {others[-1]})?"
                raise ValueError(message) from error
            if unknown := re.search(r"unrecognized arguments: (--[^\s=]+)", str(error)):
                known = parser.parse_args([*arguments[:subcommand], *settings])[arguments[subcommand - 1]]
                raise ValueError(unknown_option(unknown[1], options(known))) from error
            # A configuration file has it.
            if subcommand and (unknown := re.search(r"does not accept option '([\w.]+)'", str(error))):
                known = parser.parse_args([arguments[subcommand - 1]])[arguments[subcommand - 1]]
                raise ValueError(unknown_option(f"--{unknown[1]}", options(known))) from error
            raise

    def _left_by_the_same_command(self) -> str | None:
        """Return the last checkpoint in the folder that fit is to write to, if this very command has written it."""
        settings = self.config.get("fit")
        if not settings or not settings.checkpoint.dirpath:
            return None
        last = left_by(self.settings, Path(settings.checkpoint.dirpath))
        return str(last) if last else None

    def after_fit(self) -> None:
        if self.trainer.global_step == self.model.resumed_step:
            rank_zero_info(
                f"nothing was trained: {self.config.fit.ckpt_path} is of a run that had ended, at step "
                f"{self.trainer.global_step}; to train on, give it more: --ckpt_path {self.config.fit.ckpt_path} "
                "--trainer.max_epochs N (or max_steps, if that ended it)"
            )
        checkpoint = best_checkpoint(self.trainer)
        if self.trainer.fast_dev_run:
            rank_zero_info("fast_dev_run keeps nothing: the run was tried, and is over")
        elif not checkpoint.best_model_path:
            why = "save_top_k is 0" if checkpoint.save_top_k == 0 else "no images were validated on"
            kept = checkpoint.dirpath and (Path(checkpoint.dirpath) / LAST).is_file()
            then = "last.ckpt has the network" if kept else "nothing was trained, and nothing is kept"
            rank_zero_info(f"{why}, so there is no best.ckpt; {then}")
        elif checkpoint.best_model_score is not None:
            rank_zero_info(
                f"best {checkpoint.monitor} {checkpoint.best_model_score:.4f}: {relative(checkpoint.best_model_path)}"
            )

    def after_predict(self) -> None:
        if broken := self.datamodule.unreadable_files:
            count = len(self.datamodule.predict_files)
            then = f"; the other {count} are in the table above. Remove or replace"
            raise ValueError(unreadable(broken, len(broken) + count, then))

    def before_instantiate_classes(self) -> None:
        # Lightning has put the checkpoint's settings above the command line's.
        self.config = self.asked
        settings = self.config[self.subcommand]
        if self.subcommand == "fit" and settings.checkpoint.dirpath:
            refuse_folder_of_another_run(
                Path(settings.checkpoint.dirpath), settings.ckpt_path, f"{settings.checkpoint.filename}.ckpt"
            )
        refuse_settings(self.subcommand, settings)
        choose_mode(settings.checkpoint)
        if not settings.trainer.enable_progress_bar:
            bars = self.trainer_defaults["callbacks"]
            self.trainer_defaults["callbacks"] = [bar for bar in bars if not isinstance(bar, ProgressBar)]
        put_logs_below_root(settings.trainer, TRAINER_DEFAULTS["default_root_dir"])
        if settings.ckpt_path and settings.model.init_from:
            self._go_on_with_what_was_started(settings)
        arguments = settings.data.init_args
        if settings.model.init_from and "input_size" in arguments:
            in_chans, input_size = shape_of(settings.model.init_from)
            for name, value in {"in_chans": in_chans, "input_size": input_size}.items():
                arguments[name] = value if arguments[name] is None else arguments[name]

    def instantiate_classes(self) -> None:
        try:
            super().instantiate_classes()
        except (argparse.ArgumentError, ValueError) as error:
            if missing := re.search(r"loggers\.(\w+)'[\s\S]*HINT: Try running `pip install", str(error)):
                package = LOGGERS.get(missing[1], "its package")
                raise ModuleNotFoundError(f"{missing[1]} is not installed: pip install {package}") from error
            raise

    def _go_on_with_what_was_started(self, settings: Namespace) -> None:
        """Leave the network to the checkpoint, of whose run the command line repeats what it started from."""
        record = record_of(settings.ckpt_path)
        if settings.model.init_from != record.started_from:
            raise ValueError(
                f"{settings.ckpt_path} is of a run that started from {record.started_from or 'a network of its own'}, "
                f"not from {settings.model.init_from}; leave out --model.init_from to go on with it, or --ckpt_path"
            )
        for name, value in network_settings(record).items():
            settings.model[name] = value

    def after_instantiate_classes(self) -> None:
        # The trainer takes no plugin of the kind that another one, of --trainer.plugins, is.
        if type(self.trainer.strategy.checkpoint_io) is TorchCheckpointIO:
            self.trainer.strategy.checkpoint_io = SafeCheckpointIO()
        self.model.command, self.model.settings = self.command, self.settings
        if self.shared:
            self.datamodule.share_images(self.shared)
        if self.subcommand == "predict" and self.trainer.world_size > 1:
            raise ValueError("predict runs on one device, for each would write a table of its own: --trainer.devices 1")


def run(
    arguments: ArgsType = None, callbacks: Sequence[Callback] | None = None, shared: ImageData | None = None
) -> ZooCLI:
    """Run the command line of ``train.py``.

    Args:
        arguments: those of this process by default.
        callbacks: beside those of checkpoints and predictions; a progress bar by default.
        shared: images that need not be read again.

    Raises:
        What :class:`ZooCLI` raises.
    """
    bar = callbacks is None
    defaults = {"callbacks": [RichProgressBar()] if bar else [*callbacks], "enable_progress_bar": bar}
    with leaving_other_processes_in_order():
        return ZooCLI(
            Classifier,
            ImageData,
            subclass_mode_data=True,
            seed_everything_default=0,
            trainer_defaults={**TRAINER_DEFAULTS, **defaults},
            auto_configure_optimizers=False,
            # An abbreviated option would be a misspelt one that nobody notices.
            parser_kwargs={"exit_on_error": False, "allow_abbrev": False, "formatter_class": PlainHelp},
            save_config_callback=SavedSettings,
            save_config_kwargs={"overwrite": True},
            args=arguments,
            shared=shared,
        )


@contextlib.contextmanager
def leaving_other_processes_in_order() -> Iterator[None]:
    """Leave the group of processes at the end, or when a signal has stopped them all.

    A process that another one waits for in vain would wait here, so one that fails leaves without a word.
    """
    before = _is_in_a_group()
    try:
        yield
    except SystemExit:
        _leave_group(before)
        raise
    _leave_group(before)


def _is_in_a_group() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def _leave_group(before: bool) -> None:
    # The threads of a group that is still there when Python ends abort the process now and then (torch 2.14, gloo).
    if _is_in_a_group() and not before:
        torch.distributed.destroy_process_group()


def options(settings: Namespace) -> list[str]:
    """Return the options of the command line that set these settings; those of the data are the data set's."""
    return [f"--{name.replace('.init_args.', '.')}" for name in settings.keys() if "logger." not in name]


def unknown_option(option: str, legal: Iterable[str]) -> str:
    """Say which option is nearest, and list those of the same group, e.g. of ``--model``."""
    group, legal = option.rpartition(".")[0], set(legal)
    nearby = {name for name in legal if name.rpartition(".")[0] == group}
    # If the group is unknown, all groups are listed.
    nearby = nearby or {name.partition(".")[0] for name in legal}
    return unknown_name("option", option, nearby, unlisted=legal - nearby)


class SavedSettings(SaveConfigCallback):
    """Write all settings into the logger's folder, if it has one; a data base, such as MLflow's, is none."""

    def setup(self, trainer: L.Trainer, module: L.LightningModule, stage: str) -> None:
        if trainer.log_dir is not None:
            super().setup(trainer, module, stage)


class PlainHelp(DefaultHelpFormatter):
    """Help without the markup of the docstrings that it is made of."""

    def format_help(self) -> str:
        return re.sub(r"(?::[a-z]+:)?`{1,2}~?([^`]+?)`{1,2}", r"\1", super().format_help())
