"""Commands on checkpoint folders: list, verify, cards, export, measure, publish."""

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table
from torch import Tensor

import zoo
from zoo.checkpoints.catalogue import PRETRAINED, find_local
from zoo.checkpoints.config import headline, read_config
from zoo.checkpoints.publishing import publish as publish_folder
from zoo.commands.arguments import Commands, add_new_folder, checkpoint_name
from zoo.data.labelled_files import LabelledFiles
from zoo.data.measuring import data_for, measured_data
from zoo.data.measuring import measure as measure_folder
from zoo.data.registry import DATA
from zoo.files import write_whole
from zoo.hub.card import model_card
from zoo.hub.repository import CARD
from zoo.training.class_accuracy import show_class_accuracies
from zoo.training.export import export as export_folder


def add_commands(commands: Commands) -> None:
    """Add the commands and what they take."""
    command = commands.add_parser("list", help="show the embedded checkpoints and what was measured")
    command.set_defaults(function=show_list)

    command = commands.add_parser("verify", help="recompute what checkpoints claim; exit status 1 if anything differs")
    command.add_argument("names", nargs="*", metavar="NAME", help="names or folders; all embedded ones by default")
    command.add_argument("--accuracy", action="store_true", help="measure the test accuracy again, too")
    command.add_argument("--root", help="the folder of the images, if the checkpoint's data is not Digits")
    command.set_defaults(function=verify)

    command = commands.add_parser("cards", help="write the model cards again from their config.json")
    command.add_argument("names", nargs="*", metavar="NAME", help="names or folders; all embedded ones by default")
    command.set_defaults(function=write_cards)

    add_export(commands)
    add_measure(commands)
    add_publish(commands)


def add_export(commands: Commands) -> None:
    command = commands.add_parser("export", help="make a checkpoint folder from a Lightning checkpoint")
    command.add_argument("checkpoint", type=Path, help="the Lightning checkpoint (.ckpt) that train.py wrote")
    command.add_argument(
        "name", type=checkpoint_name, help="<data>_<architecture>_<operator>, e.g. digits_cnn6_tanh_cosine"
    )
    command.add_argument("--root", help="the folder of the images, if it has moved since the training")
    command.add_argument("--licence", help="of the weights, e.g. CC-BY-4.0; by default that of the images")
    command.add_argument("--half", action="store_true", help="store the weights in float16, rounded before measuring")
    add_new_folder(command)
    command.set_defaults(function=export)


def add_measure(commands: Commands) -> None:
    command = commands.add_parser("measure", help="measure a checkpoint folder's accuracy, e.g. of a converted one")
    command.description = "Measure a checkpoint on validation and test images, and record it in its config and card."
    command.add_argument("name", help="the checkpoint's folder or name")
    command.add_argument("--data", help=f"one of {', '.join(DATA)}; by default what was measured on, else your own")
    command.add_argument("--root", help="the folder that holds train/, or the CSV file of an ImageTable")
    command.add_argument("--title", help="of your own images, as shown beside the numbers; by default their folder's")
    command.add_argument("--licence", help="of the weights, to be recorded, too")
    command.set_defaults(function=measure)


def add_publish(commands: Commands) -> None:
    command = commands.add_parser("publish", help="put a checkpoint into a repository of the Hugging Face Hub")
    command.description = "Check a checkpoint, put it into a Hub repository in one commit, and print the commit to pin."
    command.add_argument("name", help="the checkpoint's name or folder")
    command.add_argument("--repo-id", required=True, metavar="OWNER/NAME", help="the repository; made if there is none")
    command.add_argument("--private", action="store_true", help="make the repository private")
    command.add_argument("--revision", help="a branch, made from main if there is none (default: main)")
    command.add_argument("--dry-run", action="store_true", help="only say what is missing; no request is made")
    command.set_defaults(function=publish)


def show_list() -> None:
    """Show the embedded checkpoints and what was measured."""
    table = Table("checkpoint", "data", "accuracy", "images", "parameters")
    table.columns[0].no_wrap = True
    for name in zoo.list_checkpoints():
        config = read_config(PRETRAINED / name)
        for metric in (metric for metric in config["metrics"] if metric["name"] == "accuracy"):
            data, value = f"{metric['dataset']}, {metric['split']}", f"{metric['value']:.4f}"
            table.add_row(name, data, value, f"{metric['images']:,}", f"{config['parameters']:,}")
    Console().print(table)


def verify(names: Sequence[str], *, accuracy: bool = False, root: str | None = None) -> int:
    """Recompute what checkpoints claim, all embedded ones by default; return 1 if anything differs."""
    failed = False
    for name in names or zoo.list_checkpoints():
        try:
            problems = zoo.verify(name, *(_recorded_batches(name, root) if accuracy else ()))
        # Images that are not there, or a damaged folder: the other checkpoints can be verified all the same.
        except (FileNotFoundError, zoo.CheckpointError) as error:
            problems = [str(error)]
        print(f"{name}: {'; '.join(problems) or _found(name, accuracy)}")
        failed = failed or bool(problems)
    return int(failed)


def _found(name: str, accuracy: bool) -> str:
    """Return what was found of a checkpoint that is what it claims to be."""
    if not accuracy:
        return "ok"
    metric = headline(read_config(zoo.find(name)))
    return f"ok, {metric['split']} accuracy {metric['value']:.4f} on {metric['images']:,} images, as recorded"


def _recorded_batches(name: str, root: str | None) -> tuple[Iterator[tuple[Tensor, Tensor]], str]:
    """Return the images that a checkpoint was measured on last, and the name of their split."""
    data = measured_data(name, root)
    split = read_config(zoo.find(name))["metrics"][-1]["split"]
    return data.evaluation_batches(split), split


def write_cards(names: Sequence[str]) -> None:
    """Write the model cards of checkpoints, all embedded ones by default, from their config.json."""
    for name in names or zoo.list_checkpoints():
        folder = find_local(name)
        write_whole(folder / CARD, model_card(read_config(folder)))
        print(f"written: {folder / CARD}")


def export(
    checkpoint: Path,
    name: str,
    *,
    to: Path,
    root: str | None = None,
    licence: str | None = None,
    half: bool = False,
    overwrite: bool = False,
) -> None:
    """Make a checkpoint folder, ``to / name``, from a Lightning checkpoint, and show what was measured."""
    precision = "float16" if half else "float32"
    settings = {"root": root, "licence": licence, "precision": precision, "overwrite": overwrite}
    _show_metrics(export_folder(checkpoint, to / name, **settings))
    print(f"written: {to / name}")


def measure(
    name: str, *, data: str | None = None, root: str | None = None, title: str | None = None, licence: str | None = None
) -> None:
    """Measure a checkpoint on validation and test images, and record that in its config and card."""
    folder = find_local(name)
    measured_before = not (data or root) and bool(read_config(folder)["metrics"])
    own = "ImageTable" if root and Path(root).is_file() else "ImageFolder"
    kind = None if measured_before else data or own
    before, images = read_config(folder)["metrics"], data_for(name, kind, root, title)
    metrics, by_class = measure_folder(name, images)
    _show_metrics(metrics)
    show_class_accuracies(by_class)
    if isinstance(images, LabelledFiles) and not (images.has("val") or images.has("test")):
        print("these are the images that a training would hold out of train, for there are none of val or test")
    if before and before != [dataclasses.asdict(metric) for metric in metrics]:
        print("in place of what was recorded before:")
        _show_metrics(zoo.Metric(**metric) for metric in before)
    if licence:
        zoo.record(name, licence=licence)
    print(f"recorded: {folder}")


def publish(
    name: str, *, repo_id: str, private: bool = False, revision: str | None = None, dry_run: bool = False
) -> None:
    """Put a checkpoint into a Hub repository in one commit, and print the commit to pin."""
    commit = publish_folder(name, repo_id, private=private, revision=revision, dry_run=dry_run)
    if commit is None:
        print(f"{name} is fit to be published")
    else:
        print(f"{repo_id} has it; to load it: zoo.load({repo_id!r}, revision={commit!r})")


def _show_metrics(metrics: Iterable[zoo.Metric]) -> None:
    for metric in metrics:
        print(f"{metric.name} {metric.value:.4f} on {metric.dataset}, {metric.split} split, {metric.images:,} images")
