"""Commands that repeat what is published: train-zoo, table, reports. They need a checkout."""

import argparse
import contextlib
from collections.abc import Iterator
from pathlib import Path

from zoo.checkpoints.catalogue import PRETRAINED
from zoo.commands.arguments import Commands, add_device, positive
from zoo.files import relative
from zoo.recipes.pages import write_reports
from zoo.recipes.recipe import LEAST_SECONDS, need_checkout
from zoo.recipes.tables import RESULTS, list_tables, read_table, result_path, run_table
from zoo.recipes.whole_zoo import train_zoo as train_recipes
from zoo.resuming.stopping import stop_status
from zoo.training.device import Device

MINUTES = (
    "begin no epoch that would not end in that time (nobody knows the length of a first one, which is begun if "
    f"{LEAST_SECONDS} s are left); the next call goes on"
)


def add_commands(commands: Commands) -> None:
    """Add the commands and what they take."""
    command = commands.add_parser("train-zoo", help="train, export and verify every recipe that has no checkpoint yet")
    command.description = (
        "Train, export and verify every recipe that has no checkpoint yet; exit status 1 if one fails."
    )
    command.add_argument("--only", default="*", metavar="GLOB", help="only recipes with such a name")
    command.add_argument("--recipes", type=Path, metavar="DIR", help="the folder of the recipes (default: configs)")
    command.add_argument("--minutes", type=positive(float), default=float("inf"), help=MINUTES)
    command.add_argument("--epochs", type=positive(int), help="train so many, in place of each recipe's own number")
    command.add_argument("--seed", type=int, help="begin with it, in place of each recipe's own seed")
    command.add_argument("--to", type=Path, default=PRETRAINED, help="parent of the new folders (default: embedded)")
    _add_training_device(command)
    command.set_defaults(function=train_zoo)

    command = commands.add_parser("table", help="train the cells of one of the paper's tables that have no result yet")
    command.description = "Train the cells of a table that have no result yet; exit status 1 as long as some have none."
    command.add_argument("name", help=f"one of {', '.join(list_tables())}")
    command.add_argument("--scale", default="small", help="tiny, small or full (default: %(default)s)")
    command.add_argument("--minutes", type=positive(float), default=float("inf"), help=MINUTES)
    command.add_argument(
        "--results", type=Path, default=RESULTS, help="folder of the numbers (default: results/tables)"
    )
    _add_training_device(command)
    command.set_defaults(function=table)

    command = commands.add_parser("reports", help="write the generated parts of README.md and docs/results.md")
    command.set_defaults(function=reports)


def _add_training_device(command: argparse.ArgumentParser) -> None:
    add_device(command)
    command.add_argument(
        "--compile",
        action=argparse.BooleanOptionalAction,
        help="use torch.compile, which is the default on a GPU; bfloat16 or float32 is chosen by what is faster here",
    )


def train_zoo(
    *,
    only: str,
    minutes: float,
    to: Path,
    recipes: Path | None = None,
    epochs: int | None = None,
    seed: int | None = None,
    device: str = "auto",
    compile: bool | None = None,
) -> int:
    """Train, export and verify every recipe that has no checkpoint yet; return 1 if one fails."""
    need_checkout("train-zoo")
    with _telling_how_to_go_on():
        chosen = Device.choose(device, compile)
        settings = {"device": chosen, "minutes": minutes, "epochs": epochs, "seed": seed, "to": to}
        return int(not train_recipes(only, folder=recipes, **settings))


def table(
    name: str, *, scale: str, minutes: float, results: Path, device: str = "auto", compile: bool | None = None
) -> int:
    """Train the cells of a table that have no result yet; return 1 as long as some have none."""
    need_checkout("table")
    chosen = read_table(name)
    with _telling_how_to_go_on():
        settings = {"device": Device.choose(device, compile), "minutes": minutes, "results": results}
        complete = run_table(chosen, scale, **settings)
    if complete:
        print(f"every cell is trained: {relative(result_path(chosen.name, scale, results))}")
    return int(not complete)


@contextlib.contextmanager
def _telling_how_to_go_on() -> Iterator[None]:
    try:
        yield
    except (KeyboardInterrupt, SystemExit) as error:
        if stop_status(error):
            print("\nstopped; the same command goes on from what was saved", flush=True)
        raise


def reports() -> None:
    """Write the generated parts of the README and the docs."""
    need_checkout("reports")
    for path in write_reports():
        print(f"written: {relative(path)}")
