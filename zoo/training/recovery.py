"""Bringing back what a trained network knew before its convolutions were decoupled: calibration and distillation."""

import dataclasses
import math
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from operators import CalibrationReport, Distillation, DistillationReport, calibrate, distil
from zoo.checkpoints.verification import fingerprint
from zoo.data.augmentation import augment_batch
from zoo.models.image_model import ImageModel
from zoo.randomness import generator_of, key_of
from zoo.resuming.files import SafeCheckpointIO, damage_of
from zoo.training.device import Device

# Images to whose norms a converted network is fitted, and that it may learn from its teacher by.
CALIBRATION_IMAGES, DISTILLATION_IMAGES = 256, 1024
BATCH = 16
# Of the images that a network learns by, one in so many is held out, to tell which state is best.
HELD_OUT = 10
# Seconds between two savings of a distillation under way.
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
    model: ImageModel, teacher: ImageModel, images: Tensor, epochs: int, *, seed: int = 0, work: Path | None = None
) -> DistillationReport:
    """Let a model learn from its teacher, in place, by images of any kind, augmented anew in each epoch.

    Args:
        images: in [0, 1], (N, in_chans, size, size).
        seed: of the images' order and augmentation.
        work: a file in which the state is saved every half a minute. The same call goes on with it, and ends with the
            same weights; it is removed at the end.

    Raises:
        ValueError, FloatingPointError: as :func:`operators.distil`; or a teacher of other classes or channels.
    """
    refuse_other_teacher(model, teacher)
    device = Device.choose("auto")
    place = next(model.parameters()).device
    for network in (model, teacher):
        network.to(device.name, memory_format=torch.channels_last)
    held_out = images[::HELD_OUT]
    learnt = images[[index for index in range(len(images)) if index % HELD_OUT]] if len(images) > 1 else images
    batches = AugmentedImages(learnt, model.spec.input_size, seed)
    # Their answers tell networks of the same kind apart.
    networks = [fingerprint(network) for network in (model, teacher)]
    state = _Work(work, {"networks": networks, "images": len(images), "epochs": epochs, "seed": seed})
    try:
        with torch.autocast(device.name, torch.bfloat16, enabled=device.precision == "bf16-mixed"):
            _, report = distil(
                model,
                teacher,
                batches,
                epochs=epochs,
                held_out=held_out.split(BATCH),
                state=state.found(),
                after_step=state.save_in_time,
            )
    finally:
        model.to(place)
    state.remove()
    return report


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
            shown = [
                f"{len(names)} ({', '.join(names[:3])}, ...)" if what == "classes" else names for names in (theirs, own)
            ]
            raise ValueError(
                f"the teacher ({teacher.spec.architecture}) has other {what} than the network, {shown[0]} and "
                f"{shown[1]}; take the network that was converted, or one of the same {what}"
            )


class AugmentedImages:
    """Batches of images in [0, 1], shuffled and augmented anew in each epoch, on the CPU.

    Args:
        images: in [0, 1], (N, C, H, W).
        size: height and width of the results.
    """

    def __init__(self, images: Tensor, size: int, seed: int) -> None:
        self.images, self.size, self.seed, self.epoch = images, size, seed, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return math.ceil(len(self.images) / BATCH)

    def __iter__(self) -> Iterator[Tensor]:
        order = torch.randperm(len(self.images), generator=generator_of(self.seed, self.epoch))
        for places in order.split(BATCH):
            keys = key_of(self.seed, self.epoch, places)
            images = augment_batch(self.images[places], "resized_crop_flip", self.size, keys)
            yield images.contiguous(memory_format=torch.channels_last)


class _Work:
    """The file in which a distillation is saved while it goes on."""

    def __init__(self, file: Path | None, settings: dict[str, Any]) -> None:
        self.file, self.settings, self.saved = file, settings, time.monotonic()

    def found(self) -> dict[str, Any] | None:
        """Return the state of a distillation of the same settings, if there is one."""
        if self.file is None or not self.file.is_file():
            return None
        if damage := damage_of(self.file):
            warnings.warn(f"{self.file} is damaged ({damage}), so the distillation begins again", stacklevel=3)
            return None
        held = torch.load(self.file, map_location="cpu", weights_only=True)
        return held["state"] if held["settings"] == self.settings else None

    def save_in_time(self, run: Distillation) -> None:
        if self.file is not None and time.monotonic() - self.saved >= SAVED_EVERY:
            SafeCheckpointIO().save_checkpoint({"settings": self.settings, "state": run.state_dict()}, self.file)
            self.saved = time.monotonic()

    def remove(self) -> None:
        if self.file is not None:
            self.file.unlink(missing_ok=True)
