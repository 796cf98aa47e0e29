"""Label-free recovery: a converted network learns to answer as the ordinary one that it was made of."""

import contextlib
import copy
import dataclasses
import functools
import itertools
import math
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.hub import tqdm

from operators.batch_norms import movements_of, set_movements
from operators.blocks import alike, comparable, recording
from operators.conv import decoupled_layers
from operators.evaluation_mode import evaluating
from operators.imitation import imitate
from operators.layer_by_layer import set_constants
from operators.observation import Batches, divergence, doubts_about, images_of, layers_of, nonempty
from operators.selection import classifier_layers

# The layers learn one by one by so many images.
IMITATED = 64
# The learning rate rises from 0 in this share of the steps.
WARMUP = 0.03


@dataclasses.dataclass(frozen=True)
class DistillationReport:
    """What distillation has reached.

    Attributes:
        divergences: the mean Kullback-Leibler divergence of the network's probabilities from its teacher's, in nats,
            on the held-out images: before, once the layers had learned one by one, and after each epoch.
        agreements: likewise, the share of images whose likeliest class is the teacher's.
        kept: the place in these of the network as it is now; 0 if it never became better than it was.
    """

    divergences: tuple[float, ...]
    agreements: tuple[float, ...]
    kept: int

    def __str__(self) -> str:
        epochs = len(self.divergences) - 2
        lines = [
            f"distilled for {epochs} epochs: divergence from the teacher {self.divergences[0]:.3g} before, "
            f"{self.divergences[self.kept]:.3g} now; likeliest class the teacher's: {self.agreements[0]:.1%} before, "
            f"{self.agreements[self.kept]:.1%} now"
        ]
        if not self.kept:
            lines.append("it became no better, and is left as it was: take more images, or a lower learning rate")
        elif self.kept <= epochs:
            when = f"after epoch {self.kept - 1}" if self.kept > 1 else "once the layers had learned one by one"
            lines.append(f"it was best {when}, and is left as it was then")
        return "\n".join(lines)


def distil(
    model: nn.Module,
    teacher: nn.Module,
    batches: Batches,
    *,
    epochs: int = 100,
    learning_rate: float = 5e-4,
    held_out: Batches | None = None,
    progress: bool | None = None,
    state: Mapping[str, Any] | None = None,
    after_step: Callable[["Distillation"], object] | None = None,
) -> tuple[nn.Module, DistillationReport]:
    """Train a converted network, in place and without labels, to answer as its teacher; return it and the report.

    First the layers learn one by one: each filter is turned until the layer answers as an ordinary convolution with the
    filters of before does (:func:`operators.imitation.imitate`). Then all learn together. The loss is
    ``Σ ‖s - t‖² / ‖t‖²`` over the blocks of the network: ``t`` is what the teacher's block answers to the images, ``s``
    what the network's own does, whose input the blocks before it have made. AdamW takes its steps without weight decay,
    at a learning rate that falls to 0 as a cosine. Both networks are in evaluation mode then, so that BatchNorm's
    statistics rest. The classifier stays as it is: it is the teacher's.

    Of the states after each epoch, the network ends in that which is nearest to the teacher on the held-out images; if
    none is nearer than it was, it ends as it was.

    Args:
        model: a network that :func:`operators.convert_decoupled` has converted and :func:`operators.calibrate` fitted.
        teacher: the network it was made of, e.g. a copy of before. Of a teacher with other parameters or another
            classifier only the logits count, for whose divergence the classifier learns, too.
        batches: a list or loader of images as both networks take them, (N, C, H, W), or of tuples that begin with them.
            An epoch goes through all of them. A loader with ``set_epoch`` is told the number of each. They should be
            augmented: a few hundred images are soon learned by heart.
        learning_rate: the highest.
        held_out: images by which states are compared; ``batches`` by default.
        progress: whether a bar is shown; on a terminal, if not given.
        state: what :meth:`Distillation.state_dict` gave, to go on with.
        after_step: is called with the run after each step, e.g. to save its state.

    Warns:
        UserWarning: most images are the same or of a single colour, or they are plainly not what the network takes.

    Raises:
        TypeError: no networks, weights in half precision, or batches that can be gone through only once.
        ValueError: no decoupled convolution, no image, a teacher that shares its weights with the network or has other
            classes, or settings out of their range.
        FloatingPointError: a loss that is not finite; the network is then in its best state so far.
    """
    layers_of(model, "distil")
    run = Distillation(model, teacher, _sized(batches), held_out, epochs, learning_rate)
    if state is not None:
        run.load_state_dict(state)
    with evaluating(model), evaluating(teacher), _weights_cast_anew(run.parameters[0].device.type):
        try:
            _run(run, sys.stderr.isatty() if progress is None else progress, after_step or (lambda _: None))
        finally:
            run.restore_best()
    return model, run.report()


def _run(run: "Distillation", progress: bool, after_step: Callable[["Distillation"], object]) -> None:
    layers = 2 * len(decoupled_layers(run.model))
    with contextlib.closing(tqdm(total=layers, desc="distil layers", unit="layer", disable=not progress)) as bar:
        run.begin(functools.partial(bar.update, 1))
    bar = tqdm(total=run.epochs * len(run.batches), desc="distil", unit="step", disable=not progress)
    bar.update(run.steps)
    with contextlib.closing(bar):
        while run.epoch < run.epochs:
            for batch in run.rest_of_epoch():
                run.step(images_of(batch, run.model))
                bar.update(1)
                after_step(run)
            run.end_epoch()


def _weights_cast_anew(device: str) -> contextlib.AbstractContextManager[Any]:
    """While it lasts, autocast, if it is on, keeps no copies of weights: these would stay what they were."""
    dtype, enabled = torch.get_autocast_dtype(device), torch.is_autocast_enabled(device)
    return torch.autocast(device, dtype, enabled, cache_enabled=False)


class Distillation:
    """One distillation, which can be left after any step and taken up again.

    Args:
        as :func:`distil` takes them.
    """

    def __init__(
        self,
        model: nn.Module,
        teacher: nn.Module,
        batches: Batches,
        held_out: Batches | None,
        epochs: int,
        learning_rate: float,
    ) -> None:
        if epochs < 1:
            raise ValueError(f"epochs must be at least 1, got {epochs}")
        if not 0 < learning_rate < math.inf:
            raise ValueError(f"learning_rate must be more than 0 and finite, got {learning_rate}")
        _refuse_teacher(model, teacher)
        _refuse_half(model)
        self.model, self.teacher, self.batches = model, teacher, batches
        self.held_out = batches if held_out is None else held_out
        self.epochs, self.learning_rate = epochs, learning_rate
        # Of a teacher that is not the network of before, only the logits count, and the classifier learns, too.
        self.alike = alike(model, teacher)
        self.parameters = _trained_parameters(model, with_classifier=not self.alike)
        self.optimizer = torch.optim.AdamW(self.parameters, lr=learning_rate, weight_decay=0.0)
        self.blocks: tuple[str, ...] = ()
        self.movements = movements_of(model)
        # How many steps and whole epochs are done, and after how many the network was best.
        self.steps = self.epoch = self.kept = 0
        self.divergences: list[float] = []
        self.agreements: list[float] = []
        self.best: dict[str, Any] = {}

    def begin(self, step: Callable[[], object] = lambda: None) -> None:
        """Find out what can be compared, and unless a state is taken up, let the layers learn one by one.

        Args:
            step: is called whenever one of them answers.
        """
        first = next(iter(nonempty(self.held_out, "distil")))
        images = images_of(first, self.model)
        for doubt in doubts_about(images, self.teacher):
            warnings.warn(doubt, stacklevel=4)
        self.blocks = comparable(self.model, self.teacher, images[:1]) if self.alike else ()
        _refuse_other_classes(self.model, self.teacher, images[:1])
        if not self.divergences:
            self._measure()
            imitate(self.model, self._some_images(), step)
            self._measure()
            self.restore_best()

    def _some_images(self) -> Tensor:
        """Return up to ``IMITATED`` of the images to learn by."""
        found: list[Tensor] = []
        for batch in self.batches:
            found.extend(images_of(batch, self.model))
            if len(found) >= IMITATED:
                break
        return torch.stack(found[:IMITATED])

    def rest_of_epoch(self) -> Iterator[Any]:
        """Yield the batches of this epoch that no step has been taken for."""
        if hasattr(self.batches, "set_epoch"):
            self.batches.set_epoch(self.epoch)
        return itertools.islice(self.batches, self.steps - self.epoch * len(self.batches), None)

    def step(self, images: Tensor) -> float:
        """Take one step of the optimiser, and return the loss.

        Raises:
            FloatingPointError: it is not finite.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate * _factor(self.steps / (self.epochs * len(self.batches)))
        with torch.no_grad(), recording(self.teacher, self.blocks) as expected:
            logits = self.teacher(images)
        with torch.enable_grad(), recording(self.model, self.blocks) as answers:
            own = self.model(images)
            loss = sum(_relative(answers[name], expected[name]) for name in self.blocks)
            if not self.blocks:
                loss = F.kl_div(
                    own.float().log_softmax(1), logits.float().log_softmax(1), reduction="batchmean", log_target=True
                )
            if not loss.isfinite():
                raise FloatingPointError(
                    f"the loss of step {self.steps + 1} is {loss.item()}: distil again with a lower learning rate than "
                    f"{self.learning_rate:g}"
                )
            for parameter, gradient in zip(
                self.parameters, torch.autograd.grad(loss, self.parameters, allow_unused=True), strict=True
            ):
                parameter.grad = gradient
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.steps += 1
        return loss.item()

    def end_epoch(self) -> None:
        """Measure the network after an epoch, and keep its state if it is the best."""
        self.epoch += 1
        self._measure()

    @torch.no_grad()
    def _measure(self) -> None:
        found, images = [], 0
        for batch in nonempty(self.held_out, "distil"):
            inputs = images_of(batch, self.model)
            agreement, distance = divergence(self.teacher(inputs), self.model(inputs))
            found.append((agreement * len(inputs), distance * len(inputs)))
            images += len(inputs)
        agreement, distance = (sum(column) / images for column in zip(*found, strict=True))
        # A divergence that is no number is no better than any other.
        if not self.divergences or distance < self.divergences[self.kept]:
            self.kept, self.best = len(self.divergences), self._state()
        self.agreements.append(agreement)
        self.divergences.append(distance)

    def restore_best(self) -> None:
        """Put the network into the best state that it was in."""
        if self.best:
            self._take_up(self.best)
            # A network that has learned is not what it was before calibration, even if BatchNorm's statistics are.
            set_movements(self.model, {} if self.kept else self.movements)

    def _state(self) -> dict[str, Any]:
        """Return a copy of all that makes the network what it is: tensors, and constants of layers, which are none."""
        constants = {
            name: [layer.operator.radius, layer.operator.alpha, layer.operator.beta]
            for name, layer in decoupled_layers(self.model).items()
        }
        return {"tensors": copy.deepcopy(self.model.state_dict()), "constants": constants}

    def _take_up(self, state: Mapping[str, Any]) -> None:
        self.model.load_state_dict(state["tensors"])
        for name, layer in decoupled_layers(self.model).items():
            radius, alpha, beta = state["constants"][name]
            set_constants(layer, radius=radius, alpha=alpha, beta=beta)

    def report(self) -> DistillationReport:
        """Return what was reached so far."""
        return DistillationReport(tuple(self.divergences), tuple(self.agreements), self.kept)

    def state_dict(self) -> dict[str, Any]:
        """Return all that going on needs: tensors and plain values."""
        return {
            "steps": self.steps,
            "epoch": self.epoch,
            "kept": self.kept,
            "divergences": list(self.divergences),
            "agreements": list(self.agreements),
            "best": self.best,
            "model": self._state(),
            "optimizer": copy.deepcopy(self.optimizer.state_dict()),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up a run where :meth:`state_dict` left it."""
        self._take_up(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        for name in ("steps", "epoch", "kept", "divergences", "agreements", "best"):
            setattr(self, name, state[name])


def _trained_parameters(model: nn.Module, *, with_classifier: bool) -> list[nn.Parameter]:
    """Return the parameters of a network that can be trained."""
    layers = [] if with_classifier else classifier_layers(model)
    fixed = {id(parameter) for layer in layers for parameter in layer.parameters(recurse=False)}
    return [parameter for parameter in model.parameters() if parameter.requires_grad and id(parameter) not in fixed]


def _relative(answer: Tensor, expected: Tensor) -> Tensor:
    expected = expected.float()
    return F.mse_loss(answer.float(), expected) / expected.square().mean().clamp_min(torch.finfo(torch.float32).tiny)


def _factor(progress: float) -> float:
    """Return the learning rate as a share of the highest, after ``progress`` (0 to 1) of all steps."""
    return min(1.0, progress / WARMUP) * 0.5 * (1 + math.cos(math.pi * progress))


def _sized(batches: Batches) -> Batches:
    if not hasattr(batches, "__len__") or isinstance(batches, Tensor):
        raise TypeError(
            f"distil goes through the batches once an epoch, so it takes a list or a loader, got "
            f"{type(batches).__name__}; list(...) makes a list, [images] of a tensor"
        )
    if not len(batches):
        raise ValueError("distil needs at least one batch of images, got none")
    return batches


def _refuse_teacher(model: nn.Module, teacher: nn.Module) -> None:
    if not isinstance(teacher, nn.Module):
        raise TypeError(f"the teacher is a network, got {type(teacher).__name__}")
    own = {parameter.data_ptr() for parameter in model.parameters()}
    if any(parameter.data_ptr() in own for parameter in teacher.parameters()):
        raise ValueError(
            "the teacher shares its weights with the network, and would change with it: convert a copy of it "
            "(copy.deepcopy), and let the original be the teacher"
        )


def _refuse_half(model: nn.Module) -> None:
    halves = {parameter.dtype for parameter in model.parameters()} & {torch.float16, torch.bfloat16}
    if halves:
        raise TypeError(
            f"small steps are lost in weights of {halves.pop()}: distil model.float(), under torch.autocast for speed"
        )


@torch.no_grad()
def _refuse_other_classes(model: nn.Module, teacher: nn.Module, images: Tensor) -> None:
    own, theirs = (getattr(network(images), "shape", ()) for network in (model, teacher))
    if own != theirs or len(own) != 2 or own[1] < 2:
        raise ValueError(
            f"distil compares logits of two or more classes: the teacher gives {tuple(theirs)} to a batch, and the "
            f"network {tuple(own)}; take a teacher of the same classes, such as the network that was converted"
        )
