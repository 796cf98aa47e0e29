"""Bringing back what a trained network knew before its convolutions were decoupled: calibration and distillation."""

import copy
import dataclasses
import time
import warnings
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from operators import CalibrationReport, Distillation, DistillationReport, calibrate, distil
from operators.evaluation_mode import evaluating
from zoo.checkpoints.starting_points import start_from
from zoo.checkpoints.verification import agree, fingerprint
from zoo.data.unlabelled import UnlabelledImages
from zoo.models.image_model import ImageModel
from zoo.resuming.files import SafeCheckpointIO, damage_of
from zoo.training.device import Device

# The images to whose norms a converted network is fitted, and those by which it may learn from its teacher.
CALIBRATION_IMAGES, DISTILLATION_IMAGES = 256, 1024
BATCH = 16
# One in so many of the images that a network learns by is held out, to tell which state is best.
HELD_OUT = 10
# Networks of photographs learn by smaller ones, if they take them: by more of them in the same time.
LEAST_PHOTOGRAPH, LEARNING_SCALE = 128, 9 / 14
# So many seconds lie between two savings of a distillation under way.
SAVED_EVERY = 30.0

Quantile = Literal["auto"] | float


def check_quantile(quantile: Quantile | None) -> None:
    """Refuse what is no way to calibrate.

    Raises:
        ValueError: neither "auto" nor a share in (0, 1].
    """
    if quantile not in (None, "auto") and not 0 < quantile <= 1:
        raise ValueError(f'calibrate is "auto" or a quantile in (0, 1], got {quantile}')


def calibrated(model: ImageModel, images: Tensor, quantile: Quantile, **settings: Any) -> CalibrationReport:
    """Calibrate a model, in place; "auto" searches for the radii.

    Args:
        images: in [0, 1], (N, in_chans, input_size, input_size).
        settings: further ones of :func:`operators.calibrate`.
    """
    _, report = calibrate(model, [images], None if quantile == "auto" else quantile, **settings)
    # Its names are those that the layers have in the network, as in the report of the conversion.
    layers = (dataclasses.replace(layer, name=layer.name.removeprefix("network.")) for layer in report.layers)
    return dataclasses.replace(report, layers=tuple(layers))


def distilled(
    model: ImageModel,
    teacher: ImageModel,
    images: Tensor,
    epochs: int,
    *,
    seed: int = 0,
    device: torch.device | None = None,
    work: Path | None = None,
    saves: bool = True,
) -> DistillationReport:
    """Let a model learn from its teacher, in place, by images of any kind, changed anew in each epoch.

    Args:
        images: in [0, 1], (N, in_chans, size, size).
        seed: of the images' order and changes.
        device: where; by default the GPU if there is one.
        work: a file with the state of a distillation that was stopped. The same call goes on with it, and ends with
            the same weights.
        saves: whether the state is saved there, every half a minute and at the end. The file is left to the caller, who
            removes it once the model is saved.

    Raises:
        ValueError, FloatingPointError: as :func:`operators.distil`; or a teacher of other classes, channels or size.
    """
    refuse_other_teacher(model, teacher)
    originals = [next(network.parameters()).device for network in (model, teacher)]
    state = _Work(work, saves)
    found = state.found(model, teacher, {"images": len(images), "epochs": epochs, "seed": seed})
    # Other devices than these are not what the networks are tried on.
    if device is not None and device.type not in ("cpu", "cuda"):
        device = None
    chosen = Device.choose("auto" if device is None else device.type)
    place = device or torch.device(chosen.name)
    precision = state.settings.setdefault("precision", chosen.precision)
    held_out = images[::HELD_OUT]
    learnt = images[[index for index in range(len(images)) if index % HELD_OUT]] if len(images) > 1 else images
    try:
        for network in (model, teacher):
            network.to(place, memory_format=torch.channels_last)
        batches = UnlabelledImages(learnt, _learning_size(model, teacher), BATCH, seed)
        with torch.autocast(chosen.name, torch.bfloat16, enabled=precision == "bf16-mixed"):
            _, report = distil(
                model,
                teacher,
                batches,
                epochs=epochs,
                held_out=held_out.split(BATCH),
                state=found,
                after_step=state.save_in_time,
            )
    except KeyboardInterrupt:
        state.tell()
        raise
    finally:
        for network, original in zip((model, teacher), originals, strict=True):
            network.to(original, memory_format=torch.contiguous_format)
    return report


@torch.no_grad()
def _learning_size(model: ImageModel, teacher: ImageModel) -> int:
    """Return the height and width of the images that a model learns by."""
    size = model.spec.input_size
    if size < LEAST_PHOTOGRAPH:
        return size
    smaller = round(LEARNING_SCALE * size)
    for network in (model, teacher):
        images = torch.zeros(1, model.spec.in_chans, smaller, smaller, device=next(network.parameters()).device)
        try:
            with evaluating(network):
                network(images)
        # Networks say in their own ways that they take images of one size only.
        except (AssertionError, RuntimeError, ValueError):
            return size
    return smaller


def teacher_of(model: ImageModel, name: str | None) -> ImageModel:
    """Return the trained network of a name from which a plain one learns once it is converted; by default a copy of it.

    Raises:
        ValueError: no such network, or one of other classes, channels or size.
    """
    if name is None:
        return copy.deepcopy(model)
    teacher = start_from(name, input_size=model.spec.input_size)
    refuse_other_teacher(model, teacher)
    return teacher


def refuse_other_teacher(model: ImageModel, teacher: ImageModel) -> None:
    """Refuse a teacher from which a model cannot learn.

    Raises:
        ValueError: its classes, or the channels or size of its images, are others.
    """
    for what, own, theirs in (
        ("classes", model.class_names, teacher.class_names),
        ("channels", model.spec.in_chans, teacher.spec.in_chans),
        ("image size", model.spec.input_size, teacher.spec.input_size),
    ):
        if own != theirs:
            raise ValueError(
                f"the teacher ({teacher.spec.architecture}) has other {what} than the network, {_shown(theirs)} and "
                f"{_shown(own)}; take the network that was converted, or one of the same {what}"
            )


def _shown(value: int | tuple[str, ...]) -> str:
    return f"{len(value)} ({', '.join(value[:3])}, ...)" if isinstance(value, tuple) else str(value)


class _Work:
    """The file in which a distillation is saved while it goes on.

    Args:
        file: None for none.
        saves: whether anything is written to it.
    """

    def __init__(self, file: Path | None, saves: bool) -> None:
        self.file, self.saves, self.saved = file, saves, time.monotonic()
        self.settings: dict[str, Any] = {}
        # As many steps as the file has.
        self.steps = 0

    def found(self, model: ImageModel, teacher: ImageModel, settings: dict[str, Any]) -> dict[str, Any] | None:
        """Return the state of a distillation of the same networks and settings, if there is one."""
        if self.file is None:
            return None
        # Their answers tell networks of the same kind apart.
        networks = [fingerprint(network) for network in (model, teacher)]
        self.settings = {**settings, "networks": networks}
        if not self.file.is_file():
            return None
        if damage := damage_of(self.file):
            warnings.warn(f"{self.file} is damaged ({damage}), so the distillation begins again", stacklevel=3)
            return None
        held = torch.load(self.file, map_location="cpu", weights_only=True)
        same = all(map(agree, held["settings"]["networks"], networks))
        if not same or any(held["settings"].get(name) != value for name, value in settings.items()):
            warnings.warn(
                f"{self.file} is of a distillation of other networks, images or epochs, so this one begins anew and "
                "replaces it",
                stacklevel=3,
            )
            return None
        self.settings, self.steps = held["settings"], held["state"]["steps"]
        if self.saves:
            print(f"the distillation of before goes on after step {held['state']['steps']} ({self.file})", flush=True)
        return held["state"]

    def save_in_time(self, run: Distillation) -> None:
        at_end = run.steps == run.epochs * len(run.batches)
        if self.file is not None and self.saves and (at_end or time.monotonic() - self.saved >= SAVED_EVERY):
            SafeCheckpointIO().save_checkpoint({"settings": self.settings, "state": run.state_dict()}, self.file)
            self.saved = time.monotonic()
            self.steps = run.steps

    def tell(self) -> None:
        """Say what is left of a distillation that is stopped."""
        if self.steps:
            print(f"stopped; the same command goes on after step {self.steps} ({self.file} has its state)", flush=True)
