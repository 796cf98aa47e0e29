"""The Lightning module: one model of the zoo, its loss, optimiser and schedule."""

import dataclasses
import math
import shlex
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import lightning as L
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.strategies import ModelParallelStrategy, SingleDeviceStrategy
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn
from torchmetrics.classification import MulticlassAccuracy
from torchvision.transforms.v2 import MixUp

from operators import DecoupledConv2d, calibrate, decoupled_layers, filter_norm
from operators.convert import classifier_layers
from zoo.checkpoints.starting_points import convert, licence_of, start_from
from zoo.data.module import ImageData, first_alone, given_arguments
from zoo.models.building import PLAIN, ImageModel, ModelSpec, build
from zoo.provenance import commit, origin
from zoo.randomness import run_seed, seed_of
from zoo.runs.record import RECORD, read_record
from zoo.training.adversarial import AdversarialTraining, OverfittingAlarm
from zoo.training.callbacks import MovingAverage
from zoo.training.finite import SkippedSteps, explanation
from zoo.training.sharding import check_sharding, shard

# Training images whose norms a converted network is fitted to.
CALIBRATION_IMAGES = 256

# What settings of the optimiser that came later were before.
UNUSED = {"freeze_epochs": 0}


class Classifier(L.LightningModule):
    """Train a network of the zoo to name the class of an image.

    The classes, the channels, the size and the normalisation of the images follow from the data module; with
    ``init_from``, the normalisation is that of the network one starts from.

    Args:
        architecture: one of ours (cnn6, cnn9, resnet20, ...) or any timm architecture; cnn6 by default.
        operator: "conv" for the plain network, an operator such as "tanh_cosine" (the default), or a mapping of its
            settings with "name", e.g. {name: tanh_cosine, radius_mode: learned}. With ``init_from`` a plain network, it
            is converted (with weighting linear unless a mapping says otherwise), and stays plain by default.
        architecture_args: further arguments of the architecture, e.g. {batch_norm: false}.
        init_from: the trained network to start from, in place of architecture and architecture_args: a checkpoint of
            the zoo, a checkpoint folder, a Hub repository (owner/name), or timm:NAME for weights that timm fetches. It
            gets a fresh classifier if its classes are not those of the images.
        calibrate: fit layers that were just converted, before training, to that quantile of the norms that training
            images have, e.g. 0.99; not done by default.
        optimizer: "sgd" (with Nesterov momentum 0.9) or "adamw".
        learning_rate: the highest learning rate.
        backbone_learning_rate: that of all but the classifier; the same by default.
        freeze_epochs: for so many epochs only the classifier is trained.
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
        calibrate: float | None = None,
        optimizer: Literal["sgd", "adamw"] = "adamw",
        learning_rate: float = 3e-3,
        backbone_learning_rate: float | None = None,
        freeze_epochs: int = 0,
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
        for name, value in {"warmup": warmup, "label_smoothing": label_smoothing}.items():
            if not 0 <= value < 1:
                raise ValueError(f"{name} is a share in [0, 1), got {value}")
        not_negative = {
            "weight_decay": weight_decay,
            "orthogonality": orthogonality,
            "freeze_epochs": freeze_epochs,
            "mixup": mixup,
        }
        for name, value in not_negative.items():
            if value < 0:
                raise ValueError(f"{name} must not be negative, got {value}")
        rates = {"learning_rate": learning_rate, "backbone_learning_rate": backbone_learning_rate}
        for name, value in rates.items():
            if value is not None and value <= 0:
                raise ValueError(f"{name} must be more than 0, got {value}")
        if ema is not None and not 0 < ema < 1:
            raise ValueError(f"ema is the share that the average keeps in a step, in (0, 1), got {ema}")
        if calibrate is not None and not 0 < calibrate <= 1:
            raise ValueError(f"calibrate is a quantile in (0, 1], got {calibrate}")
        if calibrate is not None and (not init_from or operator in (None, PLAIN)):
            given = f"init_from {init_from} and operator {operator}"
            raise ValueError(
                "calibrate fits a trained plain network that is just converted: it needs init_from, a plain network, "
                f"and operator, got {given}; of a network that is decoupled already, leave out calibrate"
            )
        own = {"architecture": architecture, "architecture_args": architecture_args}
        if init_from and (ignored := [name for name, value in own.items() if value]):
            raise ValueError(
                f"init_from {init_from} has an architecture already; leave out {' and '.join(ignored)}, or leave out "
                "init_from to train a new network"
            )
        if adversarial and mixup:
            raise ValueError("mixed images have no class to be attacked; leave out mixup or adversarial")
        self.save_hyperparameters()
        # Checkpoints hold plain values.
        self.hparams.adversarial = dataclasses.asdict(adversarial) if adversarial else None
        self.adversarial = adversarial
        self.model: ImageModel | None = None
        # What the command line of train.py replaces by its own.
        self.command = shlex.join(["python", Path(sys.argv[0]).name, *sys.argv[1:]])
        # Tells whether another command has the same settings.
        self.settings: str | None = None
        self.earlier_commands: list[str] = []
        self.resumed_step: int | None = None
        self.loader_states: list[dict[str, int]] = []
        # Of a sharded network, the parameters whose gradients the strategy does not reduce.
        self.replicated: list[nn.Parameter] = []
        # The images of the step that is under way, and their loss.
        self.seen: tuple[Tensor, Tensor] | None = None
        # Name and licence of the weights that training started from.
        self.source: dict[str, str] | None = None

    def setup(self, stage: str) -> None:
        data = self._data()
        if self.model is None:
            # What is fetched from the Hub is fetched by one process of each machine, and read by the others.
            with first_alone(self.trainer):
                model = self._build(data, stage)
            self._set_model(model)
            # What predicts from a Lightning checkpoint is built when that is read.
            if stage != "predict" or self.hparams.init_from:
                self._announce()
        if stage != "predict":
            check_data(self.model.spec, data)
        # Asked for at the start, for files may change while the network trains.
        commit()

    def configure_model(self) -> None:
        """Give each process its part of the weights, gradients and optimiser's state, if the strategy is FSDP.

        Raises:
            ValueError: a setting that cannot be had with sharded weights.
        """
        if self._trainer is None or not isinstance(self.trainer.strategy, ModelParallelStrategy):
            return
        refused = [name for name in ("compile", "ema", "orthogonality") if self.hparams[name]]
        if refused:
            raise ValueError(
                f"a network whose weights are sharded can have no {' and no '.join(refused)}; leave it out"
            )
        check_sharding(self.trainer.strategy, self.trainer.world_size)
        self.replicated = shard(self.model, self.device_mesh["data_parallel"])

    def on_train_batch_start(self, batch: tuple[Tensor, Tensor], batch_index: int) -> None:
        # What a step draws follows from its place, so that a run that goes on draws the same; and so does each process.
        torch.manual_seed(seed_of(run_seed(), self.current_epoch, batch_index, self.global_rank))

    def training_step(self, batch: tuple[Tensor, Tensor], batch_index: int) -> Tensor:
        images, labels = self.mix(*batch) if self.hparams.mixup else batch
        images = images.contiguous(memory_format=self.memory_format)
        if self.adversarial:
            images = self.adversarial.perturb(self.model, images, labels)
        loss = F.cross_entropy(self.training_forward(images), labels, label_smoothing=self.hparams.label_smoothing)
        self.seen = images, loss.detach()
        self.log("train_loss", loss, prog_bar=True)
        if self.hparams.orthogonality:
            loss = loss + self.hparams.orthogonality * orthogonality_penalty(self.model)
        return loss

    def on_validation_start(self) -> None:
        # As DDP does in each step: BatchNorm's statistics are those of the first process.
        if isinstance(self.trainer.strategy, ModelParallelStrategy):
            for buffer in self.model.buffers():
                torch.distributed.broadcast(buffer, 0)

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_index: int) -> None:
        self._evaluate(batch, "val")

    def test_step(self, batch: tuple[Tensor, Tensor], batch_index: int) -> None:
        self._evaluate(batch, "test")

    def predict_step(self, batch: Tensor, batch_index: int) -> Tensor:
        """Return the probability of each class, (N, num_classes)."""
        return self.model(batch).softmax(1)

    def configure_callbacks(self) -> list[Callback]:
        callbacks: list[Callback] = [OverfittingAlarm(self.adversarial)] if self.adversarial else []
        if self.hparams.ema:
            callbacks.append(MovingAverage(self.hparams.ema))
        if self.trainer.precision == "16-mixed":
            callbacks.append(SkippedSteps())
        return callbacks

    def configure_optimizers(self) -> dict[str, Any]:
        settings = self.hparams
        decayed = {
            id(module.weight)
            for module in self.model.modules()
            if isinstance(module, nn.Conv2d | nn.Linear)
            and (settings.decay_decoupled_filters or not isinstance(module, DecoupledConv2d))
        }
        backbone_rate = settings.backbone_learning_rate or settings.learning_rate
        in_backbone = {id(parameter) for parameter in self._backbone()}
        parameters: dict[tuple[float, float], list[nn.Parameter]] = {}
        for parameter in self.model.parameters():
            rate = backbone_rate if id(parameter) in in_backbone else settings.learning_rate
            decay = settings.weight_decay if id(parameter) in decayed else 0.0
            parameters.setdefault((rate, decay), []).append(parameter)
        groups = [
            {"params": members, "lr": rate, "weight_decay": decay}
            for (rate, decay), members in sorted(parameters.items(), key=lambda item: item[0], reverse=True)
        ]
        if settings.optimizer == "sgd":
            optimizer = torch.optim.SGD(groups, lr=settings.learning_rate, momentum=0.9, nesterov=True)
        else:
            optimizer = torch.optim.AdamW(groups, lr=settings.learning_rate)
        steps = self.trainer.estimated_stepping_batches
        if not math.isfinite(steps) and (settings.schedule != "constant" or settings.warmup):
            raise ValueError(
                "training without an end (max_epochs, max_steps) needs --model.schedule constant --model.warmup 0"
            )
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: learning_rate_factor(step / steps, settings.schedule, settings.warmup)
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def on_train_start(self) -> None:
        # Lightning has made the loader for the schedule's sake, before it read the checkpoint (2.6).
        for state in self.loader_states:
            self.trainer.train_dataloader.load_state_dict(state)
        self.loader_states = []
        # A run that goes on within an epoch does not begin it.
        self._freeze()
        if 0 < self.trainer.max_epochs <= self.hparams.freeze_epochs:
            rank_zero_info(
                f"only the classifier is trained: freeze_epochs is {self.hparams.freeze_epochs}, max_epochs "
                f"{self.trainer.max_epochs}"
            )

    def on_train_epoch_start(self) -> None:
        self._freeze()

    def _freeze(self) -> None:
        """Let the backbone rest or train, as the epoch wants it."""
        if not self.hparams.freeze_epochs:
            return
        # BatchNorm's statistics are frozen, too.
        self.model.network.train(not self._frozen)
        for layer in classifier_layers(self.model):
            layer.train()
        # Processes that exchange gradients agree on which at the start: there, they are dropped after the exchange.
        if isinstance(self.trainer.strategy, SingleDeviceStrategy):
            for parameter in self._backbone():
                parameter.requires_grad_(not self._frozen)

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        for parameter in self.replicated:
            parameter.grad = self.trainer.strategy.reduce(parameter.grad, reduce_op="mean")
        if self._frozen:
            for parameter in self._backbone():
                parameter.grad = None
        # Loss scaling for float16 finds infinite gradients itself, and skips the step.
        if self.trainer.precision == "16-mixed":
            return
        images, loss = self.seen
        gradients = {name: value.grad for name, value in self.model.named_parameters() if value.grad is not None}
        finite = torch.nn.utils.get_total_norm(gradients.values()).isfinite() & loss.isfinite()
        # Where processes have a part of the gradients each, all stop if one must.
        if self.trainer.strategy.reduce_boolean_decision(bool(finite)):
            return
        told = explanation(self, images, gradients, self.trainer.precision_plugin.forward_context)
        raise FloatingPointError(
            f"training stopped at step {self.global_step} (epoch {self.current_epoch + 1}, batch "
            f"{self.trainer.fit_loop.epoch_loop.batch_idx + 1}) before it changed the weights: {told}"
        )

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        data = self._data()
        checkpoint[RECORD] = {
            "spec": self.model.describe().to_dict(),
            "model": given_arguments(self.hparams),
            "data": data.describe(),
            "trainer": {"max_epochs": self.trainer.max_epochs},
            "source": self.source,
            "settings": self.settings,
            "training": {
                # Whole ones; validation and the end of an epoch come after its last batch.
                "epochs": self.current_epoch + self.trainer.is_last_batch,
                "command": " && ".join(dict.fromkeys([*self.earlier_commands, self.command])),
                "seed": run_seed(),
                **self._of_adversarial_training(),
                **origin(self.device),
            },
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        record = read_record(checkpoint)
        spec = ModelSpec.from_dict(record["spec"])
        stage = self.trainer.state.fn if self._trainer else "predict"
        if stage != "predict":
            held, asked = _identity(spec), _identity(self.model.spec)
            if held != asked or spec.operator != self.model.spec.operator:
                raise ValueError(
                    f"the checkpoint holds {held}, but {asked} was asked for; leave out the --model and --data options "
                    "to go on with the checkpoint's network, or leave out --ckpt_path to train a new one"
                )
            check_data(spec, self._data())
        if stage == "fit":
            self._check_optimizer(record["model"])
            self.earlier_commands = record["training"]["command"].split(" && ")
            done = record["training"]["epochs"]
            if 0 <= self.trainer.max_epochs < done:
                raise ValueError(
                    f"the run has had {done} epochs, more than --trainer.max_epochs {self.trainer.max_epochs}: to "
                    "train on, raise it"
                )
            self.resumed_step = checkpoint["global_step"]
            self.loader_states = checkpoint["loops"]["fit_loop"]["state_dict"].get("combined_loader", [])
            # The time that --trainer.max_time gives is that of each call.
            checkpoint["callbacks"].pop("Timer", None)
            self.source = record.get("source")
        if self.model is None or dataclasses.replace(self.model.spec, mean=spec.mean, std=spec.std) != spec:
            self._set_model(spec.build())
        # The checkpoint's normalisation is part of its spec and not among its weights.
        self.model.normalise_as(spec)
        # Lightning would do so only after it has rounded the checkpoint's weights to float32 (2.6).
        if self._trainer and self.trainer.precision == "64-true":
            self.model.double()
        if stage == "predict" and self._trainer:
            self._announce()

    def _of_adversarial_training(self) -> dict[str, Any]:
        """Return how images were attacked and what was alarming, if they were."""
        found = [callback.alarms for callback in self.trainer.callbacks if isinstance(callback, OverfittingAlarm)]
        return {"adversarial": self.hparams.adversarial, "alarms": found[0]} if found else {}

    @property
    def memory_format(self) -> torch.memory_format:
        return torch.channels_last if self.hparams.channels_last else torch.contiguous_format

    @property
    def _frozen(self) -> bool:
        return self.current_epoch < self.hparams.freeze_epochs

    def _backbone(self) -> list[nn.Parameter]:
        """Return the parameters of all but the classifier."""
        layers = classifier_layers(self.model)
        head = {id(parameter) for layer in layers for parameter in layer.parameters(recurse=False)}
        return [parameter for parameter in self.model.parameters() if id(parameter) not in head]

    def _announce(self) -> None:
        rank_zero_info(f"{_identity(self.model.spec)}, {sum(p.numel() for p in self.parameters()):,} parameters")

    def _set_model(self, model: ImageModel) -> None:
        self.model = model.to(memory_format=self.memory_format)
        # A function and no module, whose parameters would be registered twice.
        self.training_forward = torch.compile(model.forward, dynamic=False) if self.hparams.compile else model.__call__
        classes = len(model.class_names)
        self.mix = MixUp(alpha=self.hparams.mixup, num_classes=classes) if self.hparams.mixup else None
        self.accuracy = nn.ModuleDict(
            {f"{split}_accuracy": MulticlassAccuracy(classes, average="micro") for split in ("val", "test")}
        )

    def _check_optimizer(self, old: Mapping[str, Any]) -> None:
        """Refuse what would have no effect: the optimiser goes on with the state it had."""
        kept = (
            "optimizer",
            "learning_rate",
            "backbone_learning_rate",
            "freeze_epochs",
            "weight_decay",
            "decay_decoupled_filters",
        )
        # Settings that an earlier version did not have were not used.
        if changed := [name for name in kept if old.get(name, UNUSED.get(name)) != self.hparams[name]]:
            raise ValueError(
                f"{', '.join(changed)} cannot change when a run goes on (--ckpt_path); to start from its weights, "
                "export it (python -m zoo export) and train with --model.init_from"
            )

    def _build(self, data: ImageData, stage: str) -> ImageModel:
        settings = self.hparams
        if settings.init_from and stage != "fit":
            if settings.operator or settings.calibrate is not None:
                raise ValueError(
                    f"{self.trainer.state.fn.value} measures a network as it is, but operator and calibrate say how "
                    "training begins; leave them out, or make the converted network first (python -m zoo convert)"
                )
            return start_from(settings.init_from)
        if settings.init_from:
            model = start_from(settings.init_from, in_chans=data.in_chans, input_size=data.input_size)
            self.source = {"name": settings.init_from, "licence": licence_of(settings.init_from)}
            if settings.operator not in (None, PLAIN):
                report = convert(model, settings.operator)
                done, left = len(report.converted), len(report.skipped)
                rank_zero_info(f"{report.operator}: {done} convolutions converted, {left} left as they are")
                if settings.calibrate is not None:
                    _, calibration = calibrate(model, [data.sample(CALIBRATION_IMAGES)], settings.calibrate)
                    rank_zero_info(str(calibration))
            elif settings.operator == PLAIN and model.spec.operator is not None:
                raise ValueError(
                    f"{settings.init_from} is {model.spec.operator_name}; to train a plain network, start from its twin"
                )
            if model.class_names != tuple(data.class_names):
                model.reset_classifier(data.class_names)
            return model.train()
        return build(
            settings.architecture or "cnn6",
            settings.operator or "tanh_cosine",
            class_names=data.class_names,
            in_chans=data.in_chans,
            input_size=data.input_size,
            mean=data.mean,
            std=data.std,
            **(settings.architecture_args or {}),
        )

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
        self.log(f"{split}_loss", F.cross_entropy(logits, labels), batch_size=len(labels), sync_dist=True)
        self.log(name, self.accuracy[name], prog_bar=True, batch_size=len(labels))


def learning_rate_factor(progress: float, schedule: str, warmup: float) -> float:
    """Return the learning rate as a share of the highest, after ``progress`` (0 to 1) of training."""
    if progress < warmup:
        return progress / warmup
    if schedule == "cosine":
        return 0.5 * (1 + math.cos(math.pi * min(1.0, (progress - warmup) / (1 - warmup))))
    if schedule == "step":
        return 1.0 if progress < 0.5 else 0.1 if progress < 0.75 else 0.01
    return 1.0


def orthogonality_penalty(model: nn.Module) -> Tensor:
    """Return the sum over decoupled layers of ``½ ‖ŴᵀŴ - I‖²``, Ŵ's columns being the layer's normalised filters."""
    total = torch.zeros((), device=next(model.parameters()).device)
    for layer in decoupled_layers(model).values():
        weight = layer.effective_weight()
        filters = (weight / filter_norm(weight, eps=layer.operator.eps)).flatten(1)
        gram = filters @ filters.T
        total = total + 0.5 * (gram - torch.eye(len(gram), device=gram.device)).square().sum()
    return total


def check_data(spec: ModelSpec, data: ImageData) -> None:
    """Refuse to train or measure a network on images of other classes, channels or size than its own.

    Raises:
        ValueError: they differ.
    """
    for what in ("class_names", "in_chans", "input_size"):
        mine, theirs = getattr(spec, what), getattr(data, what)
        if mine != (tuple(theirs) if what == "class_names" else theirs):
            raise ValueError(
                f"the network has {what} {mine}, but {data.title} has {theirs}; choose the data it was trained on "
                "(--data), or train again"
            )


def _identity(spec: ModelSpec) -> str:
    settings = f" {dict(spec.model_args)}" if spec.model_args else ""
    return f"{spec.architecture}{settings} with {spec.operator or PLAIN} and {len(spec.class_names)} classes"
