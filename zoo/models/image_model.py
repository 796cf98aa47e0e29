"""A network that takes images in [0, 1] and normalises them itself."""

import dataclasses
import math
import operator
import os
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor, nn

from operators import decoupled_layers
from operators.evaluation_mode import evaluating
from operators.selection import plain_convolutions
from zoo.files import is_url
from zoo.models.spec import ModelSpec
from zoo.models.transform import ImageTransform

# What :meth:`ImageModel.classify` takes, and a class with its probability.
Images = str | os.PathLike[str] | Image.Image | Tensor | Iterable[str | os.PathLike[str] | Image.Image | Tensor]
Guess = tuple[str, float]


class ImageModel(nn.Module):
    """A network that takes images in [0, 1] and normalises them itself.

    Attributes:
        network: the plain or decoupled network.
        spec: the :class:`ModelSpec` it was built from. The mean and std of the pixels are part of it, and not of the
            state dict, which has the network's tensors alone.
        transform: turns a PIL image into one image of the shape below.

    Shape:
        (N, in_chans, H, W), floats in [0, 1] of any precision, to logits (N, num_classes) in the model's own.

    Raises:
        TypeError: images that are no tensor of floats.
        ValueError: images of another shape, or plainly not in [0, 1]. Their range is looked at outside compiled graphs
            only, and of training on an accelerator in the first batch only.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, network: nn.Module, spec: ModelSpec) -> None:
        super().__init__()
        self.network = network
        self.spec = spec
        self.register_buffer("mean", torch.tensor(spec.mean).view(-1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(spec.std).view(-1, 1, 1), persistent=False)
        self._range_is_checked = False
        self.register_load_state_dict_post_hook(_normalise_as_the_spec_says)

    def forward(self, images: Tensor) -> Tensor:
        self._check(images)
        return self.network((images.to(self.mean.dtype) - self.mean) / self.std)

    def normalise_as(self, spec: ModelSpec) -> None:
        """Take over the mean and the standard deviation of another spec."""
        self.spec = dataclasses.replace(self.spec, mean=spec.mean, std=spec.std)
        for buffer, values in ((self.mean, spec.mean), (self.std, spec.std)):
            buffer.copy_(torch.tensor(values).view(-1, 1, 1))

    def set_input_size(self, input_size: int) -> None:
        """Take images of another size from now on.

        Raises:
            ValueError: the network cannot take images of that size.
        """
        if input_size != self.spec.input_size:
            usual = self.spec
            self.spec = dataclasses.replace(usual, input_size=input_size)
            try:
                check_input_size(self)
            except ValueError:
                self.spec = usual
                raise

    def describe(self) -> ModelSpec:
        """Return ``spec`` with what single layers have of their own: their settings, or that they stay plain."""
        layers = decoupled_layers(self.network)
        if self.spec.operator is None or not layers:
            return self.spec
        usual = self.spec.operator.to_dict()
        own = {
            name: {field: value for field, value in layer.operator.to_dict().items() if value != usual[field]}
            for name, layer in layers.items()
        }
        settings = {name: values for name, values in own.items() if values}
        return dataclasses.replace(self.spec, layer_settings=settings, plain_layers=plain_convolutions(self.network))

    @property
    def transform(self) -> ImageTransform:
        return ImageTransform(self.spec.in_chans, self.spec.input_size)

    @property
    def class_names(self) -> tuple[str, ...]:
        return self.spec.class_names

    def rename_classes(self, class_names: Sequence[str]) -> None:
        """Give the classes other names.

        Raises:
            ValueError: more or fewer names than classes.
        """
        names = names_of_classes(class_names, len(self.class_names))
        self.spec = dataclasses.replace(self.spec, class_names=names)

    def classify(self, images: Images, top: int = 5) -> list[Guess] | list[list[Guess]]:
        """Name the likeliest classes of an image, or of each of several, in evaluation mode.

        Args:
            images: a PIL image, the path of an image file or a tensor (in_chans, H, W) of floats in [0, 1]; or a
                sequence of these, or a tensor (N, in_chans, H, W). A tensor is taken as it is, with a warning if its
                size is not the network's; other images become what :attr:`transform` makes of them.
            top: how many classes; all, if there are fewer.

        Returns:
            For one image ``(class name, probability)`` pairs, the likeliest first; for several, a list of these.

        Raises:
            FileNotFoundError: no such file.
            TypeError, ValueError: something else than these images, a file that is no readable image, ``top`` below 1,
                or answers that are not finite.
        """
        if isinstance(top, bool) or not hasattr(top, "__index__") or (top := operator.index(top)) < 1:
            raise ValueError(f"top is a number of classes, at least 1, got {top!r}")
        if isinstance(images, bytes | bytearray | Mapping) or hasattr(images, "read"):
            raise TypeError(
                f"classify takes the path of an image file, a PIL image or a tensor, or several, got "
                f"{type(images).__name__}; PIL.Image.open reads open files, and io.BytesIO makes one of bytes"
            )
        is_batch = isinstance(images, Tensor) and images.dim() != 3
        single = not is_batch and (isinstance(images, str | Tensor) or not isinstance(images, Iterable))
        # Images that do not come as a batch may be of different sizes, and go one by one.
        batches = [images.to(self.mean.device)] if is_batch else map(self._as_batch, [images] if single else images)
        with evaluating(self), torch.inference_mode():
            guesses = []
            for batch in batches:
                self._warn_of_size(batch)
                guesses += self._guesses(self(batch), top)
        return guesses[0] if single else guesses

    def _as_batch(self, image: str | os.PathLike[str] | Image.Image | Tensor) -> Tensor:
        if isinstance(image, str | os.PathLike):
            if not Path(image).is_file():
                fetch = "fetch it first" if is_url(os.fspath(image)) else "check the path"
                raise FileNotFoundError(f"no image file {os.fspath(image)}; {fetch}")
            image = self.transform.read(Path(image)).float() / 255
        elif not isinstance(image, Tensor):
            image = self.transform(image)
        return image.unsqueeze(0).to(self.mean.device)

    def _warn_of_size(self, images: Tensor) -> None:
        size = self.spec.input_size
        if images.dim() == 4 and images.shape[-2:] != (size, size):
            height, width = images.shape[-2:]
            warnings.warn(
                f"a tensor of {height}×{width} pixels is taken as it is, and the network was trained on {size}×{size}; "
                "model.transform makes its size of a PIL image",
                stacklevel=3,
            )

    def _guesses(self, logits: Tensor, top: int) -> list[list[Guess]]:
        if not logits.isfinite().all():
            raise ValueError(
                "the network's answers are not finite (NaN or infinite), so no class is likely; run it in float32 "
                "(model.float()), or see whether its weights are whole (zoo.verify)"
            )
        values, labels = logits.float().softmax(1).topk(min(top, logits.shape[1]))
        rows = zip(labels.tolist(), values.tolist(), strict=True)
        return [[(self.class_names[label], value) for label, value in zip(*row, strict=True)] for row in rows]

    def get_classifier(self) -> nn.Module | tuple[nn.Module, ...]:
        """Return the last layer, or layers, of the network, as timm's networks do."""
        return self.network.get_classifier()

    def reset_classifier(self, class_names: Sequence[str]) -> None:
        """Give the network a fresh classifier for these classes.

        Raises:
            ValueError: no class.
        """
        names = names_of_classes(class_names, None)
        self.network.reset_classifier(len(names))
        self.spec = dataclasses.replace(self.spec, class_names=names)

    def _check(self, images: Tensor) -> None:
        if not isinstance(images, Tensor):
            raise TypeError(
                f"images must be a tensor of floats in [0, 1], got {type(images).__name__}; "
                "model.transform(image)[None] makes one of a PIL image, torch.from_numpy of an array"
            )
        if not images.is_floating_point():
            raise TypeError(f"images must be floats in [0, 1], got {images.dtype}; use image.float() / 255")
        if images.dim() != 4 or images.shape[1] != self.spec.in_chans:
            raise ValueError(
                f"images must have shape (N, {self.spec.in_chans}, H, W), got {tuple(images.shape)}; "
                "model.transform turns a PIL image into one of them"
            )
        if images.numel() and not self._is_unreadable(images):
            self._check_range(*(bound.item() for bound in images.detach().aminmax()))
            self._range_is_checked = True

    def _is_unreadable(self, images: Tensor) -> bool:
        """Say whether pixels cannot be looked at, as in a graph that is recorded, or not without a cost."""
        if torch.compiler.is_compiling() or torch._C._functorch.peek_interpreter_stack():
            return True
        if images.is_cuda and torch.cuda.is_current_stream_capturing():
            return True
        # Reading a number waits for all that the accelerator has yet to do.
        return self._range_is_checked and self.training and images.device.type != "cpu"

    def _check_range(self, low: float, high: float) -> None:
        if math.isnan(low) or math.isnan(high):
            raise ValueError(
                "images must be in [0, 1], got NaN (not a number); find out where it arises, e.g. by "
                "images.isnan().nonzero()"
            )
        if low < -0.5 or high > 1.5:
            raise ValueError(
                f"images must be in [0, 1], got values from {low:.3g} to {high:.3g}; "
                "divide bytes by 255, and do not normalise: the model does"
            )


def check_input_size(model: ImageModel) -> None:
    """Put one black image of ``model.spec.input_size`` through the network, in evaluation mode.

    Raises:
        ValueError: the network cannot take images of that size.
    """
    spec = model.spec
    image = model.mean.new_zeros(1, spec.in_chans, spec.input_size, spec.input_size)
    try:
        with evaluating(model), torch.no_grad():
            model(image)
    # A network says in as many ways as it has layers that an image does not fit.
    except Exception as error:
        made_for = default_input_size(model.network)
        raise size_error(spec.architecture, made_for, spec.input_size, error) from error


def size_error(architecture: str, made_for: int, size: int, error: Exception) -> ValueError:
    reason = str(error) or type(error).__name__
    return ValueError(
        f"{architecture}, made for images of {made_for}×{made_for} pixels, cannot take {size}×{size} ({reason}); "
        "choose another size (input_size; on the command line --data.input_size, with --data ImageFolder) or another "
        "architecture (cnn6 and resnet20 take small images)"
    )


def default_input_size(network: nn.Module) -> int:
    return network.input_size if hasattr(network, "input_size") else network.pretrained_cfg["input_size"][-1]


def names_of_classes(class_names: Sequence[str] | None, num_classes: int | None) -> tuple[str, ...]:
    if class_names is None:
        class_names = [str(label) for label in range(10 if num_classes is None else num_classes)]
    if isinstance(class_names, str | Mapping) or not isinstance(class_names, Iterable):
        raise TypeError(f"class_names are a list of names, one for each class, got {class_names!r}")
    class_names = tuple(class_names)
    if wrong := [name for name in class_names if not isinstance(name, str)]:
        raise TypeError(
            f"class_names are names, got {wrong[0]!r} of type {type(wrong[0]).__name__}; str() makes one of it"
        )
    if num_classes is not None and num_classes != len(class_names):
        raise ValueError(f"num_classes={num_classes}, but there are {len(class_names)} class names")
    if not class_names:
        raise ValueError("a model needs at least one class (num_classes, class_names), got none")
    return class_names


def _normalise_as_the_spec_says(model: ImageModel, keys: object) -> None:
    """Fill the mean and std anew after a state dict was loaded, which has neither: they may have had no memory yet."""
    if model.mean.is_meta:
        device = next(model.network.parameters()).device
        model.mean, model.std = (torch.empty_like(buffer, device=device) for buffer in (model.mean, model.std))
    model.normalise_as(model.spec)
