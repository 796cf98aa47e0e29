"""``python -m zoo corruptions`` and ``--data.corruption``: what is measured, kept, compared and told."""

import pytest
import torch
from PIL import Image

import zoo
from tests.command_line import fit, run  # noqa: F401
from zoo.checkpoints.config import read_config
from zoo.commands.console import main
from zoo.corruptions.corruption import CORRUPTIONS, corrupted, corruption_keys
from zoo.corruptions.ways import FACTORS, WAYS, scale_key
from zoo.data import Digits
from zoo.data.image_sets import CorruptedImages
from zoo.data.measuring import portable_description
from zoo.recipes.corruption_pages import by_family, by_network, short_names
from zoo.robustness.corruption_evaluation import evaluate_corruptions
from zoo.robustness.corruption_pictures import plot_light
from zoo.robustness.corruption_report import overview, pairs_table, seeds_table, severities_table
from zoo.robustness.corruption_result import COUNTED, CorruptionResult, twin_among
from zoo.statistics import paired_difference

pytestmark = pytest.mark.filterwarnings("ignore:The number of training batches")

NAMES = ["digits_cnn6_conv", "digits_cnn6_sphere_cosine"]


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    work = tmp_path_factory.mktemp("work")
    return evaluate_corruptions(NAMES, Digits(), limit=60, device="cpu", work=work)


def made_up(right, name="digits_cnn6_conv", content="alike"):
    operator = name.removeprefix("digits_cnn6_")
    about = {"checkpoint": name, "operator": operator, "data": "Digits", "images": 4, "content": content}
    return CorruptionResult(about, {key: right(key) for key in WAYS})


def test_every_way_is_measured_image_by_image(results):
    model, data = zoo.load(NAMES[1]), Digits()
    places = [(2 * place + 1) * 360 // 120 for place in range(60)]
    images, labels = data.split("test").__getitems__(places)
    drawn = corruption_keys(torch.tensor(places))
    floats = images.float() / 255
    mean = floats.mean((2, 3), keepdim=True)
    expected = {
        "clean": floats,
        "fog:4": corrupted(images, "fog", 4, drawn).float() / 255,
        "contrast x 0.25": mean + 0.25 * (floats - mean),
        "brightness x 0.1": 0.1 * floats,
    }
    assert list(results[1].right) == list(WAYS) and len(WAYS) == 1 + 19 * 5 + 2 * len(FACTORS)
    for key, changed in expected.items():
        assert torch.allclose(WAYS[key](images, drawn), changed, atol=1e-6)
        with torch.no_grad():
            assert torch.equal(results[1].right[key], model(changed).argmax(1) == labels)
    assert results[0].about["images"] == 60 and results[0].is_of_the_same_images(results[1])


def test_a_result_is_read_as_it_was_written(results, tmp_path):
    results[1].write(tmp_path / "result.json")
    read = CorruptionResult.read(tmp_path / "result.json")
    assert all(torch.equal(read.right[key], values) for key, values in results[1].right.items())
    assert read.about["accuracy"]["clean"] == pytest.approx(results[1].accuracy("clean"), abs=0.01)
    (tmp_path / "result.json").write_text("{}")
    with pytest.raises(ValueError, match="holds no result on corrupted images"):
        CorruptionResult.read(tmp_path / "result.json")


def test_a_killed_run_goes_on_and_measures_nothing_twice(tmp_path, monkeypatch):
    steps = []

    def stop(step, done, total):
        steps.append(step)
        if done == 3:
            raise KeyboardInterrupt

    settings = {"limit": 20, "device": "cpu", "work": tmp_path}
    with pytest.raises(KeyboardInterrupt):
        evaluate_corruptions(NAMES[:1], Digits(), **settings, tell=stop)
    asked = []
    monkeypatch.setattr(
        "zoo.robustness.corruption_evaluation.WAYS",
        {key: lambda *images, key=key, way=way: asked.append(key) or way(*images) for key, way in WAYS.items()},
    )
    evaluate_corruptions(NAMES[:1], Digits(), **settings)
    assert asked == list(WAYS)[3:]
    # Other images are other numbers, and so are fewer of them.
    other = Digits()
    other.split("test").images.zero_()
    asked.clear()
    (found,) = evaluate_corruptions(NAMES[:1], other, **settings)
    assert asked == list(WAYS) and found.accuracy("clean") < 50
    asked.clear()
    evaluate_corruptions(NAMES[:1], Digits(), **{**settings, "limit": 10})
    assert asked == list(WAYS)


def test_a_network_is_compared_with_its_own_twin_on_the_same_images_alone():
    plain, mine = (made_up(lambda key: torch.ones(4).bool(), name=name) for name in NAMES)
    other = made_up(lambda key: torch.ones(4).bool(), name="mnist_cnn6_conv")
    elsewhere = made_up(lambda key: torch.ones(4).bool(), content="other")
    assert twin_among(mine, [mine, other, plain]) is plain
    for results in ([mine], [mine, other], [mine, elsewhere]):
        assert twin_among(mine, results) is None
    assert twin_among(plain, [plain, mine]) is None
    assert "| digits_cnn6_sphere_cosine | 4 | 100.0 | 100.0 | – | – |" in overview([elsewhere, mine])


def test_two_checkpoints_of_one_name_are_refused(tmp_path):
    zoo.save(zoo.load(NAMES[0]), tmp_path / NAMES[0])
    with pytest.raises(ValueError, match="two checkpoints are called digits_cnn6_conv; measure each into a folder"):
        names = [NAMES[0], tmp_path / NAMES[0]]
        evaluate_corruptions(names, Digits(), limit=10, device="cpu", work=tmp_path / "work")


def test_missing_photographs_are_told_before_anything_is_measured(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"decoupled-zoo\[corruptions\]"):
        evaluate_corruptions(NAMES[:1], Digits(), limit=10, device="cpu", work=tmp_path / "work")
    assert not (tmp_path / "work").exists()


def test_numbers_are_those_of_their_definitions():
    # The twin is right on two images of four, this one on three, but on one under fog.
    twin = made_up(lambda key: torch.tensor([True, True, False, False]))
    mine = made_up(lambda key: torch.tensor([True, not key.startswith("fog"), not key.startswith("fog"), False]))
    assert mine.accuracy("clean") == 75 and mine.accuracy("fog:3") == 25
    assert mine.mean_accuracy() == pytest.approx((14 * 75 + 25) / 15)
    # Errors of 25 or 75 % by the twin's 50 %.
    assert mine.corruption_error(twin) == pytest.approx(100 * (14 * 0.5 + 1.5) / 15)
    assert twin.corruption_error(twin) == pytest.approx(100)
    mean, low, high = mine.difference(twin, ["fog"])
    assert mean == -25 and low < -25 < high
    assert "saturate" not in COUNTED and len(COUNTED) == 15
    assert paired_difference([1, 1, 0, 0], [0, 0, 0, 0]) == pytest.approx((0.5, 0.5 - 0.566, 0.5 + 0.566), abs=1e-3)


def test_tables_of_seeds_have_mean_and_deviation():
    seeds = [made_up(lambda key, count=count: torch.arange(4) < count) for count in (1, 2, 3)]
    table = seeds_table({"conv": seeds, "alone": seeds[:1]})
    assert "| clean | 50.0 ± 25.0 | 25.0 |" in table and "| contrast × 0.05 | 50.0 ± 25.0 | 25.0 |" in table
    assert "| fog | 3 | 50.0 |" in severities_table({"conv": seeds})


def test_pairs_are_of_one_seed():
    def of_seed(name, seed, right):
        made = made_up(lambda key: right, name=name)
        return CorruptionResult({**made.about, "seed": seed}, made.right)

    none, all_right = torch.zeros(4).bool(), torch.ones(4).bool()
    half = torch.tensor([True, True, False, False])
    networks = {
        "conv": [of_seed(NAMES[0], 0, none), of_seed(NAMES[0], 1, half)],
        "sphere": [of_seed(NAMES[1], 0, all_right), of_seed(NAMES[1], 1, half)],
    }
    # 100 points for the first seed, and none for the second.
    table = pairs_table(networks)
    assert "| fog | +50.0 ± 70.7 (1 of 2) |" in table and "| mean of the fifteen | +50.0 ± 70.7 (1 of 2) |" in table
    assert "|  | sphere |" in table


def test_bad_light_is_drawn(tmp_path):
    seeds = [made_up(lambda key, count=count: torch.arange(4) < count) for count in (1, 2, 3)]
    plot_light({"conv": seeds, "sphere": seeds[:1], "light_conv": seeds}, tmp_path / "light.png")
    with Image.open(tmp_path / "light.png") as picture:
        assert picture.width > 900


def test_results_are_found_by_family_and_by_seed(results, tmp_path):
    for seed in (0, 1):
        results[1].write(tmp_path / f"seed_{seed}" / f"{NAMES[1]}.json")
    for result in results:
        result.write(tmp_path / f"{result.about['checkpoint']}.json")
    assert [result.about["checkpoint"] for result in by_family(tmp_path)["digits_cnn6"]] == NAMES
    networks = by_network(tmp_path)
    assert list(networks) == NAMES[1:] and len(networks[NAMES[1]]) == 2
    assert list(short_names({"cifar10_light_resnet20_conv": [], "cifar10_resnet20_sphere_cosine": []})) == [
        "light_conv",
        "sphere",
    ]


def test_the_command_tells_writes_and_records(run, tmp_path):  # noqa: F811
    for name in NAMES:
        metrics = [zoo.Metric(**metric) for metric in read_config(zoo.find(name))["metrics"]]
        zoo.save(zoo.load(name), tmp_path / name, metrics=metrics)
    folders = [f"./{name}" for name in NAMES]
    words = ["corruptions", *folders, "--data", "Digits", "--limit", "200", "--to", "out", "--record"]
    status, printed, errors = run(*words, main=main)
    assert status == 0, errors
    assert "Mean corruption error relative to the twin" in printed
    first, second = (CorruptionResult.read(tmp_path / "out" / f"{name}.json") for name in NAMES)
    expected = dict(zip(NAMES, (0, second.corruption_error(first) / 100), strict=True))
    for name in NAMES:
        found = CorruptionResult.read(tmp_path / "out" / f"{name}.json")
        assert (tmp_path / "out" / f"{name}.md").is_file()
        record = read_config(tmp_path / name)["corruptions"]
        assert record["images"] == 200 and list(record["by_corruption"]) == list(CORRUPTIONS)
        assert record["clean"] == pytest.approx(found.accuracy("clean") / 100, abs=1e-4)
        assert record["by_light"][scale_key("contrast", 0.25)] <= 1
        card = (tmp_path / name / "README.md").read_text()
        assert "15 corruptions" in card and "contrast × 0.25" in card
        assert record.get("corruption_error", 0) == pytest.approx(expected[name], abs=1e-4)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["corruptions", "digits_cnn6"], "unknown checkpoint 'digits_cnn6'"),
        (["corruptions", *NAMES, "--limit", "0"], "above 0"),
        (["corruptions", NAMES[0], "cifar10_resnet20_conv"], "cifar10_resnet20_conv: the network has class_names"),
    ],
    ids=["name", "limit", "other images"],
)
def test_wrong_words_are_told(words, told, run):  # noqa: F811
    status, _, errors = run(*words, main=main)
    assert status and told in errors and "Traceback" not in errors


def test_test_images_are_corrupted_when_they_are_read():
    data = Digits(corruption="contrast:5")
    plain = Digits()
    batches = list(data.test_dataloader())
    images = torch.cat([images for images, _ in batches])
    clean = plain.split("test")
    expected = corrupted(clean.images, "contrast", 5, corruption_keys(torch.arange(360)))
    assert torch.equal(images, expected) and torch.equal(torch.cat([labels for _, labels in batches]), clean.labels)
    # All other splits, and what a network is measured on, stay as they are.
    assert torch.equal(torch.cat([images for images, _ in data.val_dataloader()]), plain.split("val").images)
    assert isinstance(data.test_dataloader().dataset, CorruptedImages)
    assert torch.equal(data.split("test").images, clean.images)
    # What a network was measured on does not tell of it.
    assert "corruption" not in portable_description(data.describe())["arguments"]


def test_wrong_corruptions_are_told_when_the_data_is_made():
    with pytest.raises(ValueError, match="Did you mean 'fog'"):
        Digits(corruption="fgo:3")


@pytest.mark.parametrize("stage", ["fit", "validate", "predict"])
def test_only_test_takes_corrupted_images(stage):
    with pytest.raises(ValueError, match=f"corruption changes test images, and {stage} uses none"):
        Digits(corruption="fog:3").setup(stage)


def test_the_command_line_tests_on_corrupted_images(run):  # noqa: F811
    checkpoint = fit(run)
    accuracies = []
    for words in ([], ["--data.corruption", "contrast:5"], ["--data.corruption", "contrast:5"]):
        status, printed, errors = run("test", "--ckpt_path", checkpoint, *words)
        assert status == 0, errors
        assert ("test images are corrupted: contrast, severity 5" in run.told()) == bool(words)
        accuracies.append(next(line for line in printed.splitlines() if "test_loss" in line))
    assert accuracies[0] != accuracies[1] == accuracies[2]
    status, _, errors = run("test", "--ckpt_path", checkpoint, "--data.corruption", "fgo:3")
    assert status and "Did you mean 'fog'" in errors
