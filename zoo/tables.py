"""The paper's experiments: tables of recipes (``configs/tables``), trained cell by cell, and what was measured."""

import copy
import dataclasses
import json
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

import zoo
from operators.lookup import look_up
from zoo.export import trained_model
from zoo.measures import MEASURES, sample_features
from zoo.training import CONFIGS, LEAST_SECONDS, Device, Trained, train

TABLES = CONFIGS / "tables"
RESULTS = CONFIGS.parent / "results" / "tables"
WORK = Path("outputs/tables")

# A network that names the class hardly more often than by chance has not converged.
TIMES_CHANCE = 1.5


@dataclasses.dataclass(frozen=True)
class Cell:
    """One training of a table: its place, its seed and its recipe."""

    row: str
    column: str
    seed: int
    recipe: dict[str, Any]

    @property
    def name(self) -> str:
        place = f"{self.row} {self.column}".strip()
        return f"{place.replace(', ', ' ').replace(' ', '_')}_seed{self.seed}"


@dataclasses.dataclass(frozen=True)
class Table:
    """An experiment of ``configs/tables``.

    Attributes:
        title: what stands above the table.
        metrics: names of :data:`zoo.measures.MEASURES`, the first of them the one that the paper has.
        rows, columns: their names in order; each is a part of the recipe.
        paper: the paper's number of a (row, column); a string where it has none, as "N/C".
        paper_data: what the paper's numbers were measured on.
    """

    name: str
    title: str
    metrics: tuple[str, ...]
    rows: tuple[str, ...]
    columns: tuple[str, ...]
    paper: Mapping[tuple[str, str], float | str]
    paper_data: str | None
    definition: Mapping[str, Any]

    def cells(self, scale: str) -> list[Cell]:
        """Return the trainings of a scale, every cell with the first seed before any with the second.

        Raises:
            ValueError: an unknown scale.
        """
        chosen = look_up(self.definition["scales"], scale, "scale")
        cells = []
        for seed in chosen["seeds"]:
            for row, settings in self.definition["rows"].items():
                for column in settings.get("columns", self.columns):
                    recipe = merged(
                        {"seed_everything": seed},
                        self.definition["recipe"],
                        chosen.get("recipe", {}),
                        self.definition["columns"][column],
                        settings["recipe"],
                    )
                    cells.append(Cell(row, column, seed, recipe))
        return cells


def list_tables() -> list[str]:
    """Return the names of the tables."""
    return sorted(path.stem for path in TABLES.glob("*.yaml"))


def read_table(name: str) -> Table:
    """Return the table of that name.

    Raises:
        ValueError: no such table.
    """
    path = look_up({known: TABLES / f"{known}.yaml" for known in list_tables()}, name, "table")
    definition = yaml.safe_load(path.read_text(encoding="utf-8"))
    rows, columns = definition["rows"], definition["columns"]
    paper = {(row, column): value for row in rows for column, value in rows[row].get("paper", {}).items()}
    return Table(
        name,
        definition["title"],
        tuple(definition["metrics"]),
        tuple(rows),
        tuple(columns),
        paper,
        definition.get("paper"),
        definition,
    )


def merged(*recipes: Mapping[str, Any]) -> dict[str, Any]:
    """Return recipes laid over one another: mappings are joined, anything else is replaced by what comes later."""
    result: dict[str, Any] = {}
    for recipe in recipes:
        for key, value in recipe.items():
            both = isinstance(value, Mapping) and isinstance(result.get(key), Mapping)
            result[key] = merged(result[key], value) if both else copy.deepcopy(value)
    return result


def result_path(name: str, scale: str, results: Path = RESULTS) -> Path:
    return results / f"{name}_{scale}.json"


def read_results(path: Path) -> list[dict[str, Any]]:
    """Return what was measured, one mapping a cell; nothing if there is no such file."""
    return json.loads(path.read_text(encoding="utf-8"))["cells"] if path.is_file() else []


def run_table(
    table: Table, scale: str, *, device: Device, minutes: float = float("inf"), results: Path = RESULTS
) -> bool:
    """Train every cell that has no result of its recipe, write each result as it comes; return whether all are there.

    Args:
        minutes: how long it may take; what is unfinished then goes on in the next call.
        results: the folder of the result's file.

    Raises:
        ValueError, OSError: an unknown scale, or a recipe that cannot be trained, e.g. for want of its images.
    """
    deadline = time.monotonic() + 60 * minutes
    path, data = result_path(table.name, scale, results), None
    cells = table.cells(scale)
    done = {(result["row"], result["column"], result["seed"]): result for result in read_results(path)}
    for cell in cells:
        place = (cell.row, cell.column, cell.seed)
        if place in done and done[place]["recipe"] == cell.recipe:
            continue
        if deadline - time.monotonic() < LEAST_SECONDS:
            print(f"{cell.name}: no time left; it is trained in the next call")
            return False
        trained = train(_recipe_file(table, scale, cell), device, deadline=deadline, data=data)
        data = trained.data
        if not (trained.finished or trained.stopped):
            print(f"{cell.name}: goes on in the next call")
            return False
        done[place] = result = _result(table, scale, cell, trained)
        numbers = [f"{name} {result[name]:.2f}" for name in table.metrics if result[name] is not None]
        print(f"{cell.name}: {', '.join(numbers)}{'' if result['converged'] else ' N/C'}", flush=True)
        _write(path, table, scale, [done[key] for key in _places(cells) if key in done])
    return True


def _places(cells: list[Cell]) -> list[tuple[str, str, int]]:
    return [(cell.row, cell.column, cell.seed) for cell in cells]


def _recipe_file(table: Table, scale: str, cell: Cell) -> Path:
    """Write a cell's recipe where it is trained; another recipe than before starts afresh."""
    folder = WORK / table.name / scale / cell.name
    path = folder / f"{cell.name}.yaml"
    text = yaml.safe_dump(cell.recipe, sort_keys=False, allow_unicode=True)
    if folder.is_dir() and not (path.is_file() and path.read_text(encoding="utf-8") == text):
        shutil.rmtree(folder)
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def _result(table: Table, scale: str, cell: Cell, trained: Trained) -> dict[str, Any]:
    """Measure a network on the test images and return everything that the table, its plot and a doubter need."""
    result: dict[str, Any] = {"row": cell.row, "column": cell.column, "seed": cell.seed}
    result |= dict.fromkeys(table.metrics)
    result |= {"converged": False, "stopped": trained.stopped}
    if trained.finished:
        model, record = trained_model(trained.checkpoint)
        batches = list(trained.data.evaluation_batches("test"))
        result |= {name: MEASURES[name].measure(model, batches) for name in table.metrics}
        chance = 1 / len(model.class_names)
        result["converged"] = zoo.accuracy(model, batches)[0] > TIMES_CHANCE * chance
        result["test_images"] = sum(len(labels) for _, labels in batches)
        result["data"] = trained.data.title
        result |= {name: record["training"][name] for name in ("hardware", "torch", "commit")}
        if "spread" in table.metrics:
            result["features"] = sample_features(model, batches)
    result["epochs"] = trained.epochs
    result["images_per_epoch"] = trained.images_per_epoch
    result["minutes"] = round(sum(epoch["seconds"] for epoch in trained.epochs) / 60, 2)
    result["command"] = f"python -m zoo table {table.name} --scale {scale}"
    result["recipe"] = cell.recipe
    return result


def _write(path: Path, table: Table, scale: str, cells: list[dict[str, Any]]) -> None:
    """Write the results, one line a cell, whole or not at all."""
    lines = ",\n".join(json.dumps(cell, ensure_ascii=False, allow_nan=False) for cell in cells)
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(path.name + ".part")
    header = json.dumps({"table": table.name, "scale": scale}, ensure_ascii=False)[:-1]
    draft.write_text(f'{header}, "cells": [\n{lines}\n]}}\n', encoding="utf-8")
    draft.replace(path)
