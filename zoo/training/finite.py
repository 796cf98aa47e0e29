"""What is told, and done, when a training's numbers are not finite."""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn

from operators import DecoupledConv2d, decoupled_layers, diagnose

# Loss scaling halves its scale, of 65,536 at first, with each step that it skips: after these it has nothing to halve.
MOST_SKIPPED = 25


def stop_unless_finite(module: L.LightningModule, images: Tensor, loss: Tensor) -> None:
    """Stop the training before a step that is not finite changes the weights.

    Args:
        images: of the step.
        loss: of these images.

    Raises:
        FloatingPointError: the loss or a gradient is not finite; the message names the step and the layer.
    """
    trainer = module.trainer
    # Loss scaling for float16 finds infinite gradients itself, and skips the step.
    if trainer.precision == "16-mixed":
        return
    gradients = {name: value.grad for name, value in module.model.named_parameters() if value.grad is not None}
    finite = torch.nn.utils.get_total_norm(gradients.values()).isfinite() & loss.isfinite()
    # Where processes have a part of the gradients each, all stop if one must.
    if trainer.strategy.reduce_boolean_decision(bool(finite)):
        return
    told = explanation(module, images, gradients, trainer.precision_plugin.forward_context)
    raise FloatingPointError(
        f"training stopped at step {module.global_step} (epoch {module.current_epoch + 1}, batch "
        f"{trainer.fit_loop.epoch_loop.batch_idx + 1}) before it changed the weights: {told}"
    )


def refuse_bad_weights(weights: Mapping[str, Tensor], trainer: L.Trainer) -> None:
    """Refuse to save weights that are not finite, so that the checkpoint before them stays.

    Raises:
        FloatingPointError: some are not; the message names the first.
    """
    for name, value in weights.items():
        if value.is_floating_point() and not value.isfinite().all():
            precision = trainer.precision
            cure = f"train in --trainer.precision {'bf16-mixed' if '16' in str(precision) else '32-true'}"
            more = "; AdamW's smallest numbers are 0 in float16" if precision == "16-true" else ""
            raise FloatingPointError(
                f"training stopped after step {trainer.global_step}: {name} is not finite, and not saved; what was "
                f"saved before stays. Begin again in another folder: {cure}{more}, or lower --model.learning_rate"
            )


def first_bad_layer(
    model: nn.Module, images: Tensor, precision: Callable[[], AbstractContextManager] = nullcontext
) -> str | None:
    """Return the name of the first layer whose output for a batch is not finite; None if all outputs are.

    The network runs once more, in its mode, and is left as it was.

    Args:
        precision: gives the context in which it was run.
    """
    inner = {part for layer in decoupled_layers(model).values() for part in layer.modules() if part is not layer}
    found: list[str] = []

    def look(name: str, output: Any) -> None:
        if not found and isinstance(output, Tensor) and not output.isfinite().all():
            found.append(name)

    hooks = [
        layer.register_forward_hook(lambda module, inputs, output, name=name: look(name, output))
        for name, layer in model.named_modules()
        if layer not in inner and (isinstance(layer, DecoupledConv2d) or not list(layer.children()))
    ]
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    try:
        with torch.no_grad(), precision():
            model(images)
    finally:
        for hook in hooks:
            hook.remove()
        for buffer, before in buffers:
            buffer.copy_(before)
    return found[0] if found else None


def explanation(module: L.LightningModule, images: Tensor, gradients: dict[str, Tensor], precision: Callable) -> str:
    """Return in which layer the numbers of a step are the first that are not finite, and what may help."""
    model = module.model
    bad_weights = [name for name, value in model.named_parameters() if not value.isfinite().all()]
    bad_gradients = [name for name, gradient in gradients.items() if not gradient.isfinite().all()]
    if bad_weights:
        where = f"the weights of {bad_weights[0]}, before the step,"
    elif layer := first_bad_layer(model, images, precision):
        where = f"the output of {layer}"
    elif bad_gradients:
        # Gradients come from the loss back to the first layer.
        where = f"the gradient of {bad_gradients[-1]}"
    else:
        where = "the loss or the gradient's norm"
    cures = [
        f"lower --model.learning_rate ({module.hparams.learning_rate:g})",
        "limit the gradient (--trainer.gradient_clip_val 1)",
        "and begin again in another folder, for a run that goes on by the same command comes here again",
    ]
    if "16" in str(module.trainer.precision):
        cures.insert(0, "train in --trainer.precision 32-true")
    advice = diagnose(model, [images]).advice() if decoupled_layers(model) else ()
    return "; ".join([f"{where} is not finite", *cures, *advice])


class SkippedSteps(Callback):
    """Count the steps that the loss scaling of float16 skips, tell how many, and stop when it skips all.

    Raises:
        FloatingPointError: 25 steps in a row were skipped.
    """

    def __init__(self) -> None:
        self.skipped = self.in_a_row = self.step = 0
        self.scale: float | None = None

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self.step = trainer.global_step

    def on_train_batch_end(self, trainer: L.Trainer, module: L.LightningModule, *_: Any) -> None:
        # Batches whose gradients are still being accumulated say nothing.
        if trainer.global_step == self.step:
            return
        self.step = trainer.global_step
        before, self.scale = self.scale, trainer.precision_plugin.scaler.get_scale()
        # It is halved where a step was skipped, and nowhere else.
        skipped = before is not None and self.scale < before
        self.skipped += skipped
        self.in_a_row = self.in_a_row + 1 if skipped else 0
        module.log("skipped_steps", float(self.skipped))
        if self.in_a_row == MOST_SKIPPED:
            raise FloatingPointError(
                f"training stopped at step {trainer.global_step}, for the gradients of {MOST_SKIPPED} steps in a row "
                "were not finite, and the weights did not change; train in --trainer.precision bf16-mixed or 32-true, "
                "or lower --model.learning_rate"
            )

    def on_train_epoch_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        if self.skipped:
            rank_zero_info(f"float16: {self.skipped} of {trainer.global_step} steps were skipped so far")

    def state_dict(self) -> dict[str, Any]:
        return {"skipped": self.skipped, "in_a_row": self.in_a_row, "scale": self.scale}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.skipped, self.in_a_row, self.scale = state["skipped"], state["in_a_row"], state["scale"]
