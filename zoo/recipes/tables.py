"""The paper's experiments: tables of recipes (``configs/tables``), trained cell by cell, and what was measured."""

import copy
import dataclasses
import json
import math
import shutil
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml

from operators.lookup import look_up
from zoo.files import write_whole
from zoo.provenance import origin
from zoo.recipes.measures import MEASURES, ModelOutputs
from zoo.recipes.recipe import CHECKOUT, CONFIGS, LEAST_SECONDS, Trained, train
from zoo.training.device import Device
from zoo.training.export import trained_model

TABLES = CONFIGS / "tables"
RESULTS = CHECKOUT / "results" / "tables"
WORK = Path("outputs/tables")

# A network that names the class hardly more often than by chance has not converged.
TIMES_CHANCE = 1.5


@dataclasses.dataclass(frozen=True)
class Cell:
    """One training of a table: its place, its seed and its recipe, and how many test images are attacked then."""

    row: str
    column: str
    seed: int
    recipe: dict[str, Any]
    attacked: int = 1

    @property
    def name(self) -> str:
        place = f"{self.row} {self.column}".strip()
        return f"{place.replace(', ', ' ').replace(' ', '_')}_seed{self.seed}"


@dataclasses.dataclass(frozen=True)
class Table:
    """An experiment of ``configs/tables``.

    Attributes:
        metrics: names of :data:`zoo.recipes.measures.MEASURES`.
        rows, columns: their names in order; each is a part of the recipe.
        paper: the paper's numbers of a (row, column), those of the first metrics; a string for none, as "N/C".
        paper_data: what the paper's numbers were measured on.
        drawn: which of the metrics the picture shows.
        from_zero: whether its axes begin at 0.
        verdict: what the published results confirm of the paper's and what not, for a reader.
    """

    name: str
    metrics: tuple[str, ...]
    rows: tuple[str, ...]
    columns: tuple[str, ...]
    paper: Mapping[tuple[str, str], Sequence[float | str]]
    paper_data: str | None
    drawn: tuple[str, ...]
    from_zero: bool
    verdict: str
    definition: Mapping[str, Any]

    def of_paper(self, row: str, column: str, metric: str) -> float | str | None:
        """Return the paper's number, or None."""
        return dict(zip(self.metrics, self.paper.get((row, column), ()), strict=False)).get(metric)

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
                    cells.append(Cell(row, column, seed, recipe, chosen.get("attacked_images", 1)))
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
    paper = {place: value if isinstance(value, list) else [value] for place, value in paper.items()}
    return Table(
        name,
        tuple(definition["metrics"]),
        tuple(rows),
        tuple(columns),
        paper,
        definition.get("paper"),
        tuple(definition.get("drawn", definition["metrics"][:1])),
        definition.get("from_zero", False),
        definition["verdict"],
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


def read_results(table: Table, scale: str, results: Path = RESULTS) -> list[dict[str, Any]]:
    """Return what was measured, one mapping a cell, in the table's order; results of other recipes are left out.

    Raises:
        ValueError: an unknown scale, or a file that is no table's.
    """
    path = result_path(table.name, scale, results)
    cells = table.cells(scale)
    if not path.is_file():
        return []
    try:
        found = {_place(result): result for result in json.loads(path.read_text(encoding="utf-8"))["cells"]}
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} holds no results of a table ({error}); remove it, or name another folder") from error
    kept = [(found.get((cell.row, cell.column, cell.seed)), cell.recipe) for cell in cells]
    return [result for result, recipe in kept if result and result["recipe"] == recipe]


def run_table(
    table: Table, scale: str, *, device: Device, minutes: float = float("inf"), results: Path = RESULTS
) -> bool:
    """Train every cell that has no result of its recipe, write each result as it comes; return whether all are there.

    Args:
        minutes: no epoch is begun that would not end in that time; what is unfinished goes on in the next call.
        results: the folder of the result's file.

    Raises:
        ValueError, OSError: an unknown scale, or a recipe that cannot be trained, e.g. for want of its images.
    """
    deadline = time.monotonic() + 60 * minutes
    path, data = result_path(table.name, scale, results), None
    path.parent.mkdir(parents=True, exist_ok=True)
    done = read_results(table, scale, results)
    if done:
        # The cells of a table are compared.
        device = dataclasses.replace(device, precision=done[-1]["precision"], why="as the cells before")
    print(f"training {device}", flush=True)
    for cell in table.cells(scale):
        if (cell.row, cell.column, cell.seed) in map(_place, done):
            continue
        if deadline - time.monotonic() < LEAST_SECONDS:
            print(f"{cell.name}: no time left; it is trained in the next call")
            return False
        folder = WORK / table.name / scale / cell.name
        recipe = folder.with_suffix(".yaml")
        recipe.parent.mkdir(parents=True, exist_ok=True)
        write_whole(recipe, yaml.safe_dump(cell.recipe, sort_keys=False, allow_unicode=True))
        trained = train(recipe, device, folder=folder, deadline=deadline, data=data)
        data = trained.data or data
        if not (trained.finished or trained.stopped):
            print(f"{cell.name}: goes on in the next call")
            return False
        result = measured(table, cell, trained, device)
        result["command"] = f"python -m zoo table {table.name} --scale {scale}"
        done.append(result)
        numbers = [f"{name} {result[name]:.2f}" for name in table.metrics if result[name] is not None]
        print(f"{cell.name}: {', '.join(numbers)}{'' if result['converged'] else ' N/C'}", flush=True)
        # One line a cell.
        lines = ",\n".join(json.dumps(one, ensure_ascii=False, allow_nan=False) for one in done)
        write_whole(path, f'{{"table": "{table.name}", "scale": "{scale}", "cells": [\n{lines}\n]}}\n')
        shutil.rmtree(folder)
    return True


def measured(table: Table, cell: Cell, trained: Trained, device: Device) -> dict[str, Any]:
    """Measure a network on the test images and return everything that the table, its plot and a doubter need."""
    result: dict[str, Any] = {"row": cell.row, "column": cell.column, "seed": cell.seed}
    data = trained.images()
    result |= dict.fromkeys((*table.metrics, "test_images"))
    result |= {"converged": False, "stopped": trained.stopped, "data": data.title}
    result |= {"precision": trained.precision, "compiled": device.compile, **origin(torch.device(device.name))}
    if trained.finished:
        model, record = trained_model(trained.checkpoint)
        attacked = data.evenly_spaced("test", cell.attacked)
        outputs = ModelOutputs.collect(model.to(device.name), data.evaluation_batches("test"), attacked)
        numbers = {name: MEASURES[name].of(outputs) for name in table.metrics}
        result |= {name: value if math.isfinite(value) else None for name, value in numbers.items()}
        chance = 100 / len(model.class_names)
        result["converged"] = 100 - outputs.error() > TIMES_CHANCE * chance and all(
            map(math.isfinite, numbers.values())
        )
        result |= {"test_images": len(outputs.labels)}
        result |= {name: record.training[name] for name in ("hardware", "torch", "commit")}
        if "spread" in table.metrics and result["converged"]:
            result["features"] = outputs.drawn_features()
    result["epochs"] = [
        {name: value if math.isfinite(value) else None for name, value in epoch.items()} for epoch in trained.epochs
    ]
    result["images_per_epoch"] = trained.images_per_epoch
    result["minutes"] = round(sum(epoch["seconds"] for epoch in trained.epochs) / 60, 2)
    result["recipe"] = cell.recipe
    return result


def _place(result: Mapping[str, Any]) -> tuple[str, str, int]:
    return result["row"], result["column"], result["seed"]
