"""Attacks against closed forms and foolbox's, masked gradients that must be noticed, and runs that are killed."""

import json
import shutil
import sys

import foolbox
import pyautoattack
import pytest
import torch
from torch import nn

import zoo
from benchmarks import smoothness as benchmark
from zoo.checkpoints.catalogue import PRETRAINED
from zoo.checkpoints.config import read_config
from zoo.commands import console as command_line
from zoo.data import Digits
from zoo.recipes import pages as reports
from zoo.robustness import probes
from zoo.robustness.assessment import assess
from zoo.robustness.attacks import fgsm, is_right, margin, noise, pgd
from zoo.robustness.evaluation import companions_of, evaluate
from zoo.robustness.ledger import Ledger
from zoo.robustness.masking import checks, suspected
from zoo.robustness.probes import ATTACKS, EFFORTS, PROBES, ModelUnderAttack
from zoo.robustness.protocol import CURVE_EPS, Step, chosen_steps, protocol
from zoo.robustness.report import attack_table, check_table, effort_table, headline, paired_table, ratio_to_twin, report
from zoo.robustness.result import Result
from zoo.robustness.smoothness import by_layer, smoothness
from zoo.training.adversarial import AdversarialTraining, OverfittingAlarm

NAME = "digits_cnn6_tanh_cosine"
EPS = 0.1


class Linear(nn.Module):
    """Two classes on either side of a plane: logits ±(w·x + b) / 2."""

    def __init__(self, shape=(1, 4, 4)) -> None:
        super().__init__()
        self.eval()
        generator = torch.Generator().manual_seed(1)
        self.weight = nn.Parameter(torch.randn(shape, generator=generator))
        # The plane goes through grey, from which images are not far.
        self.bias = nn.Parameter(-0.5 * self.weight.detach().sum())

    def forward(self, images):
        side = (images * self.weight).flatten(1).sum(1) + self.bias
        return torch.stack([side / 2, -side / 2], dim=1)


class Coarse(Linear):
    """Its input is rounded, so that the gradient is zero nearly everywhere: masked."""

    def forward(self, images):
        return super().forward((images * 16).round() / 16)


def images_around_grey(count=40, spread=0.2):
    generator = torch.Generator().manual_seed(2)
    return 0.5 + spread * (2 * torch.rand(count, 1, 4, 4, generator=generator) - 1)


@pytest.fixture
def linear():
    model, images = Linear(), images_around_grey()
    labels = model(images).argmax(1)
    side = (model(images)[:, 0] - model(images)[:, 1]).abs().detach()
    return model, images, labels, side


def digits(count=60, dtype=torch.float64):
    images, labels = Digits().evenly_spaced("test", count)
    return images.to(dtype), labels


def test_fgsm_and_pgd_are_foolboxs():
    model = zoo.load(NAME).double()
    images, labels = digits()
    theirs = foolbox.PyTorchModel(model, bounds=(0, 1), device="cpu")
    single, *_ = foolbox.attacks.LinfFastGradientAttack()(theirs, images, labels, epsilons=EPS)
    many = foolbox.attacks.LinfBasicIterativeAttack(abs_stepsize=0.02, steps=10, random_start=False)
    moved, *_ = many(theirs, images, labels, epsilons=EPS)
    settings = {"step": 0.02, "steps": 10, "random_start": False}
    torch.testing.assert_close(fgsm(model, images, labels, EPS), single, rtol=0, atol=1e-6)
    torch.testing.assert_close(pgd(model, images, labels, EPS, stop_early=False, **settings), moved, rtol=0, atol=1e-6)
    # Those left where they were mistaken first are mistaken no less.
    early = is_right(model, pgd(model, images, labels, EPS, **settings), labels)
    assert not (early & ~is_right(model, moved, labels)).any()


def test_margin_is_its_definition():
    logits, labels = torch.randn(20, 5, dtype=torch.float64), torch.arange(20) % 5
    for row, label, value in zip(logits, labels, margin(logits, labels), strict=True):
        assert value == max(z for k, z in enumerate(row) if k != label) - row[label]


@pytest.mark.parametrize("loss", ["cross_entropy", "margin"])
def test_pgd_finds_exactly_the_images_that_can_be_moved_over_the_plane(linear, loss):
    model, images, labels, side = linear
    # No pixel meets the bounds of 0 and 1.
    reach = side / model.weight.abs().sum()
    for eps in (0.02, 0.05, 0.1):
        moved = pgd(model, images, labels, eps, step=eps / 4, steps=50, loss=loss)
        assert (moved - images).abs().max() <= eps + 1e-6 and moved.min() >= 0 and moved.max() <= 1
        assert torch.equal(is_right(model, moved, labels), reach > eps)


@pytest.mark.parametrize(("attack", "most"), [("deepfool", 1.05), ("carlini_wagner", 1.25), ("ddn", 1.40)])
def test_the_nearest_mistakes_of_a_linear_model_are_found(linear, attack, most):
    model, images, labels, side = linear
    true = side / model.weight.norm()
    found = PROBES[attack](ModelUnderAttack(model), images, labels, 0.0, 0)
    assert found.isfinite().all()
    ratio = found / true
    assert ratio.min() >= 0.999 and ratio.median() <= most


@pytest.mark.parametrize("attack", ["pgd", "pgd_margin", "square", "autoattack"])
def test_a_planted_mistake_is_found(attack):
    """Images of one point, and another point of another class within reach: classes are those of the nearest point."""
    generator = torch.Generator().manual_seed(0)
    centres = torch.rand(3, 1, 4, 4, generator=generator)
    own = 0.2 + 0.6 * centres[:1]
    planted = own + 0.08 * torch.sign(torch.randn(1, 1, 4, 4, generator=generator))
    # Other classes are out of reach.
    points = torch.cat([own, planted, 1 - own, own.flip(2)])

    class Nearest(nn.Module):
        def forward(self, images):
            return -(images[:, None] - points).square().flatten(2).sum(2) * 50

    images = own + 0.01 * (2 * torch.rand(40, 1, 4, 4, generator=generator) - 1)
    labels = torch.zeros(40, dtype=torch.long)
    assert is_right(Nearest(), images, labels).all()
    assert PROBES[attack](ModelUnderAttack(Nearest()), images, labels, 0.09, 0).mean() <= 0.05
    points = points[[0, 2, 3]]
    assert PROBES[attack](ModelUnderAttack(Nearest()), images, labels, 0.09, 0).mean() == 1


def measured(model, attacks, eps=EPS, others=None):
    images = images_around_grey(60)
    labels = model(images).argmax(1)
    attacked = ModelUnderAttack(model, others or {})
    names = ["gradient_norm", "cross_entropy_gradient", "batch_dependence", *attacks]
    values = {Step(name, eps if name in ATTACKS else None).key: None for name in names}
    for name, key in zip(names, values, strict=True):
        values[key] = PROBES[name](attacked, images, labels, eps, 0)
    for level in CURVE_EPS:
        values[Step("curve", level).key] = PROBES["curve"](attacked, images, labels, level, 0)
    about = {"checkpoint": "planes", "eps": eps, "images": 60, "in_chans": 1, "adversarial": None, "data": "grey"}
    return Result(about, values, attacked.flags)


def test_masked_gradients_are_suspected_and_an_honest_network_is_not():
    attacks = ["clean", "noise", "fgsm", "bim", "pgd", "pgd_margin", "transfer", "square"]
    honest = measured(Linear(), attacks, others={"same": Linear()})
    assert not suspected(honest), suspected(honest)
    masked = measured(Coarse(), attacks, others={"same": Linear()})
    found = {check.what for check in suspected(masked)}
    assert "images with a gradient of exactly zero, or none" in found
    assert "Square lowers the worst case by" in found
    assert "masked gradients are suspected" in headline(masked) and "suspected" not in headline(honest)
    assert "SUSPECTED" in attack_table([masked]) and "SUSPECTED" in check_table([honest, masked])
    assert "(not fgsm, bim, bim_quarter, pgd_long, pgd_double, autoattack)" in headline(honest)
    assert "only 11 signs looked for" in attack_table([honest])


def doctored(**changes):
    """Return a result in which nothing is suspicious, but for what is changed."""
    ones = torch.ones(1000)
    values = {Step(name, EPS).key: changes.get(name, ones) for name in ATTACKS}
    for name in ("gradient_norm", "cross_entropy_gradient"):
        values[name] = changes.get(name, torch.rand(1000) + 1)
    values["batch_dependence"] = changes.get("batch_dependence", torch.zeros(1000))
    values["deepfool"] = changes.get("deepfool", torch.ones(50))
    shares = changes.get("curve", [0.9, 0.8, 0.7, 0.5, 0.2, 0.05, 0.0, 0.0, 0.0])
    for level, share in zip(CURVE_EPS, shares, strict=True):
        values[Step("curve", level).key] = (torch.arange(1000) < 1000 * share).float()
    about = {"checkpoint": "doctored", "eps": EPS, "images": 1000, "in_chans": 3, "adversarial": None, "data": "none"}
    return Result(about, values, changes.get("flags", []))


def fallen(count):
    return (torch.arange(1000) >= count).float()


@pytest.mark.parametrize(
    ("changes", "sign"),
    [
        ({"cross_entropy_gradient": fallen(1)}, "images with a gradient of exactly zero, or none"),
        (
            {"gradient_norm": torch.cat([torch.full((400,), torch.nan), torch.ones(600)])},
            "images with a gradient of exactly zero, or none",
        ),
        ({"deepfool": torch.tensor([1.0, torch.inf])}, "images of which no L2 attack found a mistake"),
        ({"fgsm": fallen(6)}, "images that FGSM breaks and PGD does not"),
        ({"fgsm": fallen(11)}, "PGD is weaker than FGSM by"),
        ({"square": fallen(3)}, "Square lowers the worst case by"),
        ({"transfer": fallen(6)}, "images that fall to transfer only"),
        ({"pgd": fallen(30), "pgd_margin": fallen(5)}, "PGD on cross-entropy and on the margin differ by"),
        (
            {"gradient_norm": torch.cat([torch.zeros(1), torch.ones(999)])},
            "images with a gradient of exactly zero, or none",
        ),
        (
            {"gradient_norm": torch.cat([torch.full((20,), 1e-8), torch.ones(980)])},
            "median of the gradients' norms over their 1st percentile",
        ),
        ({"curve": [0.9, 0.8, 0.7, 0.5, 0.2, 0.05, 0.0, 0.0, 0.01]}, "the curve over ε rises by"),
        (
            {"curve": [0.9, 0.8, 0.7, 0.5, 0.2, 0.05, 0.02, 0.0, 0.0]},
            "accuracy at 32/255, of colour images, not trained on attacks",
        ),
        ({"curve": [0.9] * 8 + [0.13]}, "accuracy at 128/255"),
        ({"pgd_long": fallen(6)}, "100 steps and 10 restarts lower PGD by"),
        ({"noise": fallen(2)}, "images that noise breaks and PGD does not"),
        ({"pgd_double": fallen(11)}, "images that float64 changes"),
        ({"flags": ["zero gradient"]}, "warnings of AutoAttack"),
        ({"batch_dependence": torch.full((1000,), 1e-4)}, "logits depend on the batch by"),
    ],
)
def test_every_sign_of_masking_is_noticed_alone(changes, sign):
    assert not suspected(doctored()) and len(checks(doctored())) == 16
    assert sign in {check.what for check in suspected(doctored(**changes))}


def test_the_headline_is_the_worst_case_of_each_image():
    result = doctored(fgsm=fallen(100), transfer=1 - fallen(900), square=fallen(200), curve=[1.0] * 9)
    assert result.worst().sum() == 700
    assert doctored(pgd_long=fallen(5), pgd_double=fallen(9), curve=[1.0] * 9).worst().sum() == 991
    assert "70.0 (67.1–72.8) % of 1000 test images" in headline(result)


def steps(*names):
    return [step for step in protocol(EPS) if step.probe in names]


def test_a_killed_run_goes_on_and_loses_one_batch_at_most(tmp_path, monkeypatch):
    settings = {"eps": EPS, "limit": 110, "work": tmp_path}
    chosen = steps("clean", "fgsm", "bim", "gradient_norm")
    whole = evaluate(NAME, Digits(), chosen, **settings)
    (ledger,) = tmp_path.glob(f"{NAME}-*.jsonl")
    lines = ledger.read_text().splitlines(keepends=True)
    # Killed in the middle of a line.
    ledger.write_text("".join(lines[:5]) + lines[5][: len(lines[5]) // 2])
    counted = []
    original = dict(PROBES)
    for name, probe in original.items():
        monkeypatch.setitem(PROBES, name, lambda *a, name=name, probe=probe: counted.append(name) or probe(*a))
    again = evaluate(NAME, Digits(), chosen, **settings)
    assert len(counted) == len(lines) - 5
    assert ledger.read_text() == "".join(lines)
    for key, values in whole.values.items():
        assert torch.equal(values, again.values[key]), key
    evaluate(NAME, Digits(), chosen, **settings)
    assert len(counted) == len(lines) - 5
    # What was measured before stands beside what is asked for now.
    assert set(evaluate(NAME, Digits(), steps("clean"), **settings).values) == set(whole.values)
    # Other images, and other companions, are measured anew, and nothing is lost of these.
    evaluate(NAME, Digits(), steps("clean"), **{**settings, "limit": 50})
    evaluate(NAME, Digits(), steps("clean"), **settings, others=["digits_cnn6_conv"])
    assert len(counted) > len(lines) - 5 and ledger.read_text() == "".join(lines)
    assert len(list(tmp_path.glob(f"{NAME}-*.jsonl"))) == 3


def test_numbers_of_another_network_are_not_taken(tmp_path):
    ledger = Ledger(tmp_path, "a", {"sha256": "1"})
    ledger.add("pgd@0.1", 0, torch.tensor([1.0, torch.inf, torch.nan]), [])
    assert Ledger(tmp_path, "a", {"sha256": "1"}).rows["pgd@0.1", 0]["values"] == [1.0, "inf", "nan"]
    assert not Ledger(tmp_path, "a", {"sha256": "2"}).rows


def test_a_result_is_read_as_it_was_written(tmp_path):
    result = doctored()
    result.values["deepfool"] = torch.tensor([0.0, 0.25, torch.inf])
    result.write(tmp_path / "r.json")
    again = Result.read(tmp_path / "r.json")
    assert again.about == result.about and again.flags == result.flags
    for key, values in result.values.items():
        torch.testing.assert_close(again.values[key], values, rtol=1e-4, atol=0)
    (tmp_path / "r.json").write_text("{}")
    with pytest.raises(ValueError, match="holds no result of python -m zoo robustness"):
        Result.read(tmp_path / "r.json")


def test_the_ratio_to_the_twin_is_paired_by_image():
    twin = torch.rand(100) + 0.5
    mine = 2 * twin
    mine[:10] = 0
    assert ratio_to_twin(mine, twin) == "2.00 (2.00–2.00)"
    mine[-1] = torch.inf
    assert ratio_to_twin(mine, twin) == "–"
    first, second = doctored(), doctored()
    assert first.is_of_the_same_images(second)
    assert not first.is_of_the_same_images(Result({**second.about, "content": "others"}, second.values))


def test_companions_are_the_twin_and_another():
    assert companions_of(NAME) == ["digits_cnn6_conv", "digits_cnn6_sphere_cosine"]
    assert companions_of("digits_cnn6_conv") == ["digits_cnn6_sphere_cosine", NAME]


def test_unknown_attacks_and_limits_are_refused(tmp_path):
    with pytest.raises(ValueError, match="unknown attack 'pdg'. Did you mean 'pgd'"):
        chosen_steps(["pdg"], EPS)
    with pytest.raises(ValueError, match="limit must be at least 1, got 0"):
        evaluate(NAME, Digits(), steps("clean"), limit=0, work=tmp_path)
    with pytest.raises(ValueError, match="the network has class_names"):
        evaluate(NAME, Digits(), steps("clean"), others=["cifar10_resnet20_conv"], work=tmp_path)
    with pytest.raises(ValueError, match="the network has class_names"):
        evaluate("cifar10_resnet20_conv", Digits(), steps("clean"), work=tmp_path)


def test_a_missing_extra_is_told(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "pyautoattack", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'decoupled-zoo\[robustness\]'"):
        probes.optional("pyautoattack")
    monkeypatch.setattr(sys, "argv", ["zoo", "robustness", NAME])
    with pytest.raises(SystemExit):
        command_line.main()
    assert "error: pyautoattack is not installed" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["digits_cnn6_conv", NAME])
def test_a_third_partys_evaluation_takes_the_model_as_it_is(name):
    images, labels = digits(20, torch.float32)
    tool = pyautoattack.AutoAttack(
        zoo.load(name), norm="Linf", eps=0.3, seed=0, version="custom", attacks=["apgd-ce"], device="cpu"
    )
    moved, _ = tool.run_standard_evaluation(images, labels, batch_size=20)
    assert not is_right(zoo.load(name), moved, labels).any()


def test_noise_is_reproducible_and_bounded():
    model = zoo.load(NAME)
    images, labels = digits(20, torch.float32)
    first = noise(model, images, labels, EPS, draws=5, seed=3)
    assert torch.equal(first, noise(model, images, labels, EPS, draws=5, seed=3))
    assert (first - images).abs().max() <= EPS + 1e-6


def test_the_whole_run_is_one_call_that_loads_the_network_once(tmp_path, monkeypatch):
    folder = shutil.copytree(PRETRAINED / NAME, tmp_path / NAME)
    loaded, load = [], zoo.load
    monkeypatch.setattr(zoo, "load", lambda where, **settings: loaded.append(str(where)) or load(where, **settings))
    settings = {"attacks": ["fgsm"], "limit": 10, "transfer": [], "folder": tmp_path / "out"}
    found = assess(folder, **settings)
    assert loaded == [str(folder)]
    assert found.result.accuracy("fgsm") is not None and found.report.startswith(f"# How robust is {NAME}?")
    assert {file.name for file in found.files} == {f"{NAME}{end}" for end in (".json", ".md", "_images.png")}
    assert all(file.stat().st_size for file in found.files)
    with pytest.raises(ValueError, match="not recorded, for .* was not measured; leave out --attack"):
        assess(folder, record=True, **settings)
    assert (folder / "config.json").read_bytes() == (PRETRAINED / NAME / "config.json").read_bytes()
    with pytest.raises(ValueError, match="me/net is a Hub repository"):
        assess("me/net", record=True, **settings)
    # With everything that is recorded, and what was found shown first.
    monkeypatch.setattr(Result, "unmeasured", lambda self: [])
    shown = []
    assess(folder, record=True, show=lambda found: shown.append((found.report, read_config(folder))), **settings)
    report, before = shown[0]
    assert report.startswith(f"# How robust is {NAME}?") and before["robustness"] != read_config(folder)["robustness"]
    assert read_config(folder)["robustness"]["images"] == 10


def test_the_command_measures_shows_and_records(tmp_path, monkeypatch, capsys):
    folder = shutil.copytree(PRETRAINED / NAME, tmp_path / NAME)
    words = [folder, "--limit", "10", "--effort-limit", "5", "--eps", "64/255", "--to", tmp_path / "out", "--record"]
    for attack in sorted({step.probe for step in protocol()} - {"ddn", "carlini_wagner"}):
        words += ["--attack", attack]
    for twin in ("digits_cnn6_conv", folder):
        monkeypatch.setattr(sys, "argv", ["zoo", "robustness", str(twin), *map(str, words[1:])])
        if twin == "digits_cnn6_conv":
            sys.argv.remove("--record")
        command_line.main()
    printed = capsys.readouterr().out
    assert "worst case of each image" in printed and "written: " in printed
    names = {path.name.removeprefix(NAME) for path in (tmp_path / "out").glob(f"{NAME}*")}
    assert names == {".json", ".md", "_curve.png", "_effort.png", "_images.png"}
    text = (tmp_path / "out" / f"{NAME}.md").read_text()
    assert "digits_cnn6_conv" in text and "times the twin's" in text
    card = (folder / "README.md").read_text()
    for attack in ("FGSM", "BIM", "PGD-50×5", "AutoAttack", "the worst of all attacks"):
        assert f"accuracy under {attack}, pixels changed by at most 64/255, 10 test images" in card
    assert "masked gradients" in card and zoo.verify(folder) == []
    recorded = json.loads((folder / "config.json").read_text())["robustness"]
    result = Result.read(tmp_path / "out" / f"{NAME}.json")
    assert recorded["worst_case"] == result.worst().mean().item() <= recorded["accuracy"]["FGSM"]
    assert report(result, None).startswith(f"# How robust is {NAME}?")
    part = ["--attack", "fgsm", "--to", str(tmp_path / "part"), "--record", "--limit", "10"]
    monkeypatch.setattr(sys, "argv", ["zoo", "robustness", str(folder), *part])
    with pytest.raises(SystemExit):
        command_line.main()
    assert "not recorded, for batch_dependence, " in capsys.readouterr().err


def test_undefended_networks_fall_where_the_images_can_become_any_others(tmp_path):
    result = evaluate("digits_cnn6_conv", Digits(), steps("pgd"), eps=EPS, limit=40, work=tmp_path)
    far = evaluate("digits_cnn6_conv", Digits(), [Step("pgd", 0.5)], eps=0.5, limit=40, work=tmp_path / "far")
    assert far.accuracy("pgd") == 0.0 < result.accuracy("pgd")


@pytest.mark.parametrize("attack", ["pgd", "fgsm"])
def test_training_images_are_attacked_in_evaluation_mode(attack):
    model = zoo.load("digits_cnn6_tanh_cosine").train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    images, labels = digits(40, torch.float32)
    moved = AdversarialTraining(attack, eps=EPS).perturb(model, images, labels)
    assert model.training and (moved - images).abs().max() <= EPS + 1e-6 and moved.min() >= 0 and moved.max() <= 1
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    model.eval()
    assert nn.functional.cross_entropy(model(moved), labels) > nn.functional.cross_entropy(model(images), labels)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"attack": "pdg"}, "attack is pgd or fgsm, got 'pdg'"),
        ({"eps": 8}, r"eps is a change of pixels in \(0, 1\]"),
        ({"steps": 0}, "steps and step must be more than 0"),
    ],
)
def test_wrong_settings_of_adversarial_training_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        AdversarialTraining(**settings)


class _Trainer:
    sanity_checking, current_epoch = False, 3
    datamodule = Digits()

    class state:
        fn = "fit"


class _Module:
    device = "cpu"

    def __init__(self, model) -> None:
        self.model = model
        self.logged = {}

    def log(self, name, value, **_) -> None:
        self.logged[name] = value


def test_the_alarm_is_raised_by_a_network_that_only_seems_to_resist():
    alarm = OverfittingAlarm(AdversarialTraining(eps=0.02))
    module = _Module(zoo.load(NAME))
    alarm.on_validation_epoch_end(_Trainer, module)
    assert not alarm.alarms and 0 < module.logged["val_pgd_accuracy"] <= module.logged["val_fgsm_accuracy"]
    again = OverfittingAlarm(AdversarialTraining(eps=0.02))
    again.load_state_dict(alarm.state_dict())
    # A fall in one epoch, though FGSM is not much weaker.
    again.adversarial = AdversarialTraining(eps=0.3)
    with pytest.warns(UserWarning, match="catastrophic overfitting in epoch 4: accuracy under FGSM"):
        again.on_validation_epoch_end(_Trainer, module)
    assert len(again.alarms) == 1


@pytest.mark.parametrize("classes", [2, 3, 5])
def test_auto_attack_takes_networks_of_few_classes(classes):
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, classes)).eval()
    images = torch.rand(6, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    labels = model(images).argmax(1)
    assert PROBES["autoattack"](ModelUnderAttack(model), images, labels, 1e-4, 0).mean() == 1
    assert PROBES["autoattack"](ModelUnderAttack(model), images, labels, 0.9, 0).mean() < 1


def test_the_smoothness_of_a_linear_map_is_its_largest_singular_value():
    layer = nn.Linear(12, 7).double()
    found = smoothness(layer, torch.randn(30, 12, dtype=torch.float64))
    largest = torch.linalg.matrix_norm(layer.weight, 2).item()
    assert found.gradient == pytest.approx(largest, rel=0.02) and found.pairs <= found.gradient * (1 + 1e-9)
    longer = nn.Sequential(layer, nn.Linear(7, 7, bias=False).double())
    longer[1].weight.data = 3 * torch.eye(7, dtype=torch.float64)
    tripled = smoothness(longer, torch.randn(30, 12, dtype=torch.float64))
    assert tripled.gradient == pytest.approx(3 * largest, rel=0.02)


def test_the_smoothness_of_every_convolution_is_measured():
    images, _ = digits(16, torch.float32)
    model = zoo.load(NAME)
    found = by_layer(model, images)
    assert set(found) == {"network", *(name for name, m in model.network.named_modules() if isinstance(m, nn.Conv2d))}
    assert all(
        0 < values.pairs <= 1.05 * values.gradient for values in found.values() if values is not found["network"]
    )


@pytest.mark.parametrize(
    ("before", "under_fgsm", "under_pgd", "alarmed"),
    [
        (None, 0.50, 0.36, False),
        (None, 0.50, 0.34, True),
        (0.50, 0.42, 0.41, False),
        (0.50, 0.40, 0.39, True),
        (0.30, 0.60, 0.50, False),
    ],
)
def test_a_gap_and_a_fall_each_raise_the_alarm(monkeypatch, recwarn, before, under_fgsm, under_pgd, alarmed):
    alarm, module = OverfittingAlarm(AdversarialTraining(eps=0.02)), _Module(zoo.load(NAME))
    alarm.load_state_dict({"before": before, "alarms": []})
    shares = iter([under_fgsm, under_pgd])
    monkeypatch.setattr("zoo.training.adversarial.is_right", lambda *_: torch.arange(100) < 100 * next(shares) - 0.5)
    alarm.on_validation_epoch_end(_Trainer, module)
    assert bool(alarm.alarms) == alarmed == any("catastrophic" in str(warning.message) for warning in recwarn)


def test_efforts_are_the_smallest_of_all_attacks():
    values = {"deepfool": torch.tensor([1.0, 2.0]), "ddn": torch.tensor([2.0, 1.5])}
    result = Result({"eps": EPS}, values)
    assert result.effort().tolist() == [1.0, 1.5] and set(values) < set(EFFORTS)


def test_the_page_shows_the_smoothness_that_was_measured():
    page = benchmark.PAGE.read_text(encoding="utf-8")
    assert reports.filled(page, benchmark.blocks(), others=r"\w+") == page


def test_what_is_right_within_a_distance_counts_all_images():
    efforts = torch.tensor([0.0, 0.2, 0.5, 0.6, float("inf")])
    table = effort_table([Result({"checkpoint": "digits_cnn6_conv", "eps": EPS}, {"ddn": efforts})], {})
    header, _, row = ([cell.strip() for cell in line.split("|")] for line in table.splitlines())
    assert header[-2] == "right within 0.5, %" and row[-2].startswith("40.0 (") and row[2] == "4 of 5"


def test_efforts_that_other_attacks_found_are_not_compared():
    def result(operator, *attacks):
        about = {"checkpoint": f"digits_cnn6_{operator}", "content": "same", "eps": 0.1}
        return Result(about, dict.fromkeys(attacks, torch.tensor([1.0, 2.0, 3.0])))

    mine = result("tanh_cosine", "deepfool")
    for twin, told in ((result("conv", "deepfool"), "1.00 (1.00–1.00)"), (result("conv", "deepfool", "ddn"), "–")):
        row = effort_table([mine], {"digits_cnn6_tanh_cosine": twin}).splitlines()[-1]
        assert row.split("|")[6].strip() == told


def test_two_networks_are_compared_image_by_image():
    def result(name, kept, content="same"):
        values = {Step(attack, EPS).key: torch.tensor(kept, dtype=torch.float32) for attack in ("fgsm", "pgd")}
        return Result({"checkpoint": f"digits_cnn6_{name}", "eps": EPS, "content": content}, values)

    plain = result("conv", [1] * 2 + [0] * 8)
    bounded, other = result("tanh_cosine", [0] + [1] * 9), result("ball_cosine", [0] * 10, content="other")
    table = paired_table([plain, bounded, other])
    header, _, *rows = ([cell.strip() for cell in line.split("|")] for line in table.splitlines())
    assert header[1:4] == ["images that this network alone, conv alone names right", "tanh_cosine", "ball_cosine"]
    # Of nine that are right with one of the two, one or fewer with the plain one, and likewise the other way round.
    p = 2 * (1 + 9) / 2**9
    assert [row[2:4] for row in rows] == [[f"8, 1 (p = {p:.3f})", "–"]] * 3
    # Where no two disagree there is nothing to be told.
    assert len(paired_table([plain, result("tanh_cosine", [1] * 2 + [0] * 8)]).splitlines()) == 2


def test_l2_attacks_are_run_on_images_of_all_places(tmp_path, monkeypatch):
    monkeypatch.setitem(PROBES, "deepfool", lambda attacked, images, labels, eps, seed: labels.float())
    labels = Digits().evenly_spaced("test", 8)[1]
    for count, places in ((4, [1, 3, 5, 7]), (2, [2, 6])):
        settings = {"limit": 8, "effort_limit": count, "work": tmp_path}
        result = evaluate(NAME, Digits(), steps("clean", "deepfool"), **settings)
        assert result.effort().tolist() == labels[places].tolist()
