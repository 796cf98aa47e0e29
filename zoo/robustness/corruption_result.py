"""What was measured of a checkpoint on corrupted images, image by image."""

import base64
import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy
import torch
from torch import Tensor

from zoo.corruptions.corruption import CORRUPTIONS, SEVERITIES
from zoo.corruptions.ways import severity_key
from zoo.files import write_whole
from zoo.models.names import twin_of
from zoo.statistics import paired_difference

# The fifteen that the mean is of.
COUNTED = tuple(name for name, corruption in CORRUPTIONS.items() if not corruption.spare)


@dataclasses.dataclass(frozen=True)
class CorruptionResult:
    """Which images a network names right, corrupted in each way.

    Attributes:
        about: checkpoint, sha256, operator, data set, split, number and hash of the images, and what it was measured
            with.
        right: bool (N,) by the key of each way: ``clean``, ``fog:3``, ``contrast x 0.5``.
    """

    about: Mapping[str, Any]
    right: Mapping[str, Tensor]

    def accuracy(self, key: str) -> float:
        """Return the share of images that are named right, in percent."""
        return 100 * self.right[key].double().mean().item()

    def shares(self, name: str) -> Tensor:
        """Return for each image at how many of the five severities of a corruption it is named right, as a share."""
        return torch.stack([self.right[severity_key(name, severity)] for severity in SEVERITIES]).double().mean(0)

    def mean_accuracy(self, names: Sequence[str] = COUNTED) -> float:
        """Return the mean accuracy over corruptions and severities, in percent."""
        return 100 * torch.stack([self.shares(name) for name in names]).mean().item()

    def corruption_error(self, twin: "CorruptionResult") -> float:
        """Return the mean over corruptions of this network's error by its twin's, over all severities, in percent.

        It is infinite or NaN if the twin errs nowhere under one of them.

        Source: Hendrycks and Dietterich, Benchmarking Neural Network Robustness to Common Corruptions and
            Perturbations, ICLR 2019, section 4.1, with the twin in place of AlexNet.
        """
        ratios = [(1 - self.shares(name).mean()) / (1 - twin.shares(name).mean()) for name in COUNTED]
        return 100 * torch.stack(ratios).mean().item()

    def difference(self, twin: "CorruptionResult", names: Sequence[str] = COUNTED) -> tuple[float, float, float]:
        """Return by how many points it is righter than its twin on the same images, with the 95 % interval."""
        mine, theirs = (torch.stack([result.shares(name) for name in names]).mean(0) for result in (self, twin))
        mean, low, high = paired_difference(mine.tolist(), theirs.tolist())
        return 100 * mean, 100 * low, 100 * high

    def is_of_the_same_images(self, other: "CorruptionResult") -> bool:
        """Say whether both were measured on the same images."""
        return self.about["content"] == other.about["content"]

    def write(self, path: Path) -> None:
        packed = {
            key: base64.b64encode(numpy.packbits(values.numpy()).tobytes()).decode()
            for key, values in self.right.items()
        }
        about = {**self.about, "accuracy": {key: round(self.accuracy(key), 2) for key in self.right}}
        lines = ",\n".join(f"{json.dumps(key)}: {json.dumps(text)}" for key, text in packed.items())
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, f'{{"about": {json.dumps(about, ensure_ascii=False)},\n"right": {{\n{lines}\n}}}}\n')

    @classmethod
    def read(cls, path: Path) -> "CorruptionResult":
        """Return the result that a file holds.

        Raises:
            ValueError: it holds none.
        """
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            count = content["about"]["images"]
            right = {key: _unpacked(text, count) for key, text in content["right"].items()}
            return cls(content["about"], right)
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path} holds no result on corrupted images ({error}); remove it") from error


def twin_among(result: CorruptionResult, results: Sequence[CorruptionResult]) -> CorruptionResult | None:
    """Return the result of the plain twin of a checkpoint, if it is among these, is of the same images, and another."""
    name = twin_of(result.about["checkpoint"], result.about["operator"])
    twins = [other for other in results if other.about["checkpoint"] == name and other is not result]
    return next((twin for twin in twins if twin.is_of_the_same_images(result)), None)


def _unpacked(text: str, count: int) -> Tensor:
    bits = numpy.unpackbits(numpy.frombuffer(base64.b64decode(text), numpy.uint8), count=count)
    return torch.from_numpy(bits.astype(bool))
