"""The README is true: its code runs, its commands exist, its tables are the registries' and the measured numbers."""

import re
import shlex
import sys
from pathlib import Path

import pytest
from PIL import Image
from sklearn.datasets import load_digits

import train
import zoo
from benchmarks import conversion, report
from benchmarks.photos import write_photos
from operators import ANGULARS, MAGNITUDES, DecoupledConv2d
from zoo.commands import console as command_line
from zoo.markdown import filled

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
PYTHON = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
BASH = re.findall(r"```bash\n(.*?)```", README, re.DOTALL)


def write_digits(folder, count):
    digits = load_digits()
    for index in range(count):
        path = folder / str(digits.target[index]) / f"{index}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray((digits.images[index] * 15.9).astype("uint8")).save(path)


@pytest.mark.parametrize("number", range(len(PYTHON)))
def test_the_code_runs(number, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_digits(tmp_path, 1)
    (tmp_path / "0/0.png").rename("digit.png")
    if "outputs/photos" in PYTHON[number]:
        write_photos(tmp_path / "my_photos")
        zoo.save(zoo.build("resnet20", "tanh_cosine"), Path("outputs/photos_resnet20_tanh_cosine"))
    code = PYTHON[number].replace('"ORG/decoupled-zoo"', repr(str(ROOT))).replace("trust_repo=True", "source='local'")
    names = {}
    exec(code.replace("pretrained=True", "pretrained=False"), names)
    printed = capsys.readouterr().out
    if "hub.load" in code:
        assert re.fullmatch(r"0 \d+\.\d%\n(\d \d+\.\d%\n){2}", printed)
    if "convert_decoupled" in code:
        assert "tanh_cosine(weighting=linear): 53 converted, 0 skipped" in printed
        assert names["report"].images == 8 and len(names["report"].layers) == 53
    if "DecoupledConv2d(" in code:
        assert isinstance(names["layer"], DecoupledConv2d)


@pytest.mark.filterwarnings("ignore:The number of training batches")  # as few as a test can do with
def test_the_fine_tuning_commands_run(tmp_path, monkeypatch, capsys):
    commands = next(block for block in BASH if "train.py fit" in block)
    monkeypatch.chdir(tmp_path)
    write_photos(tmp_path / "my_photos")
    for command in commands.strip().splitlines():
        words = shlex.split(command.replace("configs/", f"{ROOT}/configs/"))
        program = 3 if words[:3] == ["python", "-m", "zoo"] else 2
        assert program == 3 or words[:2] == ["python", "train.py"]
        short = ["--trainer.max_epochs=1"] if words[2] == "fit" else []
        monkeypatch.setattr(sys, "argv", [*words[program - 1 :], *short])
        (command_line if program == 3 else train).main()
    assert "3 of 3 images" in capsys.readouterr().out
    assert zoo.load("outputs/photos_resnet20_tanh_cosine").class_names == ("flower", "portrait", "temple")


def test_the_commands_exist():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in re.findall(r"`make (\w+)`|^make (\w+)", README, re.MULTILINE):
        assert re.search(rf"^{''.join(target)}:", makefile, re.MULTILINE), target
    for path in re.findall(r"`((?:operators|zoo|configs|benchmarks|docs)/[\w./]*)`|\]\((docs/\S+)\)", README):
        assert (ROOT / "".join(path)).exists(), path


def rows_of(header):
    """Return the cells of the table below a header, without backquotes."""
    table = README[README.index(header) :].split("\n\n")[0].splitlines()[2:]
    return [[cell.strip().replace("`", "") for cell in re.split(r"(?<!\\)\|", row)[1:-1]] for row in table]


def test_the_tables_of_operators_are_the_registries():
    expected = [[name, yes(kind.bounded), yes(kind.smooth)] for name, kind in MAGNITUDES.items()]
    assert [[name, *flags] for name, _, *flags in rows_of("| magnitude |")] == expected
    assert [name for name, _ in rows_of("| angular function |")] == list(ANGULARS)


def yes(flag):
    return "yes" if flag else "no"


def test_the_costs_are_what_was_measured():
    networks, layers, pipeline = (report.read(f"{name}.json") for name in ("models", "operators", "pipeline"))
    assert report.network_table(networks["rows"]) in README
    assert networks["hardware"] in README and f"torch {networks['torch']}" in README
    assert report.PAGE.read_text(encoding="utf-8") == report.page(layers, networks, pipeline)


def test_the_page_on_conversion_is_what_was_measured():
    page = conversion.PAGE.read_text(encoding="utf-8")
    assert page == filled(page, conversion.blocks())
    assert conversion.readme_table(report.read("imagenet.json")) in README
