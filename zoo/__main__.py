"""List, verify, describe, export and convert checkpoints, train them and the paper's tables, show one at work."""

import argparse
import contextlib
import functools
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from fractions import Fraction
from pathlib import Path

import torch
from rich.console import Console
from rich.markdown import Markdown
from rich.progress import Progress, TimeElapsedColumn
from rich.table import Table
from torch import Tensor

import zoo
from operators import calibrate
from operators.lookup import unknown_name
from zoo.checkpoints.card import model_card
from zoo.checkpoints.loading import CARD, PRETRAINED, find_local, read_config, write_whole
from zoo.checkpoints.publishing import publish
from zoo.checkpoints.starting_points import convert, licence_of, start_from
from zoo.data import DATA, Digits, ImageData, ImageFolder
from zoo.data.augmentation import to_float
from zoo.data.image_files import sample_files
from zoo.experiments.pages import write_reports
from zoo.experiments.pictures import plot_operators, plot_predictions
from zoo.experiments.recipes import LEAST_SECONDS, Device, train_zoo
from zoo.experiments.tables import RESULTS, list_tables, read_table, result_path, run_table
from zoo.models.building import PLAIN, is_plain
from zoo.provenance import origin
from zoo.robustness.evaluation import BATCH, EPS, Result, chosen_steps, companions_of, evaluate
from zoo.robustness.probes import NEEDS, optional
from zoo.robustness.report import card_record, draw, draw_attacked, report
from zoo.training.classifier import CALIBRATION_IMAGES
from zoo.training.cli import command_of, portable, readable_errors, stop_status
from zoo.training.export import check_absent, check_name, export, measure, measured_data, recorded_data

MINUTES = (
    "begin no epoch that would not end in that time (nobody knows the length of a first one, which is begun if "
    f"{LEAST_SECONDS} s are left); the next call goes on"
)

OUTPUTS = Path("outputs")
# Of the norms that occur, which becomes the radius unless another is asked for.
QUANTILE = 0.99

ROOT = Path(__file__).resolve().parent.parent


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m zoo", description=__doc__)
    exact = functools.partial(argparse.ArgumentParser, allow_abbrev=False)
    commands = parser.add_subparsers(required=True, metavar="COMMAND", parser_class=exact)

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

    command = commands.add_parser("export", help="make a checkpoint folder from a Lightning checkpoint")
    command.add_argument("checkpoint", type=Path, help="the Lightning checkpoint (.ckpt) that train.py wrote")
    command.add_argument(
        "name", type=checkpoint_name, help="<data>_<architecture>_<operator>, e.g. digits_cnn6_tanh_cosine"
    )
    command.add_argument("--to", type=Path, default=OUTPUTS, help="parent of the new folder (default: %(default)s)")
    command.add_argument("--root", help="the folder of the images, if it has moved since the training")
    command.add_argument("--licence", help="of the weights, e.g. CC-BY-4.0; by default that of the images")
    command.add_argument("--half", action="store_true", help="store the weights in float16, rounded before measuring")
    command.add_argument("--overwrite", action="store_true", help="replace a folder that exists")
    command.set_defaults(function=export_checkpoint)

    command = commands.add_parser("convert", help="make a decoupled checkpoint folder from a trained plain network")
    command.description = "Convert a trained plain network, save it as a checkpoint folder, and show the report."
    command.add_argument("source", help="timm:NAME, a checkpoint of the zoo, a folder, or a Hub repository")
    command.add_argument(
        "name", type=checkpoint_name, help="<data>_<architecture>_<operator>, e.g. imagenet_resnet50_tanh_cosine"
    )
    command.add_argument(
        "--operator", help="the operator, weighted by the filters' norms, or conv; by default that in NAME"
    )
    command.add_argument("--weights", type=Path, help="a file (.safetensors, .pth) with the weights of timm:NAME")
    command.add_argument("--classes", type=Path, help="a text file with the name of each class, one a line")
    command.add_argument("--images", type=Path, help="a file or folder of images to calibrate the network on")
    command.add_argument(
        "--quantile", type=float, help=f"of the norms that become the radius (default: {QUANTILE}); only with --images"
    )
    command.add_argument("--licence", help="of the weights; by default that of the source, if it is known")
    command.add_argument("--to", type=Path, default=OUTPUTS, help="parent of the new folder (default: %(default)s)")
    command.add_argument("--overwrite", action="store_true", help="replace a folder that exists")
    command.set_defaults(function=convert_checkpoint)

    command = commands.add_parser("measure", help="measure a checkpoint folder's accuracy, e.g. of a converted one")
    command.description = "Measure a checkpoint on validation and test images, and record it in its config and card."
    command.add_argument("name", help="the checkpoint's folder or name")
    command.add_argument("--data", help=f"one of {', '.join(DATA)}; by default what was measured on, else ImageFolder")
    command.add_argument("--root", help="the folder of the images, for an ImageFolder that with train/ and val/")
    command.add_argument("--title", help="of an ImageFolder, as shown beside the numbers; by default its folder's name")
    command.add_argument("--licence", help="of the weights, to be recorded, too")
    command.set_defaults(function=measure_checkpoint)

    command = commands.add_parser("preflight", help="open every image of a folder, and list all that cannot be read")
    command.description = "Open every image of ROOT/train, val and test, and list all that cannot be read; then exit 1."
    command.add_argument("root", metavar="ROOT", help="the folder that holds train, as for --data ImageFolder")
    command.add_argument("--grey", action="store_true", help="for a network that takes one channel")
    command.set_defaults(function=preflight)

    command = commands.add_parser("robustness", help="attack a checkpoint and say how far to believe the outcome")
    command.description = (
        "Attack a checkpoint, tell the worst case of each image, and look for masked gradients. A killed run goes on."
    )
    command.add_argument("name", help="the checkpoint's name or folder")
    command.add_argument("--data", help=f"one of {', '.join(DATA)}; by default what it was measured on")
    command.add_argument("--root", help="the folder of the images")
    command.add_argument("--attack", action="append", default=[], help="only this one (give it again for more)")
    command.add_argument("--eps", type=pixels, default=EPS, help="largest change of a pixel (default: 8/255)")
    command.add_argument("--limit", type=positive(int), default=1000, help="test images (default: %(default)s)")
    command.add_argument(
        "--effort-limit", type=positive(int), default=100, help="of these, for the L2 attacks (default: %(default)s)"
    )
    command.add_argument(
        "--transfer", action="append", metavar="NAME", help="network to take images from; the twin and another if known"
    )
    command.add_argument("--device", default="auto", help="auto, cpu or cuda (default: %(default)s)")
    command.add_argument(
        "--to", type=Path, default=OUTPUTS / "robustness", help="folder of the result (default: %(default)s)"
    )
    command.add_argument(
        "--record", action="store_true", help="write the outcome into the checkpoint's config and card"
    )
    command.set_defaults(function=attack_checkpoint)

    command = commands.add_parser("publish", help="put a checkpoint into a repository of the Hugging Face Hub")
    command.description = "Check a checkpoint, put it into a Hub repository in one commit, and print the commit to pin."
    command.add_argument("name", help="the checkpoint's name or folder")
    command.add_argument("--repo-id", required=True, metavar="OWNER/NAME", help="the repository; made if there is none")
    command.add_argument("--private", action="store_true", help="make the repository private")
    command.add_argument("--revision", help="a branch, made from main if there is none (default: main)")
    command.add_argument("--dry-run", action="store_true", help="only say what is missing; no request is made")
    command.set_defaults(function=publish_checkpoint)

    command = commands.add_parser("train-zoo", help="train, export and verify every recipe that has no checkpoint yet")
    command.description = (
        "Train, export and verify every recipe that has no checkpoint yet; exit status 1 if one fails."
    )
    command.add_argument("--only", default="*", metavar="GLOB", help="only recipes with such a name")
    command.add_argument("--minutes", type=positive(float), default=float("inf"), help=MINUTES)
    command.add_argument("--epochs", type=positive(int), help="train so many, in place of each recipe's own number")
    command.add_argument("--to", type=Path, default=PRETRAINED, help="parent of the new folders (default: embedded)")
    add_device(command)
    command.set_defaults(function=train_all)

    command = commands.add_parser("table", help="train the cells of one of the paper's tables that have no result yet")
    command.description = "Train the cells of a table that have no result yet; exit status 1 as long as some have none."
    command.add_argument("name", help=f"one of {', '.join(list_tables())}")
    command.add_argument("--scale", default="small", help="tiny, small or full (default: %(default)s)")
    command.add_argument("--minutes", type=positive(float), default=float("inf"), help=MINUTES)
    command.add_argument(
        "--results", type=Path, default=RESULTS, help="folder of the numbers (default: results/tables)"
    )
    add_device(command)
    command.set_defaults(function=train_table)

    command = commands.add_parser("reports", help="write the generated parts of README.md and docs/results.md")
    command.set_defaults(function=write_pages)

    command = commands.add_parser("demo", help="load a Digits checkpoint by torch.hub and classify held-out digits")
    command.add_argument("folder", help="a checkpoint folder or name, trained on Digits")
    command.add_argument("--output", type=Path, default=Path("outputs/demo.png"), help="the picture")
    command.set_defaults(function=demo)

    command = commands.add_parser("curves", help="draw every magnitude and angular function")
    command.add_argument("--output", type=Path, default=Path("outputs/operators.png"), help="the picture")
    command.set_defaults(function=curves)

    for command in commands.choices.values():
        command.set_defaults(legal=re.findall(r"--[\w-]+", command.format_usage()))
    with readable_errors():
        arguments, unknown = parser.parse_known_args()
        if unknown:
            raise ValueError(unknown_name("argument", unknown[0], arguments.legal))
        arguments.function(arguments)


def show_list(arguments: argparse.Namespace) -> None:
    table = Table("checkpoint", "data", "accuracy", "images", "parameters")
    table.columns[0].no_wrap = True
    for name in zoo.list_checkpoints():
        config = read_config(PRETRAINED / name)
        for metric in config["metrics"]:
            data, value = f"{metric['dataset']}, {metric['split']}", f"{metric['value']:.4f}"
            table.add_row(name, data, value, f"{metric['images']:,}", f"{config['parameters']:,}")
    Console().print(table)


def verify(arguments: argparse.Namespace) -> None:
    failed = False
    for name in arguments.names or zoo.list_checkpoints():
        try:
            problems = zoo.verify(name, *(_recorded_batches(name, arguments.root) if arguments.accuracy else ()))
        # Images that are not there, or a damaged folder; the other checkpoints can be verified all the same.
        except (FileNotFoundError, zoo.CheckpointError) as error:
            problems = [str(error)]
        print(f"{name}: {'; '.join(problems) or _found(name, arguments.accuracy)}")
        failed = failed or bool(problems)
    sys.exit(int(failed))


def _found(name: str, accuracy: bool) -> str:
    """Return what was found of a checkpoint that is what it claims to be."""
    if not accuracy:
        return "ok"
    metric = read_config(zoo.find(name))["metrics"][-1]
    return f"ok, {metric['split']} accuracy {metric['value']:.4f} on {metric['images']:,} images, as recorded"


def _recorded_batches(name: str, root: str | None) -> tuple[Iterator[tuple[Tensor, Tensor]], str]:
    """Return the images that a checkpoint was measured on last, and the name of their split."""
    data = measured_data(name, root)
    split = read_config(zoo.find(name))["metrics"][-1]["split"]
    return data.evaluation_batches(split), split


def write_cards(arguments: argparse.Namespace) -> None:
    for name in arguments.names or zoo.list_checkpoints():
        folder = find_local(name)
        write_whole(folder / CARD, model_card(read_config(folder)))
        print(f"written: {folder / CARD}")


def export_checkpoint(arguments: argparse.Namespace) -> None:
    folder = arguments.to / arguments.name
    precision = "float16" if arguments.half else "float32"
    settings = {"root": arguments.root, "licence": arguments.licence, "precision": precision}
    settings["overwrite"] = arguments.overwrite
    show_metrics(export(arguments.checkpoint, folder, **settings))
    print(f"written: {folder}")


def show_metrics(metrics: Iterable[zoo.Metric]) -> None:
    for metric in metrics:
        print(f"accuracy {metric.value:.4f} on {metric.dataset}, {metric.split} split, {metric.images:,} images")


def convert_checkpoint(arguments: argparse.Namespace) -> None:
    folder = arguments.to / arguments.name
    # Before the weights are fetched, which can take minutes.
    check_absent(folder, arguments.overwrite)
    model = start_from(arguments.source, weights=arguments.weights)
    architecture = model.spec.architecture
    _, named, operator = arguments.name.rpartition(f"_{architecture}_")
    operator = arguments.operator or (operator if named else "<operator>")
    check_name(arguments.name, architecture, operator)
    if arguments.quantile is not None and not arguments.images:
        raise ValueError("--quantile says how to calibrate, which needs --images")
    if arguments.classes:
        model.rename_classes(read_classes(arguments.classes, len(model.class_names)))
    report = None if operator == PLAIN else convert(model, operator)
    calibration = "not calibrated (--images), so train it before use"
    if report is None and arguments.images:
        raise ValueError("a plain network is not calibrated; leave out --images, or choose an operator")
    if arguments.images:
        images = sample_files(arguments.images, CALIBRATION_IMAGES, model.transform)
        quantile = QUANTILE if arguments.quantile is None else arguments.quantile
        _, calibration = calibrate(model, [to_float(images)], quantile)
    command = command_of("python", "-m", "zoo", *sys.argv[1:])
    source = portable(arguments.source)
    training = {"converted_from": source, "command": command, **origin(torch.device("cpu"))}
    # Of weights in a file nothing is known.
    licence = arguments.licence or ("not stated" if arguments.weights else licence_of(arguments.source))
    zoo.save(model, folder, training=training, licence=licence, overwrite=arguments.overwrite)
    if report is not None:
        table = Table("layer", "kind", "outcome", title=str(report.operator))
        for layer in report.layers:
            table.add_row(layer.name, layer.kind, "converted" if layer.converted else layer.reason)
        Console().print(table)
        print(calibration)
    print(f"written: {folder}")


def read_classes(path: Path, count: int) -> list[str]:
    """Read the names of ``count`` classes, each in a line of its own."""
    names = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    if len(names) != count or not all(names) or len(set(names)) < count:
        raise ValueError(
            f"{path} has {len(names)} lines, {len(set(names) - {''})} of them different names; the network has {count} "
            "classes, each of which needs a name of its own, one a line"
        )
    return names


def chosen_data(arguments: argparse.Namespace, title: str | None = None) -> ImageData:
    """Return the data module that the command line names, which takes images as the network does."""
    kind, settings = arguments.data or "ImageFolder", {}
    if kind == "ImageFolder":
        spec = zoo.load(arguments.name).spec
        settings = {"input_size": spec.input_size, "in_chans": spec.in_chans, "title": title}
    elif title:
        raise ValueError(f"--title is that of an ImageFolder; {kind} has its own")
    return recorded_data({"name": kind, "arguments": settings}, arguments.root)


def measure_checkpoint(arguments: argparse.Namespace) -> None:
    folder = find_local(arguments.name)
    if not (arguments.data or arguments.root) and read_config(folder)["metrics"]:
        data = measured_data(arguments.name, arguments.root)
    else:
        data = chosen_data(arguments, title=arguments.title)
    show_metrics(measure(arguments.name, data))
    if arguments.licence:
        zoo.record(arguments.name, licence=arguments.licence)
    print(f"recorded: {zoo.find(arguments.name)}")


def preflight(arguments: argparse.Namespace) -> None:
    survey = ImageFolder(arguments.root, in_chans=1 if arguments.grey else 3).survey()
    table = Table("split", "images", "classes", "in the smallest", "cannot be read")
    for split, (labels, broken) in survey.items():
        counts = labels.bincount()
        table.add_row(split, f"{len(labels):,}", str(len(counts)), f"{counts.min():,}", str(len(broken)))
    Console().print(table)
    reasons = {file: reason for _, broken in survey.values() for file, reason in broken.items()}
    for file, reason in reasons.items():
        print(f"{file}: {reason}")
    sys.exit(int(bool(reasons)))


def attack_checkpoint(arguments: argparse.Namespace) -> None:
    steps = chosen_steps(arguments.attack, arguments.eps)
    for package, probes in NEEDS.items():
        if any(step.probe in probes for step in steps):
            optional(package)
    if arguments.record:
        find_local(arguments.name)
    data = chosen_data(arguments) if arguments.data else measured_data(arguments.name, arguments.root)
    device = Device.choose(arguments.device, compile=False).name
    others = companions_of(arguments.name) if arguments.transfer is None else arguments.transfer
    steps = [step for step in steps if others or step.probe != "transfer"]
    settings = {"eps": arguments.eps, "limit": arguments.limit, "effort_limit": arguments.effort_limit}
    with Progress(*Progress.get_default_columns(), TimeElapsedColumn(), transient=True) as bar:
        task = bar.add_task("")

        def tell(step: str, done: int, total: int) -> None:
            bar.update(task, description=step, completed=done, total=total)

        settings |= {"others": others, "device": device, "work": arguments.to / "work", "tell": tell}
        result = evaluate(arguments.name, data, steps, **settings)
    name = result.about["checkpoint"]
    numbers, text, picture = (arguments.to / f"{name}{end}" for end in (".json", ".md", "_images.png"))
    result.write(numbers)
    path = arguments.to / f"{next(filter(is_plain, others), None)}.json"
    twin = Result.read(path) if path.is_file() else None
    if twin and not result.is_of_the_same_images(twin):
        print(f"{path} is of other images or another ε, and left out")
        twin = None
    write_whole(text, report(result, twin))
    draw([result, *([twin] if twin else [])], arguments.to / name)
    draw_attacked(zoo.load(arguments.name), *data.evenly_spaced("test", BATCH), arguments.eps, picture)
    Console().print(Markdown(report(result, twin)))
    for path in sorted(arguments.to.glob(f"{name}[._]*")):
        print(f"written: {path}")
    if arguments.record:
        if missing := result.unmeasured():
            raise ValueError(f"not recorded, for {', '.join(missing)} was not measured; leave out --attack")
        zoo.record(arguments.name, robustness=card_record(result))
        print(f"recorded: {find_local(arguments.name)}")


def pixels(text: str) -> float:
    """Read a change of pixels from the command line, such as 8/255 or 0.03."""
    try:
        if 0 < (value := float(Fraction(text))) <= 1:
            return value
    except (ValueError, ZeroDivisionError):
        pass
    raise argparse.ArgumentTypeError(f"must be a part of the range of pixels, above 0 and up to 1, got {text!r}")


def publish_checkpoint(arguments: argparse.Namespace) -> None:
    settings = {"private": arguments.private, "revision": arguments.revision, "dry_run": arguments.dry_run}
    commit = publish(arguments.name, arguments.repo_id, **settings)
    if commit is None:
        print(f"{arguments.name} is fit to be published")
    else:
        print(f"{arguments.repo_id} has it; to load it: zoo.load({arguments.repo_id!r}, revision={commit!r})")


def checkpoint_name(text: str) -> str:
    """Read a checkpoint's name from the command line."""
    if not re.fullmatch(r"[\w.-]+", text):
        raise argparse.ArgumentTypeError(
            f"a name has letters, digits, '.', '-' and '_' alone (--to names the folder it is put into), got {text!r}"
        )
    return text


def positive(kind: type[float]) -> Callable[[str], float]:
    """Return a function that reads a positive number of that kind from the command line."""

    def read(text: str) -> float:
        try:
            if (value := kind(text)) > 0:
                return value
        except ValueError:
            pass
        raise argparse.ArgumentTypeError(f"must be a {'whole ' * (kind is int)}number above 0, got {text!r}")

    return read


def add_device(command: argparse.ArgumentParser) -> None:
    command.add_argument("--device", default="auto", help="auto, cpu or cuda (default: %(default)s)")
    command.add_argument(
        "--compile",
        action=argparse.BooleanOptionalAction,
        help="use torch.compile, which is the default on a GPU; a CPU that has bfloat16 then uses that too, as a GPU "
        "always does",
    )


def train_all(arguments: argparse.Namespace) -> None:
    device = Device.choose(arguments.device, arguments.compile)
    settings = {"minutes": arguments.minutes, "epochs": arguments.epochs, "to": arguments.to}
    with telling_how_to_go_on():
        all_well = train_zoo(arguments.only, device=device, **settings)
    sys.exit(int(not all_well))


def train_table(arguments: argparse.Namespace) -> None:
    table = read_table(arguments.name)
    device = Device.choose(arguments.device, arguments.compile)
    with telling_how_to_go_on():
        complete = run_table(
            table, arguments.scale, device=device, minutes=arguments.minutes, results=arguments.results
        )
    if complete:
        print(f"every cell is trained: {os.path.relpath(result_path(table.name, arguments.scale, arguments.results))}")
    sys.exit(int(not complete))


@contextlib.contextmanager
def telling_how_to_go_on() -> Iterator[None]:
    try:
        yield
    except (KeyboardInterrupt, SystemExit) as error:
        if stop_status(error):
            print("\nstopped; the same command goes on from what was saved", flush=True)
        raise


def write_pages(arguments: argparse.Namespace) -> None:
    for path in write_reports():
        print(f"written: {os.path.relpath(path)}")


def demo(arguments: argparse.Namespace) -> None:
    model = torch.hub.load(str(ROOT), "checkpoint", arguments.folder, source="local")
    held, wanted = ((kind.in_chans, kind.input_size, list(kind.class_names)) for kind in (model.spec, Digits))
    if held != wanted:
        raise ValueError(
            f"demo classifies scikit-learn's digits, grey and 8×8; {arguments.folder} takes {held[0]} channels and "
            f"{held[1]}×{held[1]} pixels, and knows {len(held[2])} classes. For images of its own kind: "
            f"python train.py predict --model.init_from {arguments.folder} --data.predict FOLDER"
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


if __name__ == "__main__":
    main()
