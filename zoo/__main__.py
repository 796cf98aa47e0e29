"""List, verify, describe and export checkpoints, show one at work, draw the operators."""

import argparse
import functools
import inspect
import re
import sys
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

import zoo
from operators.lookup import look_up, unknown_name
from zoo.cards import markdown_table, model_card
from zoo.checkpoints import CARD, PRETRAINED, read_config
from zoo.classifier import read_lightning_checkpoint, read_record
from zoo.cli import readable_errors
from zoo.data import DATA, Digits, ImageData
from zoo.models import ModelSpec
from zoo.plots import plot_operators, plot_predictions

ROOT = Path(__file__).resolve().parent.parent

# Arguments of data modules that hold on one machine only, or for one use.
MACHINE_ARGUMENTS = ("root", "predict", "download", "num_workers", "memory_limit_mb")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m zoo", description=__doc__)
    exact = functools.partial(argparse.ArgumentParser, allow_abbrev=False)
    commands = parser.add_subparsers(required=True, metavar="COMMAND", parser_class=exact)

    command = commands.add_parser("list", help="show the embedded checkpoints and what was measured")
    command.add_argument("--markdown", action="store_true", help="print the table of the README")
    command.set_defaults(function=show_list)

    command = commands.add_parser("verify", help="recompute what checkpoints claim; exit status 1 if anything differs")
    command.add_argument("names", nargs="*", metavar="NAME", help="names or folders; all embedded ones by default")
    command.add_argument("--accuracy", action="store_true", help="measure the test accuracy again, too")
    command.add_argument("--root", help="the folder of the images, if the checkpoint's data is not Digits")
    command.set_defaults(function=verify)

    command = commands.add_parser("cards", help="write the model cards again from their config.json")
    command.add_argument("names", nargs="*", metavar="NAME", help="names or folders; all embedded ones by default")
    command.set_defaults(function=write_cards)

    command = commands.add_parser("export", help="make a checkpoint folder from a Lightning checkpoint")
    command.add_argument("checkpoint", type=Path, help="the Lightning checkpoint (.ckpt) that train.py wrote")
    command.add_argument("name", help="<data>_<architecture>_<operator>, e.g. digits_cnn6_tanh_cosine")
    command.add_argument("--to", type=Path, default=PRETRAINED, help="parent of the new folder (default: embedded)")
    command.add_argument("--root", help="the folder of the images, if it has moved since the training")
    command.add_argument("--overwrite", action="store_true", help="replace a folder that exists")
    command.set_defaults(function=export)

    command = commands.add_parser("demo", help="load a Digits checkpoint by torch.hub and classify held-out digits")
    command.add_argument("folder", help="a checkpoint folder or name, trained on Digits")
    command.add_argument("--output", type=Path, default=Path("outputs/demo.png"), help="the picture")
    command.set_defaults(function=demo)

    command = commands.add_parser("curves", help="draw every magnitude and angular function")
    command.add_argument("--output", type=Path, default=Path("outputs/operators.png"), help="the picture")
    command.set_defaults(function=curves)

    for command in commands.choices.values():
        command.set_defaults(legal=re.findall(r"--\w+", command.format_usage()))
    with readable_errors():
        arguments, unknown = parser.parse_known_args()
        if unknown:
            raise ValueError(unknown_name("argument", unknown[0], arguments.legal))
        arguments.function(arguments)


def show_list(arguments: argparse.Namespace) -> None:
    header = ("checkpoint", "data", "accuracy", "images", "parameters")
    rows = []
    for name in zoo.list_checkpoints():
        config = read_config(PRETRAINED / name)
        for metric in config["metrics"]:
            data, value = f"{metric['dataset']}, {metric['split']}", f"{metric['value']:.4f}"
            rows.append((name, data, value, f"{metric['images']:,}", f"{config['parameters']:,}"))
    if arguments.markdown:
        print(markdown_table(header, rows))
        return
    table = Table(*header)
    table.columns[0].no_wrap = True
    for row in rows:
        table.add_row(*row)
    Console().print(table)


def verify(arguments: argparse.Namespace) -> None:
    failed = False
    for name in arguments.names or zoo.list_checkpoints():
        batches, split = None, "test"
        if arguments.accuracy:
            config = read_config(zoo.find(name))
            if "data" not in config["training"] or not config["metrics"]:
                raise ValueError(f"{name} does not record what was measured on which data, so it cannot be checked")
            split = config["metrics"][-1]["split"]
            batches = _data(config["training"]["data"], arguments.root).evaluation_batches(split)
        problems = zoo.verify(name, batches, split)
        print(f"{name}: {'ok' if not problems else '; '.join(problems)}")
        failed = failed or bool(problems)
    sys.exit(int(failed))


def write_cards(arguments: argparse.Namespace) -> None:
    for name in arguments.names or zoo.list_checkpoints():
        folder = zoo.find(name)
        (folder / CARD).write_text(model_card(read_config(folder)), encoding="utf-8")
        print(f"written: {folder / CARD}")


def export(arguments: argparse.Namespace) -> None:
    saved = read_lightning_checkpoint(arguments.checkpoint)
    record = read_record(saved)
    spec = ModelSpec.from_dict(record["spec"])
    expected = f"{spec.architecture}_{spec.operator_name}"
    if not arguments.name.endswith(f"_{expected}"):
        raise ValueError(f"a checkpoint of this network is called <data>_{expected}, got {arguments.name!r}")
    folder = arguments.to / arguments.name
    if folder.exists() and not arguments.overwrite:
        raise FileExistsError(f"{folder} exists; choose another name or parent (--to), or replace it (--overwrite)")
    model = spec.build()
    prefix = "model."
    model.load_state_dict(
        {key.removeprefix(prefix): value for key, value in saved["state_dict"].items() if key.startswith(prefix)}
    )
    data = _data(record["data"], arguments.root)
    metrics = []
    # A folder without test images has only validation accuracy to show.
    splits = ("val",) if data.split("test") is data.split("val") else ("val", "test")
    for split in splits:
        value, images = zoo.accuracy(model, data.evaluation_batches(split))
        metrics.append(zoo.Metric("accuracy", value, data.title, split, images))
        print(f"accuracy {value:.4f} on {data.title}, {split} split, {images:,} images")
    training = {**record["training"], "data": _portable(record["data"])}
    zoo.save(model, folder, metrics=metrics, training=training, licence=data.licence, overwrite=arguments.overwrite)
    print(f"written: {folder}")


def demo(arguments: argparse.Namespace) -> None:
    model = torch.hub.load(str(ROOT), "checkpoint", arguments.folder, source="local")
    held, wanted = ((kind.in_chans, kind.input_size, list(kind.class_names)) for kind in (model.spec, Digits))
    if held != wanted:
        raise ValueError(
            f"demo classifies scikit-learn's digits, grey and 8×8; {arguments.folder} takes {held[0]} channels and "
            f"{held[1]}×{held[1]} pixels, and knows {len(held[2])} classes. For images of its own kind: "
            f"python train.py predict --model.pretrained {arguments.folder} --data.predict FOLDER"
        )
    data = Digits()
    images, labels = next(iter(data.evaluation_batches("test")))
    images, labels = images[:24], labels[:24]
    with torch.inference_mode():
        probabilities, guesses = model(images).softmax(1).max(1)
    names = model.class_names
    truth, predicted = [names[label] for label in labels], [names[guess] for guess in guesses]
    table = Table("image", "is", "predicted", "probability", title="held-out digits")
    for index in range(10):
        table.add_row(f"{index + 1}", truth[index], predicted[index], f"{probabilities[index]:.4f}")
    Console().print(table)
    correct = sum(guess == label for guess, label in zip(predicted, truth, strict=True))
    title = f"{Path(arguments.folder).name}: {correct} of {len(images)} held-out digits right"
    plot_predictions(images, truth, predicted, probabilities.tolist(), model.spec.operator, title, arguments.output)
    print(f"picture: {arguments.output}")


def curves(arguments: argparse.Namespace) -> None:
    plot_operators(arguments.output)
    print(f"picture: {arguments.output}")


def _data(record: dict[str, Any], root: str | None) -> ImageData:
    arguments = dict(record["arguments"])
    kind = look_up(DATA, record["name"], "data set")
    parameter = inspect.signature(kind).parameters.get("root")
    if root is not None and parameter:
        arguments["root"] = root
    if parameter and parameter.default is parameter.empty and "root" not in arguments:
        raise ValueError(f"no folder is recorded for the images ({record['name']}): name it (--root FOLDER)")
    return kind(**arguments)


def _portable(record: dict[str, Any]) -> dict[str, Any]:
    """Return the description of a data module without what is this machine's own."""
    arguments = {
        key: value for key, value in record["arguments"].items() if key not in MACHINE_ARGUMENTS and value is not None
    }
    return {"name": record["name"], "arguments": arguments}


if __name__ == "__main__":
    main()
