"""The command that makes a decoupled checkpoint folder from a trained plain network."""

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import zoo
from operators import OperatorConfig
from operators.selection import Selection
from zoo.checkpoints.saving import check_absent
from zoo.checkpoints.starting_points import licence_of, start_from, wordnet_ids
from zoo.commands.arguments import Commands, add_new_folder, checkpoint_name, positive
from zoo.data.augmentation import to_float
from zoo.data.image_files import find_images, read_files
from zoo.models.conversion import convert as convert_model
from zoo.models.image_model import ImageModel
from zoo.models.names import check_name, operator_in
from zoo.models.spec import PLAIN, composed
from zoo.provenance import command_of, origin, portable, program
from zoo.statistics import evenly_spaced, interval
from zoo.training.recovery import (
    CALIBRATION_IMAGES,
    DISTILLATION_IMAGES,
    calibrated,
    distilled,
    teacher_of,
)

# Accuracy is measured on so many images, and on others than the network was fitted to if there are as many as this.
MEASURED_IMAGES, WORTH_MEASURING = 500, 50
BATCH = 32


def add_commands(commands: Commands) -> None:
    """Add the command and what it takes."""
    command = commands.add_parser("convert", help="make a decoupled checkpoint folder from a trained plain network")
    command.description = (
        "Convert a trained plain network, fit it to images, save it as a checkpoint folder, and show what it has kept."
    )
    command.add_argument("source", help="timm:NAME, a checkpoint of the zoo, a folder, or a Hub repository")
    command.add_argument(
        "name", type=checkpoint_name, help="<data>_<architecture>_<operator>, e.g. imagenet_resnet50_tanh_cosine"
    )
    command.add_argument(
        "--operator", help="the operator, weighted by the filters' norms, or conv; by default that in NAME"
    )
    command.add_argument("--weights", type=Path, help="a file (.safetensors, .pth) with the weights of timm:NAME")
    command.add_argument("--classes", type=Path, help="a text file with the name of each class, one a line")
    _add_selection(command)
    _add_recovery(command)
    command.add_argument("--licence", help="of the weights; by default that of the source, if it is known")
    command.add_argument("--verbose", action="store_true", help="show every layer")
    add_new_folder(command)
    command.set_defaults(function=convert)


def _add_selection(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--depthwise", action="store_true", help="decouple depthwise convolutions, too, which stay plain by default"
    )
    command.add_argument(
        "--keep",
        nargs="+",
        default=(),
        metavar="LAYER",
        help="names of convolutions, or of modules that hold some, that stay plain, e.g. conv_stem 'blocks.0.*'",
    )


def _add_recovery(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--images",
        type=Path,
        help="a file or folder of images to fit the network to; the accuracy is told if they lie in class folders",
    )
    command.add_argument(
        "--quantile", type=float, help="of the norms that becomes each radius; by default one is searched for"
    )
    command.add_argument(
        "--least-beyond",
        type=float,
        help="share of patches whose norm stays larger than a radius that is searched for; 0.001 by default",
    )
    command.add_argument(
        "--distil",
        type=positive(int),
        metavar="EPOCHS",
        help="let the network learn from the plain one, without labels, for so many epochs (100 are usual)",
    )
    command.add_argument("--teacher", help="another trained network to learn from, with the same classes")


@dataclasses.dataclass(frozen=True)
class Images:
    """Images of a folder: those the network is fitted to, and, with labels, those its accuracy is measured on."""

    fitted: Tensor
    measured: tuple[Tensor, Tensor] | None
    others: bool

    @classmethod
    def of(cls, path: Path, most: int, model: ImageModel) -> "Images":
        """Read up to ``most`` images, evenly spaced, to fit a model to, and others if there are enough."""
        files = find_images(path)
        # One in five stays to be measured on, if there are enough.
        if labels_of(files, model.class_names) is not None and len(files) >= 5 * WORTH_MEASURING:
            most = min(most, len(files) - len(files) // 5)
        places = evenly_spaced(most, len(files))
        chosen = [files[place] for place in places]
        rest = [file for place, file in enumerate(files) if place not in set(places)]
        pixels, chosen = read_files(chosen, model.transform)
        fitted = to_float(pixels)
        labels = labels_of(chosen, model.class_names)
        if labels is None:
            return cls(fitted, None, False)
        if len(rest) < WORTH_MEASURING or labels_of(rest, model.class_names) is None:
            return cls(fitted, (fitted, labels), False)
        pixels, rest = read_files([rest[place] for place in evenly_spaced(MEASURED_IMAGES, len(rest))], model.transform)
        return cls(fitted, (to_float(pixels), labels_of(rest, model.class_names)), True)

    def show_accuracy(self, what: str, model: ImageModel) -> None:
        """Print the accuracy of a model, with its interval; nothing if the images have no labels."""
        if self.measured is not None:
            images, labels = self.measured
            share, count = zoo.accuracy(model, zip(images.split(BATCH), labels.split(BATCH), strict=True))
            low, high = interval(share, count)
            which = "not fitted to" if self.others else "fitted to"
            print(f"{what}: accuracy {share:.1%} ({low:.1%} to {high:.1%}) on {count} images that it is {which}")


def labels_of(files: Sequence[Path], class_names: Sequence[str]) -> Tensor | None:
    """Return the labels of files that lie in folders called like classes; None unless all do."""
    labels = {name: label for label, name in enumerate(class_names)}
    labels |= {identifier: label for label, identifier in enumerate(wordnet_ids(class_names))}
    found = [labels.get(composed(file.parent.name)) for file in files]
    return None if None in found else torch.tensor(found)


def convert(
    source: str,
    name: str,
    *,
    to: Path,
    operator: str | None = None,
    weights: Path | None = None,
    classes: Path | None = None,
    depthwise: bool = False,
    keep: Sequence[str] = (),
    images: Path | None = None,
    quantile: float | None = None,
    least_beyond: float | None = None,
    distil: int | None = None,
    teacher: str | None = None,
    licence: str | None = None,
    verbose: bool = False,
    overwrite: bool = False,
) -> None:
    """Convert a trained plain network, save it as a checkpoint folder, ``to / name``, and show the report."""
    folder = to / name
    # This is looked at before the weights are fetched, which can take minutes.
    check_absent(folder, overwrite)
    _check_recovery(images=images, quantile=quantile, least_beyond=least_beyond, distil=distil, teacher=teacher)
    model = start_from(source, weights=weights)
    architecture = model.spec.architecture
    operator = operator or operator_in(name, architecture)
    # What is misspelt is told before images are read.
    if operator not in (None, PLAIN):
        OperatorConfig.parse(operator)
    check_name(name, architecture, operator or "<operator>")
    if operator != PLAIN:
        Selection(model.network, None, depthwise, keep)
    elif images or depthwise or keep:
        raise ValueError("a plain network is not converted: leave out --depthwise, --keep and --images")
    if classes:
        model.rename_classes(_read_classes(classes, len(model.class_names)))
    work = to / f".{name}.distillation.ckpt"
    if operator != PLAIN:
        most = DISTILLATION_IMAGES if distil else CALIBRATION_IMAGES
        given = Images.of(images, most, model) if images else None
        learnt_from = teacher_of(model, teacher) if distil else None
        if given:
            given.show_accuracy("plain", model)
        report = convert_model(model, operator, depthwise=depthwise, keep=keep)
        print(report if verbose else report.summary())
        if given:
            _calibrate(model, given, quantile, least_beyond, verbose)
        else:
            print("not calibrated (--images), so train it before use")
        if learnt_from:
            print(distilled(model, learnt_from, given.fitted, distil, work=work))
            given.show_accuracy("distilled", model)
    # Nothing is known of weights in a file.
    licence = licence or ("not stated" if weights else licence_of(source))
    zoo.save(model, folder, training=_history(source), licence=licence, overwrite=overwrite)
    work.unlink(missing_ok=True)
    print(f"written: {folder}")


def _calibrate(
    model: ImageModel, given: Images, quantile: float | None, least_beyond: float | None, verbose: bool
) -> None:
    """Calibrate a model on some of the images, and show what it keeps."""
    images = given.fitted[evenly_spaced(CALIBRATION_IMAGES, len(given.fitted))]
    settings = {} if least_beyond is None else {"least_beyond": least_beyond}
    report = calibrated(model, images, "auto" if quantile is None else quantile, **settings)
    print(report if verbose else report.summary())
    given.show_accuracy("calibrated", model)


def _history(source: str) -> dict[str, Any]:
    """Return what a checkpoint records of how it was made."""
    command = command_of(*program("python -m zoo"), *sys.argv[1:])
    return {"converted_from": portable(source), "command": command, **origin(torch.device("cpu"))}


def _check_recovery(**given: Any) -> None:
    """Refuse options that are out of their range, or do nothing without another one or beside it."""
    for option, needed, why in (
        ("quantile", "images", "how the network is fitted to images"),
        ("least_beyond", "images", "how the network is fitted to images"),
        ("distil", "images", "how long the network learns by images"),
        ("teacher", "distil", "whom the network learns from"),
    ):
        if given[option] is not None and given[needed] is None:
            raise ValueError(f"--{option.replace('_', '-')} {given[option]} says {why}, which needs --{needed}")
    if given["quantile"] is not None and not 0 < given["quantile"] <= 1:
        raise ValueError(f"--quantile is a share in (0, 1] of the patches, got {given['quantile']}")
    if given["least_beyond"] is not None and given["quantile"] is not None:
        raise ValueError("--least-beyond bounds radii that are searched for, and --quantile says them; leave one out")


def _read_classes(path: Path, count: int) -> list[str]:
    """Read the names of ``count`` classes, each in a line of its own."""
    try:
        # Windows begins files with a mark that is no part of the first name.
        names = [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines()]
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not in UTF-8 ({error}); save it as UTF-8") from error
    if len(names) != count or not all(names) or len(set(names)) < count:
        raise ValueError(
            f"{path} has {len(names)} lines, {len(set(names) - {''})} of them different names; the network has {count} "
            "classes, each of which needs a name of its own, one a line"
        )
    return names
