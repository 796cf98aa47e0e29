"""The whole run of ``python -m zoo robustness``: attack a checkpoint, tell and draw what was found, and record it."""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path

import zoo
from zoo.checkpoints.catalogue import find_local
from zoo.data.measuring import data_for
from zoo.files import write_whole
from zoo.models.names import is_plain
from zoo.robustness.evaluation import companions_of, evaluate
from zoo.robustness.pictures import draw, draw_attacked
from zoo.robustness.probes import require_packages
from zoo.robustness.protocol import BATCH, EPS, chosen_steps
from zoo.robustness.report import card_record, report
from zoo.robustness.result import Result


@dataclasses.dataclass(frozen=True)
class Assessment:
    """What a run found, and where it was written.

    Attributes:
        result: of the checkpoint.
        report: in Markdown, beside the plain twin's result if that was measured on the same images.
        files: the numbers, the report and the pictures.
        left_out: the file of a twin's result that is of other images or another ε, if there is one.
    """

    result: Result
    report: str
    files: Sequence[Path]
    left_out: Path | None = None


def assess(
    where: str | Path,
    *,
    data: str | None = None,
    root: str | None = None,
    attacks: Sequence[str] = (),
    eps: float = EPS,
    limit: int = 1000,
    effort_limit: int = 100,
    transfer: Sequence[str] | None = None,
    device: str = "cpu",
    folder: Path,
    record: bool = False,
    tell: Callable[[str, int, int], None] = lambda step, done, total: None,
    show: Callable[["Assessment"], None] = lambda found: None,
) -> Assessment:
    """Attack a checkpoint and write numbers, report and pictures into ``folder``; a killed run goes on.

    Args:
        where: the checkpoint's name or folder, or a Hub repository.
        data: a name of ``zoo.data.DATA``; by default what the checkpoint was measured on.
        root: the folder of the images.
        attacks: only these; all of the protocol by default.
        eps: largest change of a pixel in [0, 1].
        limit: test images.
        effort_limit: how many of these the L2 attacks are run on.
        transfer: checkpoints to take adversarial images from; the twin and another if they are known by default.
        device: "cpu" or "cuda".
        record: whether the outcome is written into the checkpoint's config and card.
        tell: as of :func:`evaluate`.
        show: is given what was found before it is recorded, which may be refused.

    Raises:
        ValueError: no such checkpoint or attack, images that are not the network's, or an outcome that is not recorded,
            for attacks were left out or the checkpoint is in the Hub.
        ModuleNotFoundError: an attack needs the extra ``robustness``.
    """
    steps = chosen_steps(attacks, eps)
    require_packages(step.probe for step in steps)
    if record:
        find_local(where)
    images = data_for(where, data, root)
    others = companions_of(where) if transfer is None else transfer
    steps = [step for step in steps if others or step.probe != "transfer"]
    model = zoo.load(where, device=device)
    settings = {"eps": eps, "limit": limit, "effort_limit": effort_limit, "others": others, "device": device}
    result = evaluate(where, images, steps, **settings, work=folder / "work", model=model, tell=tell)
    picture = folder / f"{result.about['checkpoint']}_images.png"
    draw_attacked(model.cpu(), *images.evenly_spaced("test", BATCH), eps, picture)
    found = _written(result, folder / f"{next(filter(is_plain, others), None)}.json", folder)
    show(found)
    if record:
        if missing := result.unmeasured():
            raise ValueError(f"not recorded, for {', '.join(missing)} was not measured; leave out --attack")
        zoo.record(where, robustness=card_record(result))
    return found


def _written(result: Result, twin_path: Path, folder: Path) -> Assessment:
    """Write what a result says, beside its twin's if that is of the same images."""
    name = result.about["checkpoint"]
    twin, left_out = _twin(result, twin_path)
    text = report(result, twin)
    result.write(folder / f"{name}.json")
    write_whole(folder / f"{name}.md", text)
    draw([result, *([twin] if twin else [])], folder / name)
    return Assessment(result, text, sorted(folder.glob(f"{name}[._]*")), left_out)


def _twin(result: Result, path: Path) -> tuple[Result | None, Path | None]:
    """Return the twin's result of the same images, or the file whose result is of others."""
    twin = Result.read(path) if path.is_file() else None
    return (twin, None) if twin is None or result.is_of_the_same_images(twin) else (None, path)
