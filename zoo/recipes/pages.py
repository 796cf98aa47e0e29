"""What stands in README and docs about trained networks, generated from checkpoint folders and ``results/tables``."""

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import zoo
from zoo.checkpoints.catalogue import PRETRAINED
from zoo.checkpoints.config import headline, read_config
from zoo.files import write_whole
from zoo.hub.repository import WEIGHTS
from zoo.markdown import filled, markdown_table
from zoo.models.spec import PLAIN
from zoo.recipes.corruption_pages import corruption_blocks, draw_corruptions
from zoo.recipes.measures import MEASURES
from zoo.recipes.pictures import plot_features, plot_table
from zoo.recipes.recipe import CHECKOUT, recipes
from zoo.recipes.robustness_pages import family_blocks, published_families
from zoo.recipes.tables import RESULTS, Table, list_tables, read_results, read_table
from zoo.robustness.pictures import draw as draw_robustness
from zoo.statistics import interval

README, PAGE = CHECKOUT / "README.md", CHECKOUT / "docs" / "results.md"
ROBUSTNESS_PAGE = CHECKOUT / "docs" / "robustness.md"
PAGES = (README, PAGE, ROBUSTNESS_PAGE, CHECKOUT / "docs" / "corruptions.md", CHECKOUT / "docs" / "good_for.md")

# The tiny scale only shows that a table can be trained.
SHOWN = ("full", "small")
NOT_CONVERGED = "N/C"
NOT_TRAINED = "–"

Results = Sequence[Mapping[str, Any]]


def write_reports() -> list[Path]:
    """Write the generated parts of README.md and of the pages in docs/, and pictures; return all."""
    pictures = draw_corruptions()
    for name in list_tables():
        table = read_table(name)
        results = shown_results(table)[1]
        if any(result["converged"] for result in results):
            pictures.append(CHECKOUT / "docs" / f"{name}.png")
            draw(table, results, pictures[-1])
    for family, results in published_families().items():
        pictures += draw_robustness(results, CHECKOUT / "docs" / f"robustness_{family}")
    blocks = report_blocks()
    for path in PAGES:
        write_whole(path, filled(path.read_text(encoding="utf-8"), blocks))
    return [*PAGES, *pictures]


def report_blocks() -> dict[str, str]:
    """Return the generated parts by name: "zoo", and each table with what its numbers are and confirm."""
    blocks = {"zoo": zoo_table()}
    for name in list_tables():
        table = read_table(name)
        scale, results = shown_results(table)
        blocks[name] = "\n\n".join([table_markdown(table, results), provenance(table, scale, results), table.verdict])
    return blocks | family_blocks() | corruption_blocks()


def zoo_table() -> str:
    """Return the table of the embedded checkpoints in Markdown, each plain twin above the others of its family."""
    header = ("checkpoint", "data", "test accuracy, %", "95 % interval", "images", "parameters")
    header += ("images/s, eager", "compiled", "MiB", "recipe")
    rows = []
    embedded = zoo.list_checkpoints()
    for name in (path.stem for path in recipes() if path.stem in embedded):
        folder = PRETRAINED / name
        config = read_config(folder)
        metric = headline(config)
        low, high = interval(metric["value"], metric["images"])
        epochs = config["training"]["epochs"]
        rows.append(
            (
                name,
                metric["dataset"],
                f"{100 * metric['value']:.2f}",
                f"{100 * low:.2f}–{100 * high:.2f}",
                f"{metric['images']:,}",
                f"{config['parameters']:,}",
                *_speed(config),
                f"{(folder / WEIGHTS).stat().st_size / 2**20:.1f}",
                f"[{epochs} epoch{'s' * (epochs > 1)}](configs/{name}.yaml)",
            )
        )
    return markdown_table(header, rows)


def shown_results(table: Table, results: Path = RESULTS) -> tuple[str, list[dict[str, Any]]]:
    """Return the larger scale of which all cells are trained, or that of which most are, and its results."""
    found = {scale: read_results(table, scale, results) for scale in SHOWN}
    best = max(SHOWN, key=lambda scale: len(found[scale]) / len(table.cells(scale)))
    return best, found[best]


def table_markdown(table: Table, results: Results) -> str:
    """Return a table in Markdown, our numbers with the paper's in brackets."""
    header = ["", *(_header(table, column, metric) for column in table.columns for metric in table.metrics)]
    rows = []
    for row in table.rows:
        cells = []
        for column in table.columns:
            for metric in table.metrics:
                ours = cell_text(results, row, column, metric)
                paper = table.of_paper(row, column, metric)
                number = f"{paper:.2f}" if isinstance(paper, float) else paper
                cells.append(ours if paper is None else f"{ours} ({number})")
        rows.append([row, *cells])
    return markdown_table(header, rows)


def cell_text(results: Results, row: str, column: str, metric: str) -> str:
    """Return the mean over seeds, with the standard deviation if there are several; "N/C" if any has not converged."""
    found = [result for result in results if (result["row"], result["column"]) == (row, column)]
    if not found:
        return NOT_TRAINED
    if not all(result["converged"] for result in found):
        return NOT_CONVERGED
    values = [result[metric] for result in found]
    deviation = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.2f}{deviation}"


def provenance(table: Table, scale: str, results: Results) -> str:
    """Return in a sentence or two what a table's numbers are and where they come from."""
    measures = "; ".join(MEASURES[metric].title for metric in table.metrics)
    paper = f", in brackets the paper's on {table.paper_data}" if table.paper_data else ""
    what = f"{measures[0].upper()}{measures[1:]}{paper}."
    if not results:
        return f"{what} Not trained here."

    def distinct(values: Iterable[str]) -> str:
        return ", ".join(dict.fromkeys(values))

    # Networks stopped by a gradient that is not finite have neither all epochs nor a test.
    finished = [result for result in results if result["test_images"]]
    networks = distinct(_network(result["recipe"]) for result in results)
    lengths = [f"{len(result['epochs'])} epochs of {result['images_per_epoch']:,} images" for result in finished]
    attacked = max(cell.attacked for cell in table.cells(scale))
    within = "" if "effort" in table.metrics else ", at ε = 8/255"
    of_these = f" ({attacked} of them attacked{within})" if attacked > 1 else ""
    tested = [f"{result['data']}, {result['test_images']:,} test images{of_these}" for result in finished]
    machines = distinct(f"{result['hardware']}, {result['precision']}" for result in results)
    seeds = len({result["seed"] for result in results})
    longest = max(result["minutes"] for result in results)
    return (
        f"{what} Here: {distinct(tested) or distinct(result['data'] for result in results)}; scale `{scale}`: "
        f"{networks}; {distinct(lengths) or 'no network finished'}; {seeds} seed{'s' * (seeds > 1)}; {machines}; "
        f"at most {longest:.1f} minutes of training a cell (`python -m zoo table {table.name} --scale {scale}`)."
    )


def draw(table: Table, results: Results, path: Path) -> None:
    """Write the picture of a table: its features if they were measured, else its numbers beside the paper's."""
    if "spread" in table.metrics:
        drawn = [result for result in results if result["seed"] == 0 and result["converged"]]
        titles = [f"{result['row']}\nerror {result['error']:.2f} %, spread {result['spread']:.2f}" for result in drawn]
        plot_features(dict(zip(titles, (result["features"] for result in drawn), strict=True)), path)
        return
    data = ", ".join(dict.fromkeys(result["data"] for result in results if result["data"]))
    panels = {}
    for metric in table.drawn:
        ours: dict[tuple[str, str], list[float]] = {}
        for result in results:
            value = result[metric] if result["converged"] else math.nan
            ours.setdefault((result["row"], result["column"]), []).append(value)
        told = {place: table.of_paper(*place, metric) for place in table.paper}
        paper = {place: [value if isinstance(value, float) else math.nan] for place, value in told.items()}
        panels[f"{MEASURES[metric].title}\nhere: {data}"] = ours
        if paper:
            panels[f"{MEASURES[metric].title}\nthe paper: {table.paper_data}"] = paper
    plot_table(table.rows, table.columns, panels, path, table.from_zero)


def _network(recipe: Mapping[str, Any]) -> str:
    model = recipe["model"]
    widths = model.get("architecture_args", {}).get("widths")
    return model["architecture"] + (f" with {'-'.join(map(str, widths))} filters" if widths else "")


def _header(table: Table, column: str, metric: str) -> str:
    return column if len(table.metrics) == 1 else f"{column} {MEASURES[metric].title}".strip()


def _speed(config: Mapping[str, Any]) -> tuple[str, str]:
    """Return images a second of the twin, and of others how many times the twin's, eager and compiled."""
    speed = config.get("speed")
    if speed is None:
        return NOT_TRAINED, NOT_TRAINED
    if config["operator"] == PLAIN:
        return tuple(f"{speed[f'{mode}_images_per_second']:,.0f}" for mode in ("eager", "compiled"))
    return tuple(f"× {speed[f'{mode}_ratio']:.2f}" for mode in ("eager", "compiled"))
