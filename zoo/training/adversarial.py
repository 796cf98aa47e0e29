"""Training on attacked images, and the alarm for networks that only seem to resist."""

import dataclasses
from collections.abc import Iterable
from typing import Any, Literal

import lightning as L
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from operators.evaluation_mode import evaluating
from zoo.models.image_model import ImageModel
from zoo.robustness.attacks import fgsm, is_right, pgd
from zoo.robustness.protocol import EPS

# Validation images that are attacked after each epoch, and how.
CHECKED_IMAGES, CHECKED_STEPS = 512, 10
# Catastrophic overfitting (Wong et al., Fast is better than free, 2020): shares of the validation images.
LARGEST_FALL, LARGEST_GAP = 0.10, 0.15


@dataclasses.dataclass
class AdversarialTraining:
    """Train on images that an attack has made the network mistake, in place of the images themselves.

    Args:
        attack: "pgd" (Madry et al., 2018) or "fgsm", of one step and without a random start.
        eps: largest change of a pixel in [0, 1].
        steps: of PGD.
        step: size of PGD's steps; a quarter of eps by default (2/255 for 8/255).

    Raises:
        ValueError: a number outside its range.
    """

    attack: Literal["pgd", "fgsm"] = "pgd"
    eps: float = EPS
    steps: int = 7
    step: float | None = None

    def __post_init__(self) -> None:
        if self.attack not in ("pgd", "fgsm"):
            raise ValueError(f"attack is pgd or fgsm, got {self.attack!r}")
        if not 0 < self.eps <= 1:
            raise ValueError(f"eps is a change of pixels in (0, 1], such as 0.031 (8/255), got {self.eps}")
        if self.steps < 1 or (self.step is not None and self.step <= 0):
            raise ValueError(f"steps and step must be more than 0, got {self.steps} and {self.step}")

    def perturb(self, model: ImageModel, images: Tensor, labels: Tensor, steps: int | None = None) -> Tensor:
        """Return the attacked images; the model is in evaluation mode meanwhile.

        Args:
            steps: of PGD, in place of those of training; an image is then left where it is mistaken first, and the
                random start is always the same.
        """
        with evaluating(model):
            if self.attack == "fgsm" and steps is None:
                return fgsm(model, images, labels, self.eps)
            size = self.step or self.eps / 4
            # In training, the classifier has seeded torch's own generator for the step.
            settings = {"stop_early": steps is not None, "seed": None if steps is None else 0}
            return pgd(model, images, labels, self.eps, step=size, steps=steps or self.steps, **settings)


def alarms_of(callbacks: Iterable[Callback]) -> dict[str, Any]:
    """Return, for a checkpoint's record, how images were attacked and what was alarming; nothing if none were."""
    found = [callback for callback in callbacks if isinstance(callback, OverfittingAlarm)]
    return {"adversarial": dataclasses.asdict(found[0].adversarial), "alarms": found[0].alarms} if found else {}


class OverfittingAlarm(Callback):
    """After each epoch, attack validation images by FGSM and PGD-10, and warn of catastrophic overfitting.

    That is a fall of PGD accuracy by more than 10 points in an epoch, or an accuracy under FGSM that is more than 15
    points higher. What it found is logged (``val_fgsm_accuracy``, ``val_pgd_accuracy``) and kept as ``alarms``.
    """

    def __init__(self, adversarial: AdversarialTraining) -> None:
        self.adversarial = adversarial
        self.before: float | None = None
        self.alarms: list[str] = []

    def on_validation_epoch_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        if trainer.sanity_checking or trainer.state.fn != "fit":
            return
        images, labels = (
            tensor.to(module.device) for tensor in trainer.datamodule.evenly_spaced("val", CHECKED_IMAGES)
        )
        model = module.model
        single = dataclasses.replace(self.adversarial, attack="fgsm")
        moved = {
            "fgsm": single.perturb(model, images, labels),
            "pgd": self.adversarial.perturb(model, images, labels, steps=CHECKED_STEPS),
        }
        shares = {name: is_right(model, each, labels).float().mean().item() for name, each in moved.items()}
        for name, share in shares.items():
            module.log(f"val_{name}_accuracy", share, prog_bar=True, sync_dist=True)
        fall = 0.0 if self.before is None else self.before - shares["pgd"]
        self.before = shares["pgd"]
        if fall > LARGEST_FALL or shares["fgsm"] - shares["pgd"] > LARGEST_GAP:
            found = f"under FGSM {shares['fgsm']:.3f}, under PGD-{CHECKED_STEPS} {shares['pgd']:.3f}"
            self.alarms.append(f"epoch {trainer.current_epoch + 1}: accuracy {found}")
            rank_zero_warn(
                f"catastrophic overfitting in {self.alarms[-1]}: the network only seems to resist; train on PGD, on "
                "more of its steps, or with a smaller eps or learning rate"
            )

    def state_dict(self) -> dict[str, Any]:
        return {"before": self.before, "alarms": list(self.alarms)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.before, self.alarms = state["before"], list(state["alarms"])
