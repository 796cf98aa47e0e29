"""How robust a checkpoint is: each image under each attack, whatever was measured before being kept."""

import dataclasses
import hashlib
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import zoo
from operators.lookup import unknown_name
from zoo.checkpoints.loading import read_config, write_whole
from zoo.data import ImageData
from zoo.data.image_files import evenly_spaced
from zoo.models.building import ModelSpec, is_plain
from zoo.provenance import origin
from zoo.robustness.probes import AT_SEVERAL_EPS, ATTACKS, EFFORTS, GRADIENT_ATTACKS, PROBES, Subject, exact_arithmetic
from zoo.training.classifier import check_data

# In units of pixels in [0, 1]: the largest change of a pixel unless another is asked for, those at which FGSM and BIM
# are compared with the paper, and those of the curve.
EPS = 8 / 255
PAPER_EPS = tuple(level / 255 for level in (2, 4, 8, 16))
CURVE_EPS = tuple(level / 255 for level in (0, 1, 2, 4, 8, 16, 32, 64, 128))
# For comparison with the paper only; the headline is the worst case.
COMPARED = ("fgsm", "bim", "bim_quarter")
BATCH = 50
# The seed of a batch is this one and the number of its first image.
SEED = 0
# Numbers of another protocol are not mixed with those of this one.
PROTOCOL = 1


@dataclasses.dataclass(frozen=True)
class Step:
    """One measurement of all images: a name of ``zoo.robustness.probes.PROBES`` and, if that depends on it, ε."""

    probe: str
    eps: float | None = None

    @property
    def key(self) -> str:
        return self.probe if self.eps is None else f"{self.probe}@{self.eps:.6f}"


def compared_eps(eps: float) -> list[float]:
    """Return the ε at which FGSM and BIM are run: the paper's, whose own is not known, may be one of these."""
    return sorted({*PAPER_EPS, eps})


def protocol(eps: float = EPS) -> list[Step]:
    """Return all that is measured, what costs least first."""
    steps = [*map(Step, ("batch_dependence", "gradient_norm", "cross_entropy_gradient"))]
    steps += [Step(attack, eps) for attack in GRADIENT_ATTACKS]
    steps += [Step(attack, level) for level in compared_eps(eps) for attack in COMPARED]
    steps += [Step("curve", level) for level in CURVE_EPS]
    steps += [Step(name, eps) for name in ATTACKS if name not in GRADIENT_ATTACKS]
    return list(dict.fromkeys([*steps, *map(Step, EFFORTS)]))


@dataclasses.dataclass(frozen=True)
class Result:
    """What was measured of a checkpoint.

    Attributes:
        about: checkpoint, sha256, data set, split, number of images, ε, whether it was trained on attacked images, what
            it was measured on and with.
        values: by the key of each step one number for each image; of L2 attacks for evenly spaced ones of these.
        flags: what AutoAttack found suspicious.
    """

    about: Mapping[str, Any]
    values: Mapping[str, Tensor]
    flags: Sequence[str] = ()

    @property
    def eps(self) -> float:
        return self.about["eps"]

    def of(self, probe: str, eps: float | None = None) -> Tensor | None:
        """Return the values of a step, at the result's ε if it has one; None if it was not measured."""
        found = self.values.get(Step(probe, eps).key)
        return self.values.get(Step(probe, self.eps).key) if found is None and eps is None else found

    def accuracy(self, probe: str, eps: float | None = None) -> float | None:
        """Return the share of images that the network names right under an attack."""
        values = self.of(probe, eps)
        return None if values is None else values.mean().item()

    def worst(self) -> Tensor:
        """Return 1 for each image that is named right under every attack that was measured up to ε, else 0."""
        levels = (*compared_eps(self.eps), *CURVE_EPS)
        steps = [Step(attack, self.eps) for attack in ATTACKS]
        steps += [Step(name, eps) for name in AT_SEVERAL_EPS for eps in levels if eps <= self.eps]
        return torch.stack([self.values[step.key] for step in steps if step.key in self.values]).amin(0)

    def worst_of(self, attacks: Iterable[str]) -> Tensor:
        """Return 1 for each image that is named right under each of these attacks that was measured, else 0."""
        return torch.stack([values for values in map(self.of, attacks) if values is not None]).amin(0)

    def unmeasured(self) -> list[str]:
        """Return what of the protocol, but for the L2 attacks, was not measured."""
        steps = [step for step in protocol(self.eps) if step.probe not in EFFORTS]
        return list(dict.fromkeys(step.probe for step in steps if step.key not in self.values))

    def curve(self) -> dict[float, float]:
        """Return the accuracy at each ε of the curve that was measured."""
        shares = {eps: self.accuracy("curve", eps) for eps in CURVE_EPS}
        return {eps: share for eps, share in shares.items() if share is not None}

    def effort(self) -> Tensor | None:
        """Return how far in L2 the nearest mistake is that any attack found of each image; None if none was tried."""
        measured = [values for values in map(self.of, EFFORTS) if values is not None]
        return torch.stack(measured).amin(0) if measured else None

    def is_of_the_same_images(self, other: "Result") -> bool:
        """Return whether the numbers of both, at the same place, are of the same image, and of the same ε."""
        return all(self.about.get(what) == other.about.get(what) for what in ("content", "eps"))

    def write(self, path: Path) -> None:
        """Write it as JSON: of attacks one digit an image, of lengths five decimals."""
        packed = {key: _packed(values) for key, values in self.values.items()}
        record = {**self.about, "flags": list(self.flags), "values": packed}
        write_whole(path, json.dumps(record, indent=1, ensure_ascii=False, allow_nan=False) + "\n")

    @classmethod
    def read(cls, path: Path) -> "Result":
        """Return a result that :meth:`write` wrote.

        Raises:
            ValueError: a file that is none.
        """
        try:
            about = json.loads(path.read_text(encoding="utf-8"))
            values = {key: _unpacked(packed) for key, packed in about.pop("values").items()}
            return cls(about, values, about.pop("flags"))
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path} holds no result of python -m zoo robustness ({error!r}); remove it") from error


class Ledger:
    """A file to which the numbers of each batch are added as they come, so that a killed run loses one batch at most.

    Args:
        folder, name: of the file, which is called after the name and the identity.
        identity: what the numbers are of, as JSON-able values; those of anything else have a file of their own.
    """

    def __init__(self, folder: Path, name: str, identity: Mapping[str, Any]) -> None:
        text = json.dumps(identity)
        self.path = folder / f"{name}-{hashlib.sha256(text.encode()).hexdigest()[:12]}.jsonl"
        folder.mkdir(parents=True, exist_ok=True)
        lines = self.path.read_text(encoding="utf-8").splitlines() if self.path.is_file() else [text]
        whole = [row for row in map(_parsed, lines) if row is not None]
        self.rows = {(row["key"], row["start"]): row for row in whole[1:]}
        # A line that a kill has cut off would spoil the next one.
        write_whole(self.path, "".join(json.dumps(row) + "\n" for row in whole))

    def add(self, key: str, start: int, values: Tensor, flags: Sequence[str]) -> None:
        row = {"key": key, "start": start, "values": [_packed_number(v) for v in values.tolist()], "flags": [*flags]}
        self.rows[key, start] = row
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")


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
        tell: is told the step, and how many batches of how many are done.

    Raises:
        ValueError: no such checkpoint, images that are not those of the network and the others, or a limit below 1.
    """
    for name, number in {"limit": limit, "effort_limit": effort_limit}.items():
        if number is not None and number < 1:
            raise ValueError(f"{name} must be at least 1, got {number}")
    model = zoo.load(where, device=device)
    check_data(model.spec, data)
    config = read_config(zoo.find(where))
    companions = {name: zoo.load(name, device=device) for name in others}
    for companion in companions.values():
        check_data(companion.spec, data)
    images, labels = data.evenly_spaced("test", limit or len(data.split("test")))
    content = hashlib.sha256(images.numpy().tobytes() + labels.numpy().tobytes()).hexdigest()
    hashes = [read_config(zoo.find(name))["sha256"] for name in others]
    identity = {"sha256": config["sha256"], "images": content, "others": hashes, "device": str(device)}
    ledger = Ledger(work, config["name"], {**identity, "batch": BATCH, "seed": SEED, "protocol": PROTOCOL})

    # In a data set that is sorted, the first ones would be of some classes only.
    spread = evenly_spaced(effort_limit or len(labels), len(labels))

    def places(step: Step) -> Sequence[int]:
        return spread if step.probe in EFFORTS else range(len(labels))

    def key_of(step: Step) -> str:
        return f"{step.key} of {len(spread)}" if step.probe in EFFORTS else step.key

    def batches(step: Step) -> list[tuple[Step, int, int]]:
        count = len(places(step))
        return [(step, start, min(start + BATCH, count)) for start in range(0, count, BATCH)]

    def is_known(step: Step, start: int, stop: int) -> bool:
        return len(ledger.rows.get((key_of(step), start), {"values": ()})["values"]) >= stop - start

    tasks = [batch for step in steps for batch in batches(step)]
    with exact_arithmetic():
        for done, (step, start, stop) in enumerate(tasks):
            tell(step.key, done, len(tasks))
            if is_known(step, start, stop):
                continue
            subject = Subject(model, companions)
            chosen = list(places(step)[start:stop])
            batch = images[chosen].to(device), labels[chosen].to(device)
            values = PROBES[step.probe](subject, *batch, step.eps or 0.0, SEED + start)
            ledger.add(key_of(step), start, values.cpu(), subject.flags)
    tell("done", len(tasks), len(tasks))
    values: dict[str, list[float]] = {}
    flags: list[str] = []
    # With what was measured in earlier calls.
    for known in map(batches, dict.fromkeys([*protocol(eps), *steps])):
        for step, start, stop in known if all(is_known(*batch) for batch in known) else ():
            row = ledger.rows[key_of(step), start]
            values.setdefault(step.key, []).extend(map(float, row["values"][: stop - start]))
            flags += [flag for flag in row["flags"] if flag not in flags]
    about = {
        "checkpoint": config["name"],
        "sha256": config["sha256"],
        "data": data.title,
        "split": "test",
        "content": content,
        "images": len(labels),
        "in_chans": data.in_chans,
        "eps": eps,
        "others": list(others),
        "adversarial": config["training"].get("adversarial"),
        **origin(torch.device(device)),
    }
    return Result(about, {key: torch.tensor(numbers) for key, numbers in values.items()}, flags)


def companions_of(name: str) -> list[str]:
    """Return the embedded checkpoints of the same data and architecture as this one: the plain twin, and one other."""
    try:
        config = read_config(zoo.find(name))
    except ValueError:
        return []
    family = config["name"].removesuffix(ModelSpec.from_dict(config).operator_name)
    relatives = [other for other in zoo.list_checkpoints() if other.startswith(family) and other != config["name"]]
    return sorted(relatives, key=is_plain, reverse=True)[:2]


def chosen_steps(names: Sequence[str], eps: float) -> list[Step]:
    """Return the steps of the protocol with these names, "clean" among them; all of them if none is given.

    Raises:
        ValueError: an unknown name.
    """
    legal = list(dict.fromkeys(step.probe for step in protocol(eps)))
    for name in names:
        if name not in legal:
            raise ValueError(unknown_name("attack", name, legal))
    return [step for step in protocol(eps) if not names or step.probe in (*names, "clean")]


def _packed(values: Tensor) -> str | list[float | str]:
    if ((values == 0) | (values == 1)).all():
        return "".join(str(int(value)) for value in values)
    return [_packed_number(float(f"{value:.5g}")) for value in values.tolist()]


def _unpacked(packed: str | list[float | str]) -> Tensor:
    return torch.tensor([float(value) for value in packed])


def _packed_number(value: float) -> float | str:
    """JSON has neither "inf" nor "nan" among its numbers."""
    return value if math.isfinite(value) else str(value)


def _parsed(line: str) -> dict[str, Any] | None:
    try:
        return json.loads(line)
    except ValueError:
        return None
