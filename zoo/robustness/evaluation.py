"""How robust a checkpoint is: each image under each attack, whatever was measured before being kept."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import zoo
from zoo.arithmetic import exact_arithmetic
from zoo.checkpoints.config import read_config
from zoo.data import ImageData
from zoo.data.measuring import check_data
from zoo.models.image_model import ImageModel
from zoo.models.names import family_of, is_plain
from zoo.models.spec import ModelSpec
from zoo.provenance import origin
from zoo.robustness.ledger import Ledger, content_of
from zoo.robustness.probes import EFFORTS, PROBES, ModelUnderAttack
from zoo.robustness.protocol import BATCH, EPS, PROTOCOL, SEED, Step, protocol
from zoo.robustness.result import Result
from zoo.statistics import evenly_spaced


def evaluate(
    where: str | Path,
    data: ImageData,
    steps: Sequence[Step],
    *,
    eps: float = EPS,
    limit: int | None = 1000,
    effort_limit: int | None = 100,
    others: Sequence[str] = (),
    device: torch.device | str = "cpu",
    work: Path,
    model: ImageModel | None = None,
    tell: Callable[[str, int, int], None] = lambda step, done, total: None,
) -> Result:
    """Measure a checkpoint on test images, evenly spaced over the test split.

    The network is in evaluation mode, in float32 and not compiled; TF32 is off; every draw follows from fixed seeds.

    Args:
        where: as :func:`zoo.load` takes it.
        data: images of its classes, channels and size.
        steps: what to measure, as :func:`protocol` returns it.
        eps: of the headline.
        limit: at most so many images; None for all.
        effort_limit: of the L2 attacks, which take thousands of steps, at most so many of these, evenly spaced.
        others: checkpoints whose adversarial images are tried on this one.
        work: folder in which the numbers of each batch are kept.
        model: of the checkpoint, in evaluation mode on ``device``, if it is loaded already.
        tell: is told the step, and how many batches of how many are done.

    Raises:
        ValueError: no such checkpoint, images that are not those of the network and the others, or a limit below 1.
    """
    for name, number in {"limit": limit, "effort_limit": effort_limit}.items():
        if number is not None and number < 1:
            raise ValueError(f"{name} must be at least 1, got {number}")
    model = model or zoo.load(where, device=device)
    config = read_config(zoo.find(where))
    companions = {name: zoo.load(name, device=device) for name in others}
    for each in (model, *companions.values()):
        check_data(each.spec, data)
    images, labels = data.evenly_spaced("test", limit or len(data.split("test")))
    content = content_of(images, labels)
    ledger = _ledger(work, config, content, others, str(device))
    plan = _Plan(ledger, len(labels), effort_limit)
    tasks = [batch for step in steps for batch in plan.batches(step)]
    with exact_arithmetic(device):
        for done, (step, *place) in enumerate(tasks):
            tell(step.key, done, len(tasks))
            if not plan.is_known(step, *place):
                plan.measure(step, *place, ModelUnderAttack(model, companions), images, labels)
    tell("done", len(tasks), len(tasks))
    about = _about(config, data, content, len(labels)) | {
        "eps": eps,
        "others": list(others),
        "adversarial": config["training"].get("adversarial"),
        **origin(torch.device(device)),
    }
    # The result has the numbers of earlier calls, too.
    return plan.result(about, list(dict.fromkeys([*protocol(eps), *steps])))


def _ledger(work: Path, config: Mapping[str, Any], content: str, others: Sequence[str], device: str) -> Ledger:
    """Return the ledger of what is measured of a checkpoint on these images, with the help of these others."""
    hashes = [read_config(zoo.find(name))["sha256"] for name in others]
    identity = {"sha256": config["sha256"], "images": content, "others": hashes, "device": device}
    return Ledger(work, config["name"], {**identity, "batch": BATCH, "seed": SEED, "protocol": PROTOCOL})


def _about(config: Mapping[str, Any], data: ImageData, content: str, images: int) -> dict[str, Any]:
    """Return what a result tells of the checkpoint and the images."""
    network = {"checkpoint": config["name"], "sha256": config["sha256"]}
    shown = {"data": data.title, "split": "test", "content": content, "images": images, "in_chans": data.in_chans}
    return network | shown


class _Plan:
    """Which images each step is measured on, in which batches, and what of that a ledger has already."""

    def __init__(self, ledger: Ledger, images: int, effort_limit: int | None) -> None:
        self.ledger = ledger
        self.images = images
        # In a data set that is sorted, the first ones would be of some classes only.
        self.spread = evenly_spaced(effort_limit or images, images)

    def places(self, step: Step) -> Sequence[int]:
        return self.spread if step.probe in EFFORTS else range(self.images)

    def key(self, step: Step) -> str:
        return f"{step.key} of {len(self.spread)}" if step.probe in EFFORTS else step.key

    def batches(self, step: Step) -> list[tuple[Step, int, int]]:
        count = len(self.places(step))
        return [(step, start, min(start + BATCH, count)) for start in range(0, count, BATCH)]

    def is_known(self, step: Step, start: int, stop: int) -> bool:
        return len(self.ledger.rows.get((self.key(step), start), {"values": ()})["values"]) >= stop - start

    def measure(
        self, step: Step, start: int, stop: int, attacked: ModelUnderAttack, images: Tensor, labels: Tensor
    ) -> None:
        chosen = list(self.places(step)[start:stop])
        device = next(attacked.model.parameters()).device
        batch = images[chosen].to(device), labels[chosen].to(device)
        values = PROBES[step.probe](attacked, *batch, step.eps or 0.0, SEED + start)
        self.ledger.add(self.key(step), start, values.cpu(), attacked.flags)

    def result(self, about: Mapping[str, Any], steps: Sequence[Step]) -> Result:
        """Return what is known of all images of a step, for each step of which it is."""
        values: dict[str, Tensor] = {}
        flags: list[str] = []
        for batches in map(self.batches, steps):
            if not all(self.is_known(*batch) for batch in batches):
                continue
            rows = [(self.ledger.rows[self.key(step), start], stop - start) for step, start, stop in batches]
            values[batches[0][0].key] = torch.tensor([float(v) for row, count in rows for v in row["values"][:count]])
            flags += [flag for row, _ in rows for flag in row["flags"]]
        return Result(about, values, list(dict.fromkeys(flags)))


def companions_of(name: str) -> list[str]:
    """Return the embedded checkpoints of the same data and architecture as this one: the plain twin, and one other."""
    try:
        config = read_config(zoo.find(name))
    except ValueError:
        return []
    family = family_of(config["name"], ModelSpec.from_dict(config).operator_name)
    relatives = [other for other in zoo.list_checkpoints() if other.startswith(family) and other != config["name"]]
    return sorted(relatives, key=is_plain, reverse=True)[:2]
