"""The paper's tables: their cells are what they say, train at the tiny scale, and are reported as measured."""

import json
import math
import types
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import nn

import zoo
from operators import OperatorConfig
from zoo.data import Digits
from zoo.markdown import markdown_table
from zoo.models.spec import ModelSpec
from zoo.recipes import pages as reports
from zoo.recipes import tables
from zoo.recipes.measures import ModelOutputs
from zoo.recipes.recipe import Trained
from zoo.recipes.tables import list_tables, measured, merged, read_results, read_table, result_path, run_table
from zoo.robustness.probes import PROBES, shortest
from zoo.statistics import interval
from zoo.training.device import Device

CPU = Device("cpu", compile=False)
PAPER_ROWS = {
    "no_batchnorm": {
        "convolution": [None, 35.30, None],
        "LinearConv": [33.39, 31.76, "N/C"],
        "TanhConv": [32.88, 31.88, 34.26],
        "SegConv": [34.69, 30.34, "N/C"],
    },
    "no_relu": {
        "convolution": [58.24, 26.01, None, None],
        "SphereConv": [33.31, 25.90, 26.00, 26.97],
        "BallConv": [31.81, 25.43, 25.18, 26.48],
        "TanhConv": [32.27, 25.27, 25.15, 26.94],
        "LinearConv": [36.49, 24.36, 24.81, 25.14],
        "SegConv": [33.57, 24.29, 24.96, 25.04],
        "LogConv": [33.62, 24.91, 25.17, 25.85],
        "MixConv": [33.46, 24.93, 25.27, 25.77],
    },
    "imagenet": {
        "standard": [12.63, 12.68, 11.99, 12.47],
        "modified": [12.10, 11.55, 11.50, 11.10],
        "modified, no BatchNorm": ["N/C", 13.30, "N/C", 12.79],
    },
    "robustness": {
        "convolution": [85.35, 83.70],
        "SphereConv": [88.58, 87.41],
        "BallConv": [91.13, 87.47],
        "TanhConv": [91.45, 87.54],
    },
}


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("name", PAPER_ROWS)
def test_the_papers_numbers_are_the_papers(name):
    table = read_table(name)
    for row, numbers in PAPER_ROWS[name].items():
        assert [table.of_paper(row, column, table.metrics[0]) for column in table.columns] == numbers
    assert set(PAPER_ROWS[name]) == set(table.rows)


@pytest.mark.parametrize("name", list_tables())
@pytest.mark.parametrize("scale", ["tiny", "small", "full"])
def test_a_cell_is_its_row_and_column_and_nothing_else_differs(name, scale):
    table = read_table(name)
    cells = table.cells(scale)
    assert {(cell.row, cell.column) for cell in cells} >= set(table.paper)
    assert len({json.dumps(cell.recipe) for cell in cells}) == len(cells) == len({cell.name for cell in cells})
    rest = set()
    for cell in cells:
        recipe = json.loads(json.dumps(cell.recipe))
        model, arguments = recipe["model"], recipe["model"].setdefault("architecture_args", {})
        operator = model.pop("operator")
        kind = cell.column if name == "imagenet" else cell.row
        if kind == "convolution":
            assert operator == "conv"
        else:
            operator = OperatorConfig.parse(operator)
            assert operator.magnitude == kind.removesuffix("Conv").lower()
            angular = cell.column.split(",")[0].replace(" ", "_")
            assert operator.angular == (angular if name in ("no_batchnorm", "no_relu") else "cosine")
        if name == "no_relu":
            assert arguments.pop("relu") == ("no ReLU" not in cell.column)
        if name == "imagenet":
            assert model.pop("architecture") == ("resnet18" if cell.row == "standard" else "resnet18_modified")
            assert arguments.pop("batch_norm", True) == ("no BatchNorm" not in cell.row)
        if name == "robustness":
            attacks = model.pop("adversarial", None)
            assert (attacks is None) == (cell.column == "natural") and (attacks or {"attack": "fgsm"})[
                "attack"
            ] == "fgsm"
        if name == "no_batchnorm":
            assert model["architecture"] == "cnn9_no_batchnorm"
        assert recipe.pop("seed_everything") == cell.seed
        rest.add(json.dumps(recipe, sort_keys=True))
    assert len(rest) == 1


@pytest.mark.parametrize("name", list_tables())
def test_a_table_trains_at_the_tiny_scale_and_goes_on_where_it_stopped(name, here, monkeypatch, capsys):
    for split in ("train", "val"):
        for label in range(6):
            path = here / "data/imagenet_tiny" / split / str(label)
            path.mkdir(parents=True)
            for index in range(3):
                Image.new("RGB", (40, 32), (40 * label, 80 * index, 0)).save(path / f"{index}.png")
    # A thousand steps are for what is published.
    monkeypatch.setitem(PROBES, "ddn", shortest(lambda attacks: attacks.DDNAttack(steps=20)))
    table = read_table(name)
    # The first, the last and two between: the others differ from these in a name only.
    all_cells = table.cells("tiny")
    chosen = [all_cells[0], *all_cells[1::7][:2], all_cells[-1]]
    monkeypatch.setattr(tables.Table, "cells", lambda self, scale: chosen[:2])
    assert run_table(table, "tiny", device=CPU, results=here)
    first = read_results(table, "tiny", here)
    monkeypatch.setattr(tables.Table, "cells", lambda self, scale: chosen)
    assert not run_table(table, "tiny", device=CPU, minutes=0.01, results=here)
    assert "no time left" in capsys.readouterr().out
    assert run_table(table, "tiny", device=CPU, results=here)
    results = read_results(table, "tiny", here)
    assert results[:2] == first and len(results) == len(chosen)
    for result, cell in zip(results, chosen, strict=True):
        assert result["recipe"] == cell.recipe and result["epochs"][-1]["epoch"] == 1
        assert all(math.isfinite(result[metric]) for metric in table.metrics)
        assert result["test_images"] == (18 if name == "imagenet" else 360)
    # The result of another recipe is none, and its cell is trained again, afresh.
    chosen[0].recipe["model"]["learning_rate"] = 1e-5
    assert read_results(table, "tiny", here) == results[1:]
    assert run_table(table, "tiny", device=CPU, results=here)
    again = read_results(table, "tiny", here)
    assert again[1:] == results[1:] and again[0]["recipe"]["model"]["learning_rate"] == 1e-5


def test_a_cell_that_diverges_is_reported_as_such(here, monkeypatch):
    table = read_table("no_batchnorm")
    (cell,) = [cell for cell in table.cells("tiny") if cell.row == "convolution"]
    cell.recipe["model"].update(optimizer="sgd", learning_rate=1e30, warmup=0.0)
    cell.recipe["trainer"]["limit_train_batches"] = 10
    monkeypatch.setattr(tables.Table, "cells", lambda self, scale: [cell])
    assert run_table(table, "tiny", device=CPU, results=here)
    (one,) = read_results(table, "tiny", here)
    assert one["error"] is None and not one["converged"] and "is not finite" in one["stopped"]
    assert reports.cell_text([one], "convolution", "cosine", "error") == "N/C"
    assert one["commit"] and one["hardware"] and one["torch"] == torch.__version__
    told = reports.provenance(table, "tiny", [one])
    assert "Here: Digits; scale `tiny`: " in told and "no network finished; 1 seed; " in told


@pytest.mark.parametrize("name", list_tables())
def test_a_table_of_which_a_part_is_trained_is_shown_all_the_same(name, tmp_path):
    table = read_table(name)
    cell = table.cells("tiny")[0]
    measured = {metric: 12.5 for metric in table.metrics}
    one = {
        **result(cell.row, cell.column, 0, 12.5),
        **measured,
        "recipe": cell.recipe,
        "features": [[0.0, 1.0, 2]],
        "epochs": [{"epoch": 1}],
        "images_per_epoch": 1000,
        "test_images": 360,
        "data": "Digits",
        "hardware": "2 CPU cores",
        "precision": "32-true",
        "minutes": 0.1,
    }
    reports.draw(table, [one], tmp_path / "one.png")
    assert "12.50" in reports.table_markdown(table, [one]) and (tmp_path / "one.png").stat().st_size
    told = reports.provenance(table, "tiny", [one])
    assert "Digits, 360 test images" in told and "; scale `tiny`: " in told


def test_the_larger_scale_is_shown_once_it_is_complete(tmp_path):
    table = read_table("features_2d")

    def write(scale, count):
        cells = [
            {"row": cell.row, "column": cell.column, "seed": cell.seed, "recipe": cell.recipe}
            for cell in table.cells(scale)[:count]
        ]
        result_path(table.name, scale, tmp_path).write_text(json.dumps({"cells": cells}))

    write("full", 3)
    assert [reports.shown_results(table, tmp_path)[0], len(reports.shown_results(table, tmp_path)[1])] == ["full", 3]
    write("small", 4)
    assert reports.shown_results(table, tmp_path)[0] == "small"
    write("full", 12)
    assert reports.shown_results(table, tmp_path)[0] == "full"


def test_a_file_that_holds_no_results_is_told(tmp_path):
    table = read_table("no_relu")
    result_path(table.name, "tiny", tmp_path).write_text("{")
    with pytest.raises(ValueError, match="no_relu_tiny.json holds no results of a table .*; remove it"):
        read_results(table, "tiny", tmp_path)


def test_merging_joins_mappings_and_replaces_the_rest():
    first = {"model": {"operator": {"magnitude": "tanh"}, "widths": [1, 2]}, "data": "Digits"}
    second = {"model": {"operator": {"angular": "cosine"}, "widths": [3]}, "data": {"class_path": "MNIST"}}
    assert merged(first, second) == {
        "model": {"operator": {"magnitude": "tanh", "angular": "cosine"}, "widths": [3]},
        "data": {"class_path": "MNIST"},
    }
    assert merged(second, {"model": {"operator": "conv"}})["model"]["operator"] == "conv"
    assert first["model"]["operator"] == {"magnitude": "tanh"}


class Known(nn.Module):
    """Features and logits that are known: an image's features are its first two pixels."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(2, 6, bias=False)
        self.fc.weight.data = torch.tensor([[0.0, 0], [0, 1], [0, 2], [0, 3], [0, 4], [0, 5]])

    def get_classifier(self):
        return self.fc

    def forward(self, images):
        return self.fc(images.flatten(1)[:, :2])


def test_measures_of_known_features():
    spec = ModelSpec("cnn6", None, tuple("abcdef"), 1, 2, (0.0,), (1.0,), {})
    model = zoo.ImageModel(Known(), spec)
    features = torch.tensor([[0.0, 0.0], [0.0, 1.0], [0.6, 0.5], [0.8, 0.5]])
    labels = torch.tensor([0, 0, 5, 5])
    batches = [(torch.cat([features, features], 1).view(4, 1, 2, 2), labels)]
    answers = ModelOutputs.collect(model, batches)
    # The centres are (0, ½) and (0.7, ½), the mean distances to them ½ and 0.1.
    assert answers.spread() == pytest.approx(0.3 / 0.7)
    assert answers.drawn_features() == [[0.0, 0.0, 0], [0.0, 1.0, 0], [0.6, 0.5, 5], [0.8, 0.5, 5]]


def test_an_error_counts_the_images_whose_class_is_not_among_the_likeliest():
    logits = torch.arange(7.0).repeat(4, 1)
    answers = ModelOutputs(logits, logits, torch.tensor([6, 5, 2, 1]))
    assert [answers.error(top) for top in (1, 2, 5, 6, 10)] == [75, 50, 25, 0, 0]
    assert answers.top5_error() == answers.error(5)


@pytest.mark.parametrize(("right", "converged"), [(4, True), (3, False), (1, False)])
def test_a_network_has_converged_if_it_is_better_than_half_as_good_again_as_chance(right, converged, monkeypatch):
    """Of ten images in five classes, three named rightly are 1.5 times chance."""
    labels = torch.arange(10) % 5
    guesses = torch.where(torch.arange(10) < right, labels, (labels + 1) % 5)
    answers = ModelOutputs(nn.functional.one_hot(guesses).float(), torch.zeros(10, 2), labels)
    monkeypatch.setattr(ModelOutputs, "collect", lambda *_: answers)
    model = zoo.ImageModel(nn.Identity(), ModelSpec("cnn6", None, tuple("abcde"), 1, 8, (0.0,), (1.0,), {}))
    record = types.SimpleNamespace(training={"hardware": "a machine", "torch": "2", "commit": "none"})
    monkeypatch.setattr(tables, "trained_model", lambda _: (model, record))
    table = read_table("no_batchnorm")
    trained = Trained(Path("last.ckpt"), True, None, [{"epoch": 1, "seconds": 6.0}], 100, "32-true", Digits())
    result = measured(table, table.cells("tiny")[0], trained, CPU)
    assert result["converged"] == converged
    assert (result["error"], result["test_images"], result["minutes"]) == (pytest.approx(100 - 10 * right), 10, 0.1)


def test_unknown_names_bring_the_nearest():
    with pytest.raises(ValueError, match="unknown table 'no_relus'. Did you mean 'no_relu'. Choose one of: f"):
        read_table("no_relus")
    with pytest.raises(ValueError, match="unknown scale 'large'. .*Choose one of: full, small, tiny"):
        read_table("no_relu").cells("large")


def result(row, column, seed, error, converged=True):
    return {"row": row, "column": column, "seed": seed, "error": error, "converged": converged}


def test_a_table_shows_mean_and_deviation_of_seeds_beside_the_paper():
    table = read_table("no_batchnorm")
    results = [result("TanhConv", "cosine", seed, error) for seed, error in enumerate((10.0, 12.0, 14.0))]
    results += [result("SegConv", "square cosine", 0, None, converged=False), result("convolution", "cosine", 0, 9.5)]
    assert reports.table_markdown(table, results) == markdown_table(
        ["", "linear", "cosine", "square cosine"],
        [
            ["convolution", "–", "9.50 (35.30)", "–"],
            ["LinearConv", "– (33.39)", "– (31.76)", "– (N/C)"],
            ["TanhConv", "– (32.88)", "12.00 ± 2.00 (31.88)", "– (34.26)"],
            ["SegConv", "– (34.69)", "– (30.34)", "N/C (N/C)"],
        ],
    )


def test_the_interval_is_wilsons():
    """Brown, Cai and DasGupta 2001, equation 4: centre (x + z²/2) / (n + z²)."""
    z = 1.959964
    for hits, count in ((9950, 10000), (360, 360), (1, 7)):
        centre = (hits + z**2 / 2) / (count + z**2)
        half = z * math.sqrt(count) / (count + z**2) * math.sqrt(hits / count * (1 - hits / count) + z**2 / 4 / count)
        assert interval(hits / count, count) == pytest.approx((centre - half, centre + half), abs=1e-6)


def test_only_what_stands_between_the_marks_is_replaced():
    text = "a\n<!-- begin one -->\nold\n<!-- end one -->\nb\n<!-- begin two --><!-- end two -->\n"
    assert reports.filled(text, {"one": "new", "two": "also"}) == (
        "a\n<!-- begin one -->\n\nnew\n\n<!-- end one -->\nb\n<!-- begin two -->\n\nalso\n\n<!-- end two -->\n"
    )


def test_what_stands_in_the_docs_is_what_was_measured():
    blocks = reports.report_blocks()
    for path in reports.PAGES:
        text = path.read_text(encoding="utf-8")
        assert reports.filled(text, blocks) == text, "python -m zoo reports writes it again"


@pytest.mark.parametrize("path", sorted(tables.RESULTS.glob("*.json")), ids=lambda path: path.stem)
def test_published_results_are_complete_and_of_the_recipes_that_stand_there(path):
    name, _, scale = path.stem.rpartition("_")
    table = read_table(name)
    assert len(read_results(table, scale)) == len(table.cells(scale)) == len(json.loads(path.read_text())["cells"])


def test_pictures_are_drawn(tmp_path):
    table = read_table("no_relu")
    results = [result(row, column, 0, 20.0, row != "BallConv") for row in table.rows for column in table.columns]
    for one in results:
        one["data"] = "photos"
    reports.draw(table, results, tmp_path / "table.png")
    measured = {"spread": 0.25, "features": [[0.5, 0.25, 1], [1.0, 0.0, 3]]}
    scattered = [{**result(row, "", 0, 1.5), **measured} for row in ("convolution", "SphereConv")]
    reports.draw(read_table("features_2d"), scattered, tmp_path / "features.png")
    for name in ("table", "features"):
        with Image.open(tmp_path / f"{name}.png") as picture:
            assert picture.size[0] > 1000
