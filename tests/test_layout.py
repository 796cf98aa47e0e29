"""Imports run downward only, ``operators`` is light, and loading a model never imports lightning."""

import ast
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

# From the ground up: a wing, whether a folder or some files, imports only from those before it.
WINGS = {
    "operators": ("operators",),
    "ground floor": tuple(
        f"zoo/{name}.py"
        for name in ("arithmetic", "errors", "figures", "files", "markdown", "provenance", "randomness", "statistics")
    ),
    "architectures": ("zoo/architectures",),
    "models": ("zoo/models",),
    "explanations": ("zoo/explanations",),
    "hub": ("zoo/hub",),
    "checkpoints": ("zoo/checkpoints",),
    "public names": ("zoo/__init__.py",),
    "resuming": ("zoo/resuming",),
    "corruptions": ("zoo/corruptions",),
    "data": ("zoo/data",),
    "robustness": ("zoo/robustness",),
    "training": ("zoo/training",),
    "recipes": ("zoo/recipes",),
    "commands": ("zoo/commands",),
    "doors": ("zoo/__main__.py", "zoo/callbacks.py", "train.py", "hubconf.py"),
}
FLOORS = {place: floor for floor, places in enumerate(WINGS.values()) for place in places}
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


def floor_of(source: str) -> int | None:
    return FLOORS.get(source, FLOORS.get(source.rpartition("/")[0]))


def test_every_file_is_in_a_wing():
    assert [source for source in SOURCES if floor_of(source) is None] == []
    assert [place for place in FLOORS if not (ROOT / place).exists()] == []


@pytest.mark.parametrize("source", SOURCES)
def test_imports_run_downward(source):
    wrong = {path for path in imported_files(source) if floor_of(path) > floor_of(source)}
    assert not wrong, f"{source} imports {wrong}"


def test_no_imports_run_in_a_circle():
    imports = {source: imported_files(source) for source in SOURCES}
    while free := {source for source, needed in imports.items() if not needed}:
        imports = {source: needed - free for source, needed in imports.items() if source not in free}
    assert imports == {}


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


# One idea each: the fused kernels, and the fit of a whole network.
LONG_FILES = ("operators/fused.py",)
MOST_LINES, MOST_LINES_OF_A_FUNCTION = 400, 60


@pytest.mark.parametrize("source", SOURCES)
def test_rooms_are_small(source):
    text = (ROOT / source).read_text(encoding="utf-8")
    assert source in LONG_FILES or text.count("\n") <= MOST_LINES
    functions = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.FunctionDef)]
    long = [node.name for node in functions if node.end_lineno - node.lineno >= MOST_LINES_OF_A_FUNCTION]
    assert long == []


def test_the_version_is_told_without_an_installation():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert project["tool"]["hatch"]["version"]["path"] == "zoo/__init__.py"
    assert re.fullmatch(r"\d+\.\d+\.\d+\n", run("import zoo; print(zoo.__version__)"))


def test_packages_are_typed():
    assert all((ROOT / package / "py.typed").is_file() for package in ("operators", "zoo"))
