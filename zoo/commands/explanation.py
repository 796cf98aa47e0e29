"""The command that shows why a network answers as it does: explain."""

import os
from collections.abc import Sequence
from pathlib import Path

import zoo
from zoo.checkpoints.catalogue import list_checkpoints
from zoo.commands.arguments import OUTPUTS, Commands, add_device
from zoo.explanations.picture import draw_explanations, explain_image
from zoo.models.names import is_plain, twin_of
from zoo.training.device import Device

# Stands for the twin that the checkpoint's name tells.
OWN_TWIN = ""


def add_commands(commands: Commands) -> None:
    """Add the command and what it takes."""
    command = commands.add_parser("explain", help="draw what in an image speaks for and against its likeliest classes")
    command.description = (
        "Draw what each pixel contributes to the logit of the likeliest class and of the second likeliest. "
        "Contributions and bias add up to the logit."
    )
    command.add_argument("name", help="the checkpoint: a name, a folder or a Hub repository")
    command.add_argument("images", nargs="+", type=Path, metavar="image", help="an image file")
    command.add_argument(
        "--output", type=Path, default=OUTPUTS / "explanation.png", help="the picture, a .png (default: %(default)s)"
    )
    command.add_argument(
        "--target", metavar="CLASS", help="in place of the second likeliest class: a name, or a number from 0 on"
    )
    command.add_argument(
        "--twin", nargs="?", const=OWN_TWIN, metavar="NAME", help="another network below, by default the plain twin"
    )
    add_device(command)
    command.set_defaults(function=explain)


def explain(
    name: str,
    *,
    images: Sequence[Path],
    output: Path,
    target: str | None = None,
    twin: str | None = None,
    device: str = "auto",
) -> None:
    """Explain images by a network, and by its twin if wanted; print the sums and draw the maps."""
    for path in images:
        if not path.is_file():
            raise FileNotFoundError(f"no image file {path}; check the path")
    if output.suffix.lower() != ".png" or output.is_dir():
        raise ValueError(f"the picture is a file that ends in .png, got {output}")
    device = Device.choose(device, compile=False).name
    models = {name: zoo.load(name, device=device)}
    if twin is not None:
        other = twin or _twin(name, models[name].spec.operator_name)
        models[other] = zoo.load(other, device=device)
        if models[other].class_names != models[name].class_names:
            raise ValueError(f"{other} has other classes than {name}; name a network of the same (--twin NAME)")
    named = models[name].class_names
    if target is not None and target not in named and target.isdecimal() and int(target) < len(named):
        target = named[int(target)]
    rows = []
    for path in images:
        for label, model in models.items():
            image = (model.transform.read(path).float() / 255).to(device)
            rows.append(explain_image(Path(label).name, path.name, model, image, target))
            for guess, logit, pixels, bias in rows[-1].sums():
                said = f"{guess}, logit {logit:.2f} = {pixels:.2f} of the pixels + bias {bias:.2f}"
                print(f"{path} by {rows[-1].network}: {said}")
    draw_explanations(rows, output)
    print(f"picture: {output}")


def _twin(name: str, operator: str) -> str:
    """Return the plain twin of a checkpoint: embedded, or in the folder beside it.

    Raises:
        ValueError: there is none, or the checkpoint is plain itself.
    """
    if is_plain(Path(name).name):
        raise ValueError(f"{name} is plain itself; name the network to compare it with: --twin NAME")
    twin = twin_of(os.path.normpath(name), operator)
    if Path(twin).is_dir() or twin in list_checkpoints():
        return twin
    raise ValueError(f"no plain twin {twin} of {name}; name the network to compare it with: --twin NAME")
