"""What is measured of a network, in which order, and at which ε."""

import dataclasses
from collections.abc import Sequence

from operators.lookup import unknown_name
from zoo.robustness.probes import (
    ATTACKS,
    EFFORTS,
    GRADIENT_ATTACKS,
)

# The largest change of a pixel in [0, 1] unless another is asked for, those at which FGSM and BIM are compared with the
# paper, and those of the curve.
EPS = 8 / 255
PAPER_EPS = tuple(level / 255 for level in (2, 4, 8, 16))
CURVE_EPS = tuple(level / 255 for level in (0, 1, 2, 4, 8, 16, 32, 64, 128))

# These are run for comparison with the paper only; the headline is the worst case.
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
