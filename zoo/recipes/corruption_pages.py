"""What stands in docs/corruptions.md and docs/good_for.md about the published results on corrupted images."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from zoo.models.names import is_plain
from zoo.recipes.recipe import CHECKOUT
from zoo.recipes.robustness_pages import FAMILIES, family_files
from zoo.robustness.corruption_pictures import plot_light
from zoo.robustness.corruption_report import light_table, overview, pairs_table, seeds_table, severities_table
from zoo.robustness.corruption_result import CorruptionResult

RESULTS = CHECKOUT / "results" / "corruptions"
LIGHT_PICTURE = CHECKOUT / "docs" / "bad_light.png"
NOT_MEASURED = "Not measured."


def by_family(folder: Path = RESULTS) -> dict[str, list[CorruptionResult]]:
    """Return the results of the embedded checkpoints, by family, the plain twin's first."""
    return {family: [CorruptionResult.read(path) for path in paths] for family, paths in family_files(folder).items()}


def by_network(folder: Path = RESULTS) -> dict[str, list[CorruptionResult]]:
    """Return the results of networks that were trained with several seeds, by name.

    Those of the published recipes come first, and plain ones before others.
    """
    found: dict[str, list[CorruptionResult]] = {}

    def order(path: Path) -> tuple[bool, bool, str, Path]:
        return not path.stem.startswith(tuple(FAMILIES)), not is_plain(path.stem), path.stem, path.parent

    paths = sorted(folder.glob("seed_*/*.json"), key=order)
    for path in paths:
        found.setdefault(path.stem, []).append(CorruptionResult.read(path))
    return found


def corruption_blocks() -> dict[str, str]:
    """Return the generated parts of the pages by name."""
    families, networks = by_family(), short_names(by_network())
    blocks = {}
    for family in FAMILIES:
        results = families.get(family)
        named = {result.about["checkpoint"].removeprefix(f"{family}_"): [result] for result in results or ()}
        texts = [overview(results), seeds_table(named)] if results else [NOT_MEASURED]
        blocks[f"corruptions_{family}"] = "\n\n".join(texts)
    return blocks | {
        "corruption_seeds": seeds_table(networks),
        "corruption_pairs": pairs_table(networks),
        "corruption_severities": severities_table(networks),
        "bad_light": light_table(networks),
    }


def draw_corruptions() -> list[Path]:
    """Draw the pictures of the pages; return the files."""
    plot_light(short_names(by_network()), LIGHT_PICTURE)
    return [LIGHT_PICTURE]


def short_names(networks: Mapping[str, Sequence[CorruptionResult]]) -> dict[str, Sequence[CorruptionResult]]:
    """Return networks by what tells them apart: the data set and the architecture that all have are left out."""
    names = {name: name.replace("cifar10_", "").replace("resnet20_", "").replace("_cosine", "") for name in networks}
    return {names[name]: results for name, results in networks.items()}
