"""What stands in docs/robustness.md about the published results."""

from pathlib import Path

from zoo.models.names import is_plain
from zoo.recipes.recipe import CHECKOUT
from zoo.robustness.report import attack_table, check_table, effort_table, headline, name_of, paired_table, paper_table
from zoo.robustness.result import Result

RESULTS = CHECKOUT / "results" / "robustness"

# The docs show the results of each of these families side by side, the plain twin first.
PARTS = ("robustness", "masking", "paired", "paper")
FAMILIES = ("cifar10_resnet20", "digits_cnn6", "mnist_cnn6", "mnist_adversarial_cnn6")


def published_families(results: Path = RESULTS) -> dict[str, list[Result]]:
    """Return the published results of each family that has any, the plain twin's first."""
    return {family: [Result.read(path) for path in paths] for family, paths in family_files(results).items()}


def family_files(folder: Path) -> dict[str, list[Path]]:
    """Return the files of results in a folder by family, if there are any, the plain twin's first."""
    found = {}
    for family in FAMILIES:
        paths = sorted(folder.glob(f"{family}_*.json"), key=lambda path: (not is_plain(path.stem), path.stem))
        if paths:
            found[family] = paths
    return found


def family_blocks() -> dict[str, str]:
    """Return the generated parts of docs/robustness.md by name, those of each family and those of all together."""
    families = published_families()
    blocks = {}
    for family in FAMILIES:
        if not (results := families.get(family)):
            blocks |= dict.fromkeys((f"{part}_{family}" for part in PARTS), "Not measured.")
            continue
        headlines = "\n".join(f"- {headline(result)}" for result in results)
        texts = (
            f"{headlines}\n\n{attack_table(results)}",
            check_table(results),
            paired_table(results),
            paper_table(results),
        )
        blocks |= {f"{part}_{family}": text for part, text in zip(PARTS, texts, strict=True)}
    plain = {family: result for family, results in families.items() for result in results if is_plain(name_of(result))}
    twins = {
        name_of(result): plain[family]
        for family, results in families.items()
        for result in results
        if family in plain and not is_plain(name_of(result))
    }
    blocks["effort"] = effort_table([result for results in families.values() for result in results], twins)
    return blocks
