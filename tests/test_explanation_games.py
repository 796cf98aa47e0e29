"""The games of ``python -m benchmarks.explanations`` give what their definitions say."""

import pytest
import torch

pytest.importorskip("captum")

import zoo
from benchmarks.explainers import EXPLAINERS, OWN
from benchmarks.explanations import PAGE, confident, curves, make_grids, pointing, smoothed, summary, tables
from benchmarks.report import read
from zoo.data import Digits
from zoo.markdown import filled


@pytest.fixture(scope="module")
def digits():
    model, data = zoo.load("digits_cnn6_conv"), Digits()
    return model, *data.evenly_spaced("test", 100)


def test_grids_hold_each_image_once_and_ask_for_the_class_of_their_cell():
    images = torch.arange(40.0).view(40, 1, 1, 1).expand(40, 1, 4, 4)
    places = {label: list(range(10 * label, 10 * label + 10)) for label in range(4)}
    grids, target, cells = make_grids(images, places, side=2, count=100)
    assert grids.shape == (10, 1, 8, 8) and cells.unique().numel() > 1
    shown = grids.view(10, 2, 4, 2, 4)[:, :, 0, :, 0].flatten(1)
    assert sorted(shown.flatten().tolist()) == list(range(40))
    assert torch.equal(shown.gather(1, cells[:, None])[:, 0].long() // 10, target)
    # The most confident come first.
    assert sorted(shown[0].tolist()) == [0, 10, 20, 30]


def test_pointing_is_the_share_of_what_speaks_for_the_class():
    maps, cells = torch.full((3, 12, 12), -1.0), torch.tensor([0, 3, 3])
    maps[0, 2:4, 2:4], maps[1, 2:4, 2:4] = 5, 5
    maps[2, 2:4, 2:4], maps[2, 8:10, 8:10] = 5, 5
    assert pointing(maps, cells, side=2, size=6).tolist() == pytest.approx([1, 0, 0.5])
    assert torch.allclose(smoothed(torch.full((1, 40, 40), 2.0), 32), torch.full((1, 40, 40), 2.0))


def test_the_most_confident_right_images_come_first(digits):
    model, images, labels = digits
    found = confident(model, images, labels)
    with torch.no_grad():
        probabilities = model(images).softmax(1)
    assert sorted(sum(found.values(), [])) == (probabilities.argmax(1) == labels).nonzero()[:, 0].tolist()
    for label, places in found.items():
        values = probabilities[places, label]
        assert (values.diff() <= 0).all()


@pytest.mark.parametrize("name", EXPLAINERS)
def test_explainers_give_a_map_for_each_image(name, digits):
    model, images, labels = digits
    maps = EXPLAINERS[name](model, images[:3], labels[:3])
    assert maps.shape == (3, 8, 8) and maps.isfinite().all() and maps.abs().max() > 0


def test_deleting_what_matters_costs_more_than_deleting_what_does_not(digits):
    model, images, labels = digits
    maps = EXPLAINERS[OWN](model, images, labels)
    first, last = curves(model, images, labels, maps), curves(model, images, labels, -maps)
    assert first["deletion"].mean() < last["deletion"].mean() - 0.05
    assert first["insertion"].mean() > last["insertion"].mean() + 0.05


def test_a_summary_has_an_interval():
    found = summary(torch.tensor([0.0, 1.0] * 50))
    assert found["mean"] == 0.5 and found["n"] == 100
    # Two standard errors of 0.05 each way.
    assert found["low"] == pytest.approx(0.4, abs=0.02) and found["high"] == pytest.approx(0.6, abs=0.02)


def test_the_page_tells_what_was_measured():
    page = PAGE.read_text(encoding="utf-8")
    assert filled(page, tables(read("explanations.json")["rows"]), others=r"\w+") == page
