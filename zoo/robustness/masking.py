"""Signs that an attack failed because gradients are hidden, and not because the network withstands it."""

import dataclasses
import math
from collections.abc import Iterator

import torch

from zoo.robustness.probes import ATTACKS, GRADIENT_ATTACKS
from zoo.robustness.result import Result

# Probes of the gradient's length; that of the margin, the first, does not vanish with confidence.
GRADIENTS = ("gradient_norm", "cross_entropy_gradient")
# The checks need these probes, beside an L2 attack.
NEEDED = (*GRADIENTS, *ATTACKS, "curve", "batch_dependence")
# Logits that differ by more than this, relative to the largest, depend on the other images of the batch.
BATCH_TOLERANCE = 1e-5


@dataclasses.dataclass(frozen=True)
class Check:
    """One sign: what is looked at, what was found, and the most that is not suspicious."""

    what: str
    found: float
    most: float
    percent: bool = True

    @property
    def passed(self) -> bool:
        # Shares are differences of float32.
        return self.found <= self.most + 1e-6

    @property
    def verdict(self) -> str:
        return "pass" if self.passed else "SUSPECTED"

    @property
    def told(self) -> str:
        """What was found, in words."""
        return f"{self.what} {self.row()[1]}"

    def row(self) -> tuple[str, str, str, str]:
        """Return what is checked, what was found, the most that passes, and the verdict, for a table."""
        if self.percent:
            return self.what, f"{100 * self.found:.1f} %", f"{100 * self.most:.1f} %", self.verdict
        return self.what, f"{self.found:.2g}", f"{self.most:.2g}", self.verdict


def checks(result: Result) -> list[Check]:
    """Return the outcome of every check whose numbers were measured."""
    return list(_checks(result))


def unlooked_for(result: Result) -> bool:
    """Return whether a check was left out because what it needs was not measured."""
    return result.effort() is None or not set(NEEDED).isdisjoint(result.unmeasured())


def suspected(result: Result) -> list[Check]:
    """Return the checks that give reason to suspect masked gradients."""
    return [check for check in checks(result) if not check.passed]


def _checks(result: Result) -> Iterator[Check]:
    named = ("noise", "fgsm", "pgd", "pgd_margin", "transfer", "square", "pgd_long", "pgd_double")
    noise, fgsm, pgd, margin, transfer, square, long, double = (
        None if (values := result.of(name)) is None else values.bool() for name in named
    )

    def share(images: torch.Tensor) -> float:
        return images.float().mean().item()

    if fgsm is not None and pgd is not None:
        yield Check("images that FGSM breaks and PGD does not", share(~fgsm & pgd), 0.005)
        yield Check("PGD is weaker than FGSM by", share(pgd) - share(fgsm), 0.01)
    if square is not None and pgd is not None:
        before = result.worst_of(GRADIENT_ATTACKS).bool()
        yield Check("Square lowers the worst case by", share(before) - share(before & square), 0.002)
    if transfer is not None and pgd is not None:
        rest = result.worst_of(name for name in ATTACKS if name != "transfer").bool()
        yield Check("images that fall to transfer only", share(~transfer & rest), 0.005)
    if pgd is not None and margin is not None:
        yield Check("PGD on cross-entropy and on the margin differ by", abs(share(pgd) - share(margin)), 0.02)
    gradients = [norms for name in GRADIENTS if (norms := result.of(name)) is not None]
    if gradients:
        dead = torch.stack([(norms == 0) | ~norms.isfinite() for norms in gradients]).any(0)
        yield Check("images with a gradient of exactly zero, or none", float(dead.sum()), 0, percent=False)
        norms = gradients[0][gradients[0].isfinite()]
        smallest = norms.quantile(0.01).item()
        ratio = norms.median().item() / smallest if smallest else math.inf
        yield Check("median of the gradients' norms over their 1st percentile", ratio, 1e6, percent=False)
    curve = result.curve()
    if len(curve) > 1:
        shares = list(curve.values())
        lowest = [min(shares[:place]) for place in range(1, len(shares))]
        rise = max(later - earlier for earlier, later in zip(lowest, shares[1:], strict=True))
        yield Check("the curve over ε rises by", max(rise, 0.0), 0.005)
        # Grey digits differ by more than that from each other; photographs do not.
        if 32 / 255 in curve and result.about["in_chans"] == 3 and not result.about["adversarial"]:
            yield Check("accuracy at 32/255, of colour images, not trained on attacks", curve[32 / 255], 0.01)
        if 128 / 255 in curve:
            yield Check("accuracy at 128/255", curve[128 / 255], 0.12)
    if pgd is not None and long is not None:
        yield Check("100 steps and 10 restarts lower PGD by", share(pgd) - share(pgd & long), 0.005)
    if pgd is not None and noise is not None:
        yield Check("images that noise breaks and PGD does not", share(~noise & pgd), 0.001)
    if pgd is not None and double is not None:
        yield Check("images that float64 changes", share(pgd != double), 0.01)
    if (effort := result.effort()) is not None:
        lost = float((~effort.isfinite()).sum())
        yield Check("images of which no L2 attack found a mistake", lost, 0, percent=False)
    if result.of("autoattack") is not None:
        yield Check("warnings of AutoAttack", len(result.flags), 0, percent=False)
    if (dependence := result.of("batch_dependence")) is not None:
        yield Check("logits depend on the batch by", dependence.max().item(), BATCH_TOLERANCE, percent=False)
