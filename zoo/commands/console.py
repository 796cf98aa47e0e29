"""The command line: which command is meant, what it is given, and errors without stack traces."""

import argparse
import contextlib
import functools
import gc
import importlib
import os
import re
import sys
import warnings
from collections.abc import Iterable, Iterator
from types import ModuleType

from operators.lookup import unknown_name
from zoo.provenance import program
from zoo.resuming.stopping import stop_status

# A person can cure these errors, and is told of them without a stack trace.
CURABLE = (
    argparse.ArgumentError,
    ValueError,
    TypeError,
    OSError,
    FloatingPointError,
    ModuleNotFoundError,
)

DESCRIPTION = (
    "List, verify, describe, explain, export and convert checkpoints, train them and the paper's tables, show one at "
    "work."
)
# The commands of each file beside this one.
FAMILIES = {
    "checkpoints": ("list", "verify", "cards", "export", "measure", "publish"),
    "conversion": ("convert",),
    "corruptions": ("corruptions",),
    "data": ("preflight",),
    "explanation": ("explain",),
    "robustness": ("robustness",),
    "recipes": ("train-zoo", "table", "reports"),
    "demo": ("demo", "curves"),
}
# The commands of Lightning's command line, which reads their words itself.
TRAINING = {
    "fit": "train a network, as train.py does",
    "validate": "measure a network on validation images",
    "test": "measure a network on test images",
    "predict": "name the classes of images",
}


def main() -> None:
    """Run the command that the process was given: ``decoupled-zoo COMMAND`` or ``python -m zoo COMMAND``."""
    if sys.argv[1:2] and sys.argv[1] in TRAINING:
        train()
        return
    # A command imports its own family alone, which starts sooner.
    chosen = [family for family, names in FAMILIES.items() if sys.argv[1:2] and sys.argv[1] in names]
    parser = command_parser(chosen or FAMILIES)
    with readable_errors():
        arguments, unknown = parser.parse_known_args()
        options = vars(arguments)
        function, legal = options.pop("function"), options.pop("legal")
        if unknown:
            raise ValueError(unknown_name("argument", unknown[0], legal))
        status = function(**options)
        if status is not None:
            sys.exit(status)


def train() -> None:
    """Run Lightning's command line on the words that the process was given, as ``python train.py`` does."""
    with readable_errors():
        run = _imported("zoo.training.cli").run
        # Lightning has put its own in the place.
        warnings.formatwarning = _plain_warning
        run()


def command_parser(families: Iterable[str]) -> argparse.ArgumentParser:
    """Return the parser of the commands of families; what it parses has a ``function``, and its ``legal`` options."""
    parser = argparse.ArgumentParser(prog=" ".join(program("python -m zoo")), description=DESCRIPTION)
    exact = functools.partial(argparse.ArgumentParser, allow_abbrev=False)
    commands = parser.add_subparsers(required=True, metavar="COMMAND", parser_class=exact)
    for name, told in TRAINING.items():
        commands.add_parser(name, help=told, add_help=False)
    for family in families:
        _imported(f"zoo.commands.{family}").add_commands(commands)
    for command in commands.choices.values():
        command.set_defaults(legal=re.findall(r"--[\w-]+", command.format_usage()))
    return parser


def _imported(name: str) -> ModuleType:
    """Import a module without a search for garbage meanwhile, of which imports make hardly any: it takes long."""
    gc.disable()
    try:
        return importlib.import_module(name)
    finally:
        gc.enable()


def _curable() -> tuple[type[BaseException], ...]:
    """Return the errors that a person can cure, Lightning's own among them if it is there to raise it."""
    lightning = sys.modules.get("lightning.pytorch.utilities.exceptions")
    return (*CURABLE, lightning.MisconfigurationException) if lightning else CURABLE


@contextlib.contextmanager
def readable_errors() -> Iterator[None]:
    """Turn errors that a person can cure into one message and exit status 1, and Ctrl-C into exit status 130.

    ``ZOO_TRACEBACK=1`` shows the stack. Warnings are shown without the line of code that gave them.
    """
    # What a terminal cannot show, such as a class name in another script, must not end a run.
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
    formatwarning = warnings.formatwarning
    warnings.formatwarning = _plain_warning
    try:
        yield
    except _curable() as error:
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


def _plain_warning(message: object, *_: object) -> str:
    return f"warning: {message}\n"


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
        # The text that jsonargparse makes of a whole group of settings tells a person nothing.
        got = "" if value.startswith(("Namespace(", "NestedArg(")) else f"; got {value}"
        message = message[: found.start()] + meant + got + message[found.end() :]
    return message
