"""The Lightning module: one model of the zoo, its loss, and what is recorded of its training."""

import dataclasses
import shlex
import sys
from pathlib import Path
from typing import Any, Literal

import lightning as L
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn
from torchmetrics.classification import MulticlassAccuracy
from torchvision.transforms.v2 import MixUp

from zoo.checkpoints.config import RUN_RECORD
from zoo.data.measuring import check_data
from zoo.data.module import ImageData, first_alone, given_arguments
from zoo.models.building import build_from
from zoo.models.image_model import ImageModel
from zoo.provenance import commit, origin
from zoo.randomness import run_seed, seed_of
from zoo.resuming.last_checkpoint import best_settings
from zoo.resuming.lightning_internals import loader_states, trainer_of
from zoo.resuming.record import RunRecord, record_in
from zoo.training.adversarial import AdversarialTraining, OverfittingAlarm, alarms_of
from zoo.training.callbacks import MovingAverage
from zoo.training.class_accuracy import ClassAccuracy, balanced, show_class_accuracies, told_weights
from zoo.training.finite import SkippedSteps, refuse_bad_weights, stop_unless_finite
from zoo.training.freezing import backbone, drop_gradients, freeze, freeze_norms
from zoo.training.network import adapted, check_network_settings, described, distillation_of, first_networks
from zoo.training.optimisation import check_optimiser_settings, orthogonality_penalty, refuse_changes, with_schedule
from zoo.training.sharding import check_sharding, shard
from zoo.training.strided import avoid_wrong_gradients, undo


class Classifier(L.LightningModule):
    """Train a network of the zoo to name the class of an image.

    The classes, the channels, the size and the normalisation of the images follow from the data module; with
    ``init_from``, the normalisation is that of the network one starts from.

    Args:
        architecture: one of ours (cnn6, cnn9, resnet20, ...) or any timm architecture; cnn6 by default.
        operator: "conv" for the plain network, an operator such as "tanh_cosine" (the default), or a mapping of its
            settings with "name", e.g. {name: tanh_cosine, radius_mode: learned}. With ``init_from`` a plain network, it
            is converted, and stays plain by default; a bare name then means weighting linear, which a new network has
            not, and a mapping means what it says.
        architecture_args: further arguments of the architecture, e.g. {batch_norm: false}.
        init_from: the trained network to start from, in place of architecture and architecture_args: a checkpoint of
            the zoo, a checkpoint folder, a Hub repository (owner/name), or timm:NAME for weights that timm fetches. It
            gets a fresh classifier if its classes are not those of the images.
        depthwise: decouple depthwise convolutions, too, which stay plain by default.
        keep: names of convolutions, or of modules that hold some, that stay plain, e.g. [conv_stem, "blocks.0.*"].
        calibrate: before training, fit layers that were just converted to training images: "auto" searches for each
            layer's radius, a number such as 0.99 is the quantile of the norms that becomes it; not done by default.
        distil: before training, so many epochs in which a network that was just converted learns to answer as its
            teacher, without labels; none by default.
        teacher: the trained network that it learns from, as ``init_from`` names it; the one it was converted from by
            default.
        optimizer: "sgd" (with Nesterov momentum 0.9) or "adamw".
        learning_rate: the highest learning rate.
        backbone_learning_rate: that of all but the classifier; the same by default.
        freeze_epochs: for so many epochs only the classifier is trained.
        freeze_norms: whether BatchNorm keeps the statistics that it has, which few images only spoil; its factors and
            shifts are trained all the same.
        weight_decay: of filters and fully connected weights; biases, normalisations and radii have none.
        decay_decoupled_filters: whether decoupled filters have weight decay too; the authors' have none.
        schedule: "cosine" (to 0), "step" (a tenth after 1/2, a hundredth after 3/4 of training) or "constant".
        warmup: share of training in which the learning rate rises linearly from 0.
        label_smoothing: share of the label spread over all classes; the authors use 0.01.
        mixup: parameter of the Beta distribution from which the share of another image, mixed into each, is drawn
            (Zhang et al., mixup, 2018; 0.2 is usual); 0 for none.
        orthogonality: factor of the penalty ½‖ŴᵀŴ - I‖² on the normalised filters of each decoupled layer; the authors
            use 1e-5.
        adversarial: train on attacked images, as its fields say: attack ("pgd" or "fgsm"), eps, steps, step. Validation
            images are attacked after each epoch, with a warning if the network only seems to resist.
        ema: validate, save and export the moving average of the weights, which keeps that share of itself in a step,
            e.g. 0.999; none by default.
        compile: train with torch.compile, which takes some seconds to a minute to begin with. Validation stays eager.
        channels_last: lay images and filters out with the channels last, which is the fast way on most devices.

    Raises:
        ValueError: an unknown name, a number outside its range, or ``init_from`` beside what it brings along.
    """

    def __init__(
        self,
        architecture: str | None = None,
        operator: str | dict[str, Any] | None = None,
        architecture_args: dict[str, Any] | None = None,
        init_from: str | None = None,
        depthwise: bool = False,
        keep: list[str] | None = None,
        calibrate: Literal["auto"] | float | None = None,
        distil: int = 0,
        teacher: str | None = None,
        optimizer: Literal["sgd", "adamw"] = "adamw",
        learning_rate: float = 3e-3,
        backbone_learning_rate: float | None = None,
        freeze_epochs: int = 0,
        freeze_norms: bool = False,
        weight_decay: float = 1e-2,
        decay_decoupled_filters: bool = True,
        schedule: Literal["cosine", "step", "constant"] = "cosine",
        warmup: float = 0.1,
        label_smoothing: float = 0.0,
        mixup: float = 0.0,
        orthogonality: float = 0.0,
        adversarial: AdversarialTraining | None = None,
        ema: float | None = None,
        compile: bool = False,
        channels_last: bool = True,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        check_network_settings(self.hparams)
        check_optimiser_settings(self.hparams)
        # Checkpoints hold plain values.
        self.hparams.adversarial = dataclasses.asdict(adversarial) if adversarial else None
        self.adversarial = adversarial
        self.model: ImageModel | None = None
        # The command line of train.py replaces this by its own.
        self.command = shlex.join(["python", Path(sys.argv[0]).name, *sys.argv[1:]])
        # Tells whether another command has the same settings.
        self.settings: str | None = None
        self.earlier_commands: list[str] = []
        self.resumed_step: int | None = None
        self.loader_states: list[dict[str, int]] = []
        # A sharded network has parameters whose gradients the strategy does not reduce.
        self.replicated: list[nn.Parameter] = []
        # The images of the step that is under way, and their loss.
        self.seen: tuple[Tensor, Tensor] | None = None
        # Name and licence of the weights that training started from.
        self.source: dict[str, str] | None = None
        # Factors of the classes in the training loss; no part of the network.
        self.register_buffer("loss_weights", None, persistent=False)

    def setup(self, stage: str) -> None:
        data = self._data()
        if self.model is None:
            # One process of each machine fetches from the Hub, and the others read what it has fetched.
            with first_alone(self.trainer):
                beginning = first_networks(self.hparams, data, self.trainer.state.fn.value)
            self.source, model = beginning.source, beginning.model
            if self.source:
                model = adapted(beginning, self.hparams, data, self.trainer)
            self._set_model(model)
            # A network that predicts from a Lightning checkpoint is built when that is read.
            if stage != "predict" or self.hparams.init_from:
                self._announce()
        if stage != "predict":
            check_data(self.model.spec, data)
        if stage == "fit":
            self.loss_weights = data.loss_weights()
        # Asked for at the start, for files may change while the network trains.
        commit()

    def configure_model(self) -> None:
        """Give each process its part of the weights, gradients and optimiser's state, if the strategy is FSDP.

        Raises:
            ValueError: a setting that cannot be had with sharded weights.
        """
        trainer = trainer_of(self)
        if trainer is not None and isinstance(trainer.strategy, ModelParallelStrategy):
            check_sharding(trainer.strategy, trainer.world_size, self.hparams)
            self.replicated = shard(self.model, self.device_mesh["data_parallel"])

    def on_train_batch_start(self, batch: tuple[Tensor, Tensor], batch_index: int) -> None:
        # A step's random draws follow from its place, so that a run that goes on draws the same, as does each process.
        torch.manual_seed(seed_of(run_seed(), self.current_epoch, batch_index, self.global_rank))

    def training_step(self, batch: tuple[Tensor, Tensor], batch_index: int) -> Tensor:
        images, labels = self.mix(*batch) if self.hparams.mixup else batch
        images = images.contiguous(memory_format=self.memory_format)
        if self.adversarial:
            images = self.adversarial.perturb(self.model, images, labels)
        logits = self.training_forward(images)
        smoothing, weights = self.hparams.label_smoothing, self.loss_weights
        loss = F.cross_entropy(logits, labels, weights, reduction=self._reduction, label_smoothing=smoothing)
        if weights is not None:
            loss = loss / len(labels)
        self.seen = images, loss.detach()
        self.log("train_loss", loss, prog_bar=True)
        if self.hparams.orthogonality:
            loss = loss + self.hparams.orthogonality * orthogonality_penalty(self.model)
        return loss

    def on_validation_start(self) -> None:
        # One that was broken off has counted some images.
        self.by_class["val"].reset()
        # DDP does so in each step: BatchNorm's statistics are those of the first process.
        if isinstance(self.trainer.strategy, ModelParallelStrategy):
            for buffer in self.model.buffers():
                torch.distributed.broadcast(buffer, 0)

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_index: int) -> None:
        self._evaluate(batch, "val")

    def test_step(self, batch: tuple[Tensor, Tensor], batch_index: int) -> None:
        self._evaluate(batch, "test")

    def on_validation_epoch_end(self) -> None:
        self._tell_classes("val")

    def on_test_epoch_end(self) -> None:
        correct, total = self._tell_classes("test")
        counts = zip(correct.tolist(), total.tolist(), strict=True)
        show_class_accuracies(dict(zip(self.model.class_names, counts, strict=True)))

    def predict_step(self, batch: Tensor, batch_index: int) -> Tensor:
        """Return the probability of each class, (N, num_classes)."""
        probabilities = self.model(batch).softmax(1)
        if not probabilities.isfinite().all():
            raise FloatingPointError(
                "the network's answers are not finite (NaN); predict in --trainer.precision 32-true, or use another "
                "checkpoint of the run"
            )
        return probabilities

    def configure_callbacks(self) -> list[Callback]:
        callbacks: list[Callback] = [OverfittingAlarm(self.adversarial)] if self.adversarial else []
        if self.hparams.ema:
            callbacks.append(MovingAverage(self.hparams.ema))
        if self.trainer.precision == "16-mixed":
            callbacks.append(SkippedSteps())
        return callbacks

    def configure_optimizers(self) -> dict[str, Any]:
        return with_schedule(self.model, self.hparams, self.trainer.estimated_stepping_batches)

    def on_train_start(self) -> None:
        # Lightning has made the loader for the schedule's sake, before it read the checkpoint (2.6).
        for state in self.loader_states:
            self.trainer.train_dataloader.load_state_dict(state)
        self.loader_states = []
        avoid_wrong_gradients(self.model)
        # A run that goes on within an epoch does not begin it.
        self.on_train_epoch_start()
        if told := told_weights(self.model.class_names, self.loss_weights, self._data().split("train").labels):
            rank_zero_info(told)
        if 0 < self.trainer.max_epochs <= self.hparams.freeze_epochs:
            rank_zero_info(
                f"only the classifier is trained: freeze_epochs is {self.hparams.freeze_epochs}, max_epochs "
                f"{self.trainer.max_epochs}"
            )

    def on_train_end(self) -> None:
        # Others, such as the converter, know torch's own convolutions.
        undo(self.model)
        if self.trainer.is_global_zero and (work := distillation_of(self.trainer)):
            work.unlink(missing_ok=True)

    def on_train_epoch_start(self) -> None:
        if self.hparams.freeze_epochs:
            freeze(self.model, self._frozen, self.trainer.strategy)
        if self.hparams.freeze_norms:
            freeze_norms(self.model)

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        for parameter in self.replicated:
            parameter.grad = self.trainer.strategy.reduce(parameter.grad, reduce_op="mean")
        if self._frozen:
            drop_gradients(backbone(self.model))
        stop_unless_finite(self, *self.seen)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        record = RunRecord(
            spec=self.model.describe(),
            model=given_arguments(self.hparams),
            data=self._data().describe(),
            max_epochs=self.trainer.max_epochs,
            training={
                # Whole ones; validation and the end of an epoch come after its last batch.
                "epochs": self.current_epoch + self.trainer.is_last_batch,
                "command": " && ".join(dict.fromkeys([*self.earlier_commands, self.command])),
                "seed": run_seed(),
                **alarms_of(self.trainer.callbacks),
                **origin(self.device),
            },
            source=self.source,
            settings=self.settings,
            best=best_settings(self.trainer),
        )
        checkpoint[RUN_RECORD] = record.to_dict()
        refuse_bad_weights(checkpoint.get("state_dict", {}), self.trainer)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        record, trainer = record_in(checkpoint), trainer_of(self)
        spec, stage = record.spec, trainer.state.fn if trainer else "predict"
        if stage != "predict":
            held, asked = described(spec), described(self.model.spec)
            if held != asked or spec.operator != self.model.spec.operator:
                raise ValueError(
                    f"the checkpoint holds {held}, but {asked} was asked for; leave out the --model and --data options "
                    "to go on with the checkpoint's network, or leave out --ckpt_path to train a new one"
                )
            check_data(spec, self._data())
        if stage == "fit":
            self._go_on(record, checkpoint)
        if self.model is None or dataclasses.replace(self.model.spec, mean=spec.mean, std=spec.std) != spec:
            self._set_model(build_from(spec))
        # The checkpoint's normalisation is part of its spec and not among its weights.
        self.model.normalise_as(spec)
        # Lightning would do so only after it has rounded the checkpoint's weights to float32 (2.6).
        if trainer and trainer.precision == "64-true":
            self.model.double()
        if stage == "predict" and trainer:
            self._announce()

    def _go_on(self, record: RunRecord, checkpoint: dict[str, Any]) -> None:
        """Take over what a run had done, of which no other part of the checkpoint tells."""
        refuse_changes(record.model, self.hparams)
        if 0 <= self.trainer.max_epochs < record.epochs:
            raise ValueError(
                f"the run has had {record.epochs} epochs, more than --trainer.max_epochs {self.trainer.max_epochs}: to "
                "train on, raise it"
            )
        self.earlier_commands = record.training["command"].split(" && ")
        self.resumed_step = checkpoint["global_step"]
        self.loader_states = loader_states(checkpoint)
        self.source = record.source
        # The time that --trainer.max_time gives is that of each call.
        checkpoint["callbacks"].pop("Timer", None)

    @property
    def memory_format(self) -> torch.memory_format:
        return torch.channels_last if self.hparams.channels_last else torch.contiguous_format

    @property
    def _frozen(self) -> bool:
        return self.current_epoch < self.hparams.freeze_epochs

    @property
    def _reduction(self) -> str:
        # torch's mean divides by the weights of the batch, of which little is left then in small batches.
        return "mean" if self.loss_weights is None else "sum"

    def _announce(self) -> None:
        rank_zero_info(f"{described(self.model.spec)}, {sum(p.numel() for p in self.parameters()):,} parameters")

    def _set_model(self, model: ImageModel) -> None:
        self.model = model.to(memory_format=self.memory_format)
        # A function and no module, whose parameters would be registered twice.
        self.training_forward = torch.compile(model.forward, dynamic=False) if self.hparams.compile else model.__call__
        classes = len(model.class_names)
        self.mix = MixUp(alpha=self.hparams.mixup, num_classes=classes) if self.hparams.mixup else None
        self.accuracy = nn.ModuleDict(
            {f"{split}_accuracy": MulticlassAccuracy(classes, average="micro") for split in ("val", "test")}
        )
        self.by_class = nn.ModuleDict({split: ClassAccuracy(classes) for split in ("val", "test")})

    def _data(self) -> ImageData:
        data = getattr(self.trainer, "datamodule", None)
        if not isinstance(data, ImageData):
            raise ValueError(
                "Classifier needs a data module of zoo.data, as in trainer.fit(classifier, datamodule=Digits())"
            )
        return data

    def _evaluate(self, batch: tuple[Tensor, Tensor], split: str) -> None:
        images, labels = batch
        logits = self.model(images.contiguous(memory_format=self.memory_format))
        name = f"{split}_accuracy"
        self.accuracy[name](logits, labels)
        self.by_class[split].update(logits, labels)
        self.log(f"{split}_loss", F.cross_entropy(logits, labels), batch_size=len(labels), sync_dist=True)
        self.log(name, self.accuracy[name], prog_bar=True, batch_size=len(labels))

    def _tell_classes(self, split: str) -> tuple[Tensor, Tensor]:
        """Log the balanced accuracy, and return how many images of each class are named rightly, and of how many."""
        correct, total = self.by_class[split].compute()
        self.by_class[split].reset()
        # It is the same in all processes.
        self.log(f"{split}_balanced_accuracy", balanced(correct, total).item())
        return correct, total
