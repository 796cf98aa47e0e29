"""What ``train.py`` and ``python -m zoo`` share: the Lightning command line and errors without stack traces."""

import argparse
import contextlib
import hashlib
import inspect
import json
import logging
import os
import re
import shlex
import signal
import sys
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from jsonargparse import DefaultHelpFormatter, Namespace
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch.callbacks import Callback, ModelCheckpoint, RichProgressBar
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from operators.lookup import look_up, unknown_name
from zoo.checkpoints.starting_points import shape_of
from zoo.data import DATA, ImageData
from zoo.data.image_files import unreadable
from zoo.runs.last_checkpoint import LAST, PREVIOUS, SIGNALS, STOPPED, LastCheckpoint, SafeCheckpointIO, best_checkpoint
from zoo.runs.record import record_of, usable_checkpoint
from zoo.training.callbacks import PredictionTable
from zoo.training.classifier import Classifier

# Lightning's advertisement, and a deprecated function that it calls itself.
logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(lambda record: "litlogger" not in record.msg)
warnings.filterwarnings("ignore", message=".*LeafSpec", module="lightning")

CURABLE = (
    argparse.ArgumentError,
    ValueError,
    TypeError,
    OSError,
    FloatingPointError,
    ModuleNotFoundError,
    MisconfigurationException,
)

INTERRUPTED = STOPPED + signal.SIGINT

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
        self.command = command_of("python", "train.py", *arguments)
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
            raise

    def _left_by_the_same_command(self) -> str | None:
        """Return the last checkpoint in the folder that fit is to write to, if this very command has written it."""
        settings = self.config.get("fit")
        if not settings or not settings.checkpoint.dirpath:
            return None
        folder = Path(settings.checkpoint.dirpath)
        if not any((folder / name).is_file() for name in (LAST, PREVIOUS)):
            return None
        last = usable_checkpoint(folder / LAST)
        return str(folder / LAST) if record_of(last).get("settings") == self.settings else None

    def after_fit(self) -> None:
        if self.trainer.global_step == self.model.resumed_step:
            rank_zero_info(
                f"nothing was trained: {self.config.fit.ckpt_path} is of a run that had ended, at step "
                f"{self.trainer.global_step}; to train on, give it more: --ckpt_path {self.config.fit.ckpt_path} "
                "--trainer.max_epochs N (or max_steps, if that ended it)"
            )
        checkpoint = best_checkpoint(self.trainer)
        if not checkpoint.best_model_path:
            rank_zero_info("no images were validated on, so there is no best.ckpt; last.ckpt has the network")
        elif checkpoint.best_model_score is not None:
            rank_zero_info(
                f"best {checkpoint.monitor} {checkpoint.best_model_score:.4f}: "
                f"{os.path.relpath(checkpoint.best_model_path)}"
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
            refuse_folder_of_another_run(settings)
        refuse_settings(self.subcommand, settings)
        if settings.ckpt_path and settings.model.init_from:
            self._go_on_with_what_was_started(settings)
        arguments = settings.data.init_args
        if settings.model.init_from and "input_size" in arguments:
            in_chans, input_size = shape_of(settings.model.init_from)
            for name, value in {"in_chans": in_chans, "input_size": input_size}.items():
                arguments[name] = value if arguments[name] is None else arguments[name]

    def _go_on_with_what_was_started(self, settings: Namespace) -> None:
        """Leave the network to the checkpoint, of whose run the command line repeats what it started from."""
        record = record_of(settings.ckpt_path)
        started_from = (record.get("source") or {}).get("name")
        if settings.model.init_from != started_from:
            raise ValueError(
                f"{settings.ckpt_path} is of a run that started from {started_from or 'a network of its own'}, not "
                f"from {settings.model.init_from}; leave out --model.init_from to go on with it, or --ckpt_path"
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
    return ZooCLI(
        Classifier,
        ImageData,
        subclass_mode_data=True,
        seed_everything_default=0,
        trainer_defaults={**TRAINER_DEFAULTS, **defaults},
        auto_configure_optimizers=False,
        # An abbreviated option would be a misspelt one that nobody notices.
        parser_kwargs={"exit_on_error": False, "allow_abbrev": False, "formatter_class": PlainHelp},
        save_config_kwargs={"overwrite": True},
        args=arguments,
        shared=shared,
    )


def refuse_folder_of_another_run(settings: Namespace) -> None:
    """Raise FileExistsError if the folder that fit is to write to has checkpoints, and it does not go on with those."""
    folder = Path(settings.checkpoint.dirpath)
    if settings.ckpt_path and Path(settings.ckpt_path).resolve().parent == folder.resolve():
        return
    last = folder / LAST
    if last.exists() or (folder / PREVIOUS).exists():
        record = record_of(usable_checkpoint(last))
        raise FileExistsError(
            f"{last} is of another command: {record['training']['command']}; to go on with its run, give "
            f"--ckpt_path {last}; for a new one, choose another folder (--checkpoint.dirpath)"
        )
    best = folder / f"{settings.checkpoint.filename}.ckpt"
    if best.exists():
        raise FileExistsError(
            f"{best} is another run's, and would be overwritten; move it, or choose another folder "
            "(--checkpoint.dirpath)"
        )


def refuse_settings(subcommand: str, settings: Namespace) -> None:
    """Raise ValueError for settings that Lightning takes, and that would train or test nothing."""
    if settings.checkpoint.save_last:
        raise ValueError("leave out --checkpoint.save_last: last.ckpt is always written (--last.every_n_steps)")
    if "://" in (settings.checkpoint.dirpath or ""):
        raise ValueError(
            f"--checkpoint.dirpath is a folder of this machine, or one mounted there, got {settings.checkpoint.dirpath}"
        )
    trainer = settings.trainer
    if trainer.accumulate_grad_batches < 1:
        raise ValueError(f"--trainer.accumulate_grad_batches must be at least 1, got {trainer.accumulate_grad_batches}")
    if (trainer.gradient_clip_val or 0) < 0:
        raise ValueError(f"--trainer.gradient_clip_val must not be negative, got {trainer.gradient_clip_val}")
    for name in ("max_epochs", "max_steps"):
        if trainer[name] == 0:
            raise ValueError(f"--trainer.{name} must be at least 1 (-1 for no end), got 0")
    for name in ("limit_train_batches", "val_check_interval", "check_val_every_n_epoch"):
        if trainer[name] == 0:
            raise ValueError(f"--trainer.{name} must be more than 0, got 0")
    if subcommand != "fit" and not settings.ckpt_path and not settings.model.init_from:
        raise ValueError(
            f"{subcommand} needs a trained network: --ckpt_path outputs/.../best.ckpt (what fit wrote), or "
            "--model.init_from NAME (a checkpoint of the zoo)"
        )


def hash_of(settings: Namespace) -> str:
    """Return a hash of all settings of fit but its folder, in whatever words and files they were given."""
    given = settings.as_dict()
    given.pop("config", None)
    # Commands are compared that name the same one, spelt in one way or another.
    del given["checkpoint"]["dirpath"]
    text = json.dumps(given, sort_keys=True, default=str)
    # Runs of earlier versions have the callbacks' class paths in their hash.
    return hashlib.sha256(text.replace('"zoo.training.callbacks.', '"zoo.callbacks.').encode()).hexdigest()


def command_of(*words: str) -> str:
    """Return a command as it is recorded and published: without the folders above this one."""
    return shlex.join(portable(word) for word in words)


def portable(word: str) -> str:
    """Return a word of a command line in which an absolute path is told from this folder, or by its last part alone."""
    option, equals, value = word.rpartition("=")
    if not os.path.isabs(value):
        return word
    relative = os.path.relpath(value)
    return option + equals + (os.path.basename(value.rstrip("/")) if relative.startswith("..") else relative)


def options(settings: Namespace) -> list[str]:
    """Return the options of the command line that set these settings; those of the data are the data set's."""
    return [f"--{name.replace('.init_args.', '.')}" for name in settings.keys() if "logger." not in name]


def unknown_option(option: str, legal: Iterable[str]) -> str:
    """Say which option is nearest, and list those of the same group, e.g. of ``--model``."""
    group, legal = option.rpartition(".")[0], set(legal)
    nearby = {name for name in legal if name.rpartition(".")[0] == group}
    # Of an unknown group, the groups are listed.
    nearby = nearby or {name.partition(".")[0] for name in legal}
    return unknown_name("option", option, nearby, unlisted=legal - nearby)


class PlainHelp(DefaultHelpFormatter):
    """Help without the markup of the docstrings that it is made of."""

    def format_help(self) -> str:
        return re.sub(r"(?::[a-z]+:)?`{1,2}~?([^`]+?)`{1,2}", r"\1", super().format_help())


def going_on(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """Split ``arguments`` into what their ``--ckpt_path``, if there is one, stands for and what overrides it.

    Returns:
        The configuration files, followed by options for the checkpoint's network, data and folder; and the rest.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--ckpt_path")
    parser.add_argument("-c", "--config", action="append", default=[])
    known, rest = parser.parse_known_args(arguments)
    if known.ckpt_path is None:
        return [], list(arguments)
    if known.config:
        rank_zero_info(
            f"network, data and number of epochs are those of {known.ckpt_path}, whatever {' and '.join(known.config)} "
            "says of them; options override both"
        )
    predicting = any(word.partition("=")[0] == "--data.predict" for word in rest)
    files = [f"--config={file}" for file in known.config]
    path = usable_checkpoint(known.ckpt_path)
    return [*files, "--ckpt_path", path, *checkpoint_settings(path, predicting)], rest


def checkpoint_settings(path: str, predicting: bool) -> list[str]:
    """Return options for a checkpoint's network and folder, and, unless ``predicting`` on other images, its data."""
    record = record_of(path)
    # Settings of earlier versions that there are no more had been used when the run began.
    kept = record["model"].keys() & inspect.signature(Classifier).parameters.keys()
    model = {name: record["model"][name] for name in kept} | network_settings(record)
    folder = os.path.dirname(os.path.abspath(path))
    # Nothing but tensors and plain values is unpickled.
    settings = ["--weights_only", "true", "--model", json.dumps(model), "--checkpoint.dirpath", folder]
    settings += ["--trainer.max_epochs", json.dumps(record["trainer"]["max_epochs"])]
    # What is drawn in the rest of the run follows from its seed.
    if (seed := record["training"].get("seed", -1)) >= 0:
        settings += ["--seed_everything", str(seed)]
    # Images to predict on are decoded as the network wants them, so the training images need not be there.
    if not predicting:
        kind = look_up(DATA, record["data"]["name"], "data set")
        data = {"class_path": f"zoo.data.{kind.__name__}", "init_args": record["data"]["arguments"]}
        settings += ["--data", json.dumps(data)]
    return settings


def network_settings(record: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of ``Classifier`` that build a checkpoint's network, whatever its run started from."""
    spec = record["spec"]
    network = {"architecture": spec["architecture"], "architecture_args": spec["model_args"]}
    return {**network, "operator": spec["operator"], "init_from": None, "calibrate": None}


@contextlib.contextmanager
def readable_errors() -> Iterator[None]:
    """Turn errors that a person can cure into one message and exit status 1, and Ctrl-C into exit status 130.

    ``ZOO_TRACEBACK=1`` shows the stack. Warnings are shown without the line of code that gave them.
    """
    formatwarning = warnings.formatwarning
    warnings.formatwarning = lambda message, *_: f"warning: {message}\n"
    try:
        yield
    except CURABLE as error:
        if os.environ.get("ZOO_TRACEBACK"):
            raise
        print(f"error: {shortened(str(error))}", file=sys.stderr)
        sys.exit(1)
    except (KeyboardInterrupt, SystemExit) as error:
        if status := stop_status(error):
            sys.exit(status)
        raise
    finally:
        warnings.formatwarning = formatwarning


def stop_status(error: BaseException) -> int | None:
    """Return the exit status of a program that a signal has stopped by this exception; None if it was no signal."""
    # Of a KeyboardInterrupt, Lightning makes exit status 1.
    if isinstance(error, KeyboardInterrupt) or isinstance(error.__context__, KeyboardInterrupt):
        return INTERRUPTED
    statuses = [STOPPED + number for number in SIGNALS]
    return error.code if isinstance(error, SystemExit) and error.code in statuses else None


def shortened(message: str) -> str:
    """Leave out of jsonargparse's message the alternatives that nobody meant: that the value could have been null."""
    innermost = re.compile(
        r"Does not validate against any of the Union subtypes\s+Subtypes: .*\n\s*Errors:\n"
        r"((?:(?!Does not validate)[\s\S])*?)\s*Given value type: .*\n\s*Given value: (.*)"
    )
    while found := innermost.search(message):
        problems, value = found.groups()
        alternatives = [" ".join(text.split()) for text in re.split(r"^\s*- ", problems, flags=re.MULTILINE)]
        meant = "; ".join(text for text in alternatives if text and "NoneType" not in text)
        # What jsonargparse makes of a whole group of settings tells a person nothing.
        got = "" if value.startswith(("Namespace(", "NestedArg(")) else f"; got {value}"
        message = message[: found.start()] + meant + got + message[found.end() :]
    return message
