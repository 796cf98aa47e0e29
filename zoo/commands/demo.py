"""Commands that show: demo, curves."""

from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

import zoo
from zoo.commands.arguments import OUTPUTS, Commands
from zoo.data.digits import Digits
from zoo.recipes.pictures import plot_operators, plot_predictions
from zoo.recipes.recipe import CHECKOUT, is_checkout


def add_commands(commands: Commands) -> None:
    """Add the commands and what they take."""
    command = commands.add_parser("demo", help="load a Digits checkpoint by torch.hub and classify held-out digits")
    command.add_argument("folder", help="a checkpoint folder or name, trained on Digits")
    command.add_argument("--output", type=Path, default=OUTPUTS / "demo.png", help="the picture")
    command.set_defaults(function=demo)

    command = commands.add_parser("curves", help="draw every magnitude and angular function")
    command.add_argument("--output", type=Path, default=OUTPUTS / "operators.png", help="the picture")
    command.set_defaults(function=curves)


def demo(folder: str, *, output: Path) -> None:
    """Classify held-out digits, show ten of them, and draw 24."""
    # Only a checkout has torch.hub's entry points.
    model = torch.hub.load(str(CHECKOUT), "checkpoint", folder, source="local") if is_checkout() else zoo.load(folder)
    held, wanted = ((kind.in_chans, kind.input_size, list(kind.class_names)) for kind in (model.spec, Digits))
    if held != wanted:
        raise ValueError(
            f"demo classifies scikit-learn's digits, grey and 8×8; {folder} takes {held[0]} channels and "
            f"{held[1]}×{held[1]} pixels, and knows {len(held[2])} classes. For images of its own kind: "
            f"python train.py predict --model.init_from {folder} --data.predict FOLDER"
        )
    images, labels = next(iter(Digits().evaluation_batches("test")))
    images, labels = images[:24], labels[:24]
    guesses = [guess for (guess, *_) in model.classify(images, top=1)]
    truth = [model.class_names[label] for label in labels]
    table = Table("image", "is", "predicted", "probability", title="held-out digits")
    for number, (label, (guess, probability)) in enumerate(zip(truth[:10], guesses[:10], strict=True), 1):
        table.add_row(str(number), label, guess, f"{probability:.4f}")
    Console().print(table)
    predicted, probabilities = zip(*guesses, strict=True)
    correct = sum(guess == label for guess, label in zip(predicted, truth, strict=True))
    title = f"{Path(folder).name}: {correct} of {len(images)} held-out digits right"
    plot_predictions(images, truth, predicted, probabilities, model.spec.operator, title, output)
    print(f"picture: {output}")


def curves(*, output: Path) -> None:
    """Draw every magnitude and angular function."""
    plot_operators(output)
    print(f"picture: {output}")
