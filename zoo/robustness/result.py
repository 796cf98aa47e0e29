"""What was measured of a checkpoint, image by image."""

import dataclasses
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from zoo.files import write_whole
from zoo.robustness.probes import (
    AT_SEVERAL_EPS,
    ATTACKS,
    EFFORTS,
)
from zoo.robustness.protocol import CURVE_EPS, Step, compared_eps, protocol


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


def _packed(values: Tensor) -> str | list[float | str]:
    if ((values == 0) | (values == 1)).all():
        return "".join(str(int(value)) for value in values)
    return [packed_number(float(f"{value:.5g}")) for value in values.tolist()]


def _unpacked(packed: str | list[float | str]) -> Tensor:
    return torch.tensor([float(value) for value in packed])


def packed_number(value: float) -> float | str:
    """JSON has neither "inf" nor "nan" among its numbers."""
    return value if math.isfinite(value) else str(value)
