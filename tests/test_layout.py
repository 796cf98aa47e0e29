"""Imports run downward only, ``operators`` is light, and loading a model never imports lightning."""

import ast
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

# A file may import only from files of a lower rank.
RANKS = {
    "zoo/data/__init__.py": 10,
    "zoo/callbacks.py": 11,
    "zoo/training/__init__.py": 0,
    "zoo/robustness/__init__.py": 0,
    "zoo/experiments/__init__.py": 0,
    "zoo/runs/__init__.py": 0,
    "zoo/checkpoints/__init__.py": 0,
    "zoo/models/__init__.py": 0,
    "operators/lookup.py": 0,
    "operators/running_norm.py": 0,
    "operators/magnitude.py": 1,
    "operators/angular.py": 1,
    "operators/fused.py": 1,
    "operators/functional.py": 2,
    "operators/conv.py": 3,
    "operators/timm_conv.py": 3.1,
    "operators/convert.py": 4,
    "operators/calibration.py": 4,
    "operators/fold.py": 4,
    "operators/__init__.py": 5,
    "zoo/architectures/network.py": 6,
    "zoo/architectures/cnn.py": 6.1,
    "zoo/architectures/resnet.py": 6.1,
    "zoo/architectures/__init__.py": 6.2,
    "zoo/models/transform.py": 6,
    "zoo/models/building.py": 7,
    "zoo/checkpoints/card.py": 7,
    "zoo/errors.py": 7,
    "zoo/checkpoints/hub.py": 7.1,
    "zoo/checkpoints/weights.py": 7.1,
    "zoo/checkpoints/loading.py": 8,
    "zoo/checkpoints/starting_points.py": 8.5,
    "zoo/checkpoints/timm_entry_points.py": 8.5,
    "zoo/__init__.py": 9,
    "zoo/randomness.py": 6,
    "zoo/data/augmentation.py": 6.1,
    "zoo/data/loaders.py": 6.1,
    "zoo/data/image_files.py": 9.5,
    "zoo/data/preflight.py": 9.6,
    "zoo/data/module.py": 9.9,
    "zoo/training/callbacks.py": 10,
    "zoo/runs/last_checkpoint.py": 10,
    "zoo/runs/record.py": 10.05,
    "zoo/training/sharding.py": 10,
    "zoo/provenance.py": 6,
    "zoo/training/finite.py": 10,
    "zoo/experiments/pictures.py": 10,
    "zoo/robustness/attacks.py": 6,
    "zoo/robustness/smoothness.py": 7.1,
    "zoo/training/adversarial.py": 10,
    "zoo/robustness/probes.py": 6.1,
    "zoo/robustness/evaluation.py": 10.2,
    "zoo/robustness/masking.py": 10.3,
    "zoo/robustness/report.py": 10.45,
    "zoo/training/classifier.py": 10.1,
    "zoo/training/cli.py": 10.2,
    "zoo/training/export.py": 10.2,
    "zoo/checkpoints/publishing.py": 10,
    "zoo/experiments/recipes.py": 10.3,
    "zoo/experiments/measures.py": 10,
    "zoo/experiments/tables.py": 10.4,
    "zoo/experiments/pages.py": 10.5,
    "zoo/__main__.py": 10.6,
    "train.py": 11,
    "hubconf.py": 11,
}
SOURCES = sorted(
    str(path.relative_to(ROOT))
    for path in [*ROOT.glob("operators/**/*.py"), *ROOT.glob("zoo/**/*.py"), ROOT / "train.py", ROOT / "hubconf.py"]
)


def imported_files(source: str) -> set[str]:
    """Return the project's files that a file imports, as paths from the root."""
    found = set()
    for node in ast.walk(ast.parse((ROOT / source).read_text(encoding="utf-8"))):
        modules = []
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{source}: imports are absolute"
            submodules = [f"{node.module}.{alias.name}" for alias in node.names]
            modules = [name for name in submodules if path_of(name)] or [node.module]
        found |= {path_of(module) for module in modules} - {None}
    return found


def path_of(module: str) -> str | None:
    base = module.replace(".", "/")
    return next((path for path in (f"{base}.py", f"{base}/__init__.py") if (ROOT / path).is_file()), None)


def test_every_file_has_a_rank():
    assert SOURCES == sorted(RANKS)


@pytest.mark.parametrize("source", SOURCES)
def test_imports_run_downward(source):
    wrong = {path for path in imported_files(source) if RANKS[path] >= RANKS[source]}
    assert not wrong, f"{source} imports {wrong}"


def run(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT).stdout


def test_operators_need_only_torch():
    assert run(
        "import sys, torch; before = set(sys.modules); import operators; "
        "print(sorted({name.split('.')[0] for name in set(sys.modules) - before} - {'operators'}))"
    ) in ("[]\n", "['concurrent']\n")


def test_importing_zoo_and_loading_a_checkpoint_imports_no_lightning():
    assert (
        run(
            "import sys, zoo; [zoo.load(name) for name in zoo.list_checkpoints()]; "
            "print([name for name in sys.modules if name.split('.')[0] in ('lightning', 'pytorch_lightning')])"
        )
        == "[]\n"
    )


def test_every_dependency_has_a_floor():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    requirements = sum(project["optional-dependencies"].values(), project["dependencies"])
    unbounded = [requirement for requirement in requirements if ">=" not in requirement]
    assert [requirement for requirement in unbounded if not requirement.startswith("decoupled-zoo[")] == []


def test_nothing_of_this_machine_is_committed():
    files = subprocess.run(["git", "ls-files"], capture_output=True, text=True, cwd=ROOT).stdout.split()
    if not files:
        pytest.skip("not a git checkout")
    too_large = [name for name in files if (ROOT / name).is_file() and (ROOT / name).stat().st_size > 4 * 2**20]
    assert too_large == []


@pytest.mark.parametrize("page", ["checkpoints", "training"])
def test_every_test_that_a_page_names_exists(page):
    text = (ROOT / f"docs/{page}.md").read_text(encoding="utf-8")
    files = dict(reversed(pair) for pair in re.findall(r"`(tests/\w+\.py)` \((\w)\)", text))
    # A row names the letter of a file, and then tests in it.
    named, letter = [], None
    for new, test in re.findall(r"(?:\b(\w): )?`(test_\w+)`", text):
        letter = new or letter
        named.append((letter, test))
    assert len(named) > 15
    for letter, test in named:
        assert f"\ndef {test}(" in (ROOT / files[letter]).read_text(encoding="utf-8"), (letter, test)
