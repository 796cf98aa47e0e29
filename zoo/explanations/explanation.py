"""``explain``: what each pixel contributes to a logit, by the very computation of the network."""

import copy
import dataclasses
import operator
import traceback
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, fx, nn

from operators import DecoupledConv2d, decoupled_layers
from operators.evaluation_mode import evaluating
from operators.fold import FoldedConv2d
from operators.fused import no_autocast
from operators.linear_map import MixedImagesError, NotLinearError, Signal
from operators.lookup import look_up
from operators.observation import refuse_compiled
from zoo.arithmetic import exact_arithmetic
from zoo.explanations.layer_maps import LayerMaps, layer_maps, recording_signals
from zoo.models.image_model import ImageModel

Class = int | str

# Contributions and bias add up to the logit within so much of the image's largest logit.
TOLERANCE = 1e-4


@dataclasses.dataclass(frozen=True)
class Explanation:
    """What made up one logit of each image: ``contributions.sum((1, 2, 3)) + bias = logit``.

    Attributes:
        contributions: of each pixel and channel, ``W(x) ⊙ x``, float32 (N, C, H, W), in the units of the logit. ``x``
            is the normalised image: a pixel of the mean colour contributes nothing.
        bias: ``β(x)``, what no pixel contributes, (N,).
        logits: (N, num_classes).
        target: the class that is explained, int64 (N,).
        layers: the maps of the layers that were asked for, by their names.
    """

    contributions: Tensor
    bias: Tensor
    logits: Tensor
    target: Tensor
    layers: Mapping[str, LayerMaps]

    @property
    def logit(self) -> Tensor:
        """The logit that is explained, (N,)."""
        return _chosen(self.logits, self.target)


def explain(
    model: nn.Module,
    images: Tensor,
    target: Class | Sequence[Class] | Tensor | None = None,
    *,
    layers: str | Sequence[str] = (),
) -> Explanation:
    """Say what each pixel contributes to the logit of a class.

    Every factor by which a layer multiplies is held fixed, such as ``weighting(‖w‖) h(n) g(c) / (n c)`` of a decoupled
    convolution, a gate, or a normaliser's standard deviation: for this image the network is then ``W(x) · x + β(x)``,
    exactly. Of a product of two signals each is given half; a gate that is added counts as bias. The model is explained
    in evaluation mode and float32 (float64, if it is), and left as it was. It costs three and a half to four forward
    passes.

    Args:
        model: one of the zoo, or any convolutional network, converted or plain.
        images: (N, C, H, W): for a model of the zoo in [0, 1], for another network as it takes them.
        target: the class, by its index or, for a model of the zoo, its name; one for all images, or one for each. By
            default the likeliest of each image.
        layers: the name of a decoupled layer of the network whose maps are wanted, or several.

    Raises:
        TypeError: a module that computes something of which nobody has said what linear map it is, named in the
            message; a compiled, exported or folded network; images that are no tensor of floats.
        ValueError: an unknown class or layer, or images that the model refuses.
        ArithmeticError: contributions and bias do not add up to the logit, within 1e-4 of the image's largest logit.

    Source: for B-cos networks, Böhle et al., B-cos Networks: Alignment is All We Need for Interpretability, CVPR 2022.
    """
    _check(model, images)
    model = _in_single_precision(model)
    parameter = next(model.parameters())
    # Gradients come with channels first, and two formats at a time would cost a pass more.
    images = images.detach().to(parameter.device, parameter.dtype).contiguous()
    legal = decoupled_layers(model.network if isinstance(model, ImageModel) else model)
    names = [layers] if isinstance(layers, str) else layers
    chosen = {name: look_up(legal, name, "decoupled layer") for name in names}
    # Whoever calls it in inference mode gets gradients all the same.
    with (
        torch.inference_mode(False),
        evaluating(model),
        exact_arithmetic(images.device),
        no_autocast(images.device.type),
    ):
        images = images.clone()
        with torch.no_grad():
            logits = model(images.clone())
        target = _indices(target, logits, model.class_names if isinstance(model, ImageModel) else None)
        try:
            return _explained(model, images, logits, target, chosen)
        except (MixedImagesError, ArithmeticError):
            if len(images) == 1:
                raise
            # A network that mixes the rows of a batch, such as one of windows, is explained image by image.
            parts = zip(images.split(1), logits.split(1), target.split(1), strict=True)
            return _joined([_explained(model, *part, chosen) for part in parts])


def _explained(
    model: nn.Module, images: Tensor, logits: Tensor, target: Tensor, layers: Mapping[str, DecoupledConv2d]
) -> Explanation:
    """Return the explanation of a batch, in evaluation mode.

    Raises:
        TypeError, ArithmeticError: as :func:`explain`.
        MixedImagesError: the network does not keep the images of a batch in order.
        ValueError: a layer that the network does not use.
    """
    is_ours = isinstance(model, ImageModel)
    network = model.network if is_ours else model
    x = ((images - model.mean) / model.std if is_ours else images).detach().requires_grad_()
    one = x.new_ones(len(x)).requires_grad_()
    with torch.enable_grad(), recording_signals(layers, one) as recorded:
        answer = _linear_answer(network, x.clone(), one)
        if missing := layers.keys() - recorded.keys():
            raise ValueError(f"the network does not use its layers {', '.join(sorted(missing))}; leave them out")
        inputs = [x, one, *(recorded[name].output for name in layers)]
        total = _chosen(answer, target).sum()
        # What does not touch the logit has a gradient of zeros.
        weights, bias, *gradients = torch.autograd.grad(total, inputs, materialize_grads=True)
    contributions = weights * x.detach()
    _check_sum(contributions, bias, logits, target)
    size = x.shape[-2:]
    maps = {
        name: layer_maps(layer, recorded[name], gradient, size)
        for (name, layer), gradient in zip(layers.items(), gradients, strict=True)
    }
    return Explanation(contributions, bias, logits, target, maps)


def _joined(explanations: Sequence[Explanation]) -> Explanation:
    """Return the explanations of several batches as one."""
    fields = ("contributions", "bias", "logits", "target")
    tensors = [torch.cat([getattr(each, field) for each in explanations]) for field in fields]
    kinds = [field.name for field in dataclasses.fields(LayerMaps)]
    maps = {
        name: LayerMaps(*(torch.cat([getattr(each.layers[name], kind) for each in explanations]) for kind in kinds))
        for name in explanations[0].layers
    }
    return Explanation(*tensors, maps)


def _check(model: nn.Module, images: Tensor) -> None:
    if not isinstance(model, nn.Module):
        what = "the network before torch.export" if type(model).__name__ == "ExportedProgram" else "a network"
        raise TypeError(f"explain takes {what}, got {type(model).__name__}")
    refuse_compiled(model, "explain")
    if isinstance(model, torch.jit.ScriptModule | fx.GraphModule):
        raise TypeError(f"explain takes the network before it was exported or traced, got {type(model).__name__}")
    if any(isinstance(module, FoldedConv2d) for module in model.modules()):
        raise TypeError("explain takes the network before operators.fold; fold returned a copy, so it is still there")
    if next(model.parameters(), None) is None:
        raise TypeError(f"explain takes a network, and {type(model).__name__} has no parameters")
    if not isinstance(images, Tensor) or not images.is_floating_point():
        kind = images.dtype if isinstance(images, Tensor) else type(images).__name__
        raise TypeError(
            f"images must be a tensor of floats (N, C, H, W), got {kind}; model.transform(image)[None] makes one of a "
            "PIL image, image.float() / 255 of bytes"
        )
    if images.dim() != 4 or not images.numel():
        raise ValueError(f"images must be (N, C, H, W) with at least one image, got {tuple(images.shape)}")


def _in_single_precision(model: nn.Module) -> nn.Module:
    """Return the model, or of one in half precision a copy in float32."""
    half = any(parameter.dtype in (torch.float16, torch.bfloat16) for parameter in model.parameters())
    return copy.deepcopy(model).float() if half else model


def _indices(
    target: Class | Sequence[Class] | Tensor | None, logits: Tensor, class_names: Sequence[str] | None
) -> Tensor:
    """Return the index of the class that is explained, for each image.

    Raises:
        ValueError: an unknown class, logits that are no (N, classes), or another number of classes than of images.
    """
    if not isinstance(logits, Tensor) or logits.dim() != 2:
        raise ValueError("explain takes a network that answers with logits (N, classes)")
    count, number = logits.shape
    if target is None:
        return logits.argmax(1)
    wanted = target.tolist() if hasattr(target, "tolist") else target
    wanted = list(wanted) if isinstance(wanted, Iterable) and not isinstance(wanted, str) else [wanted] * count
    if len(wanted) != count:
        raise ValueError(f"target is one class, or one for each of {count} images, got {len(wanted)}")
    return torch.tensor([_index(value, number, class_names) for value in wanted], device=logits.device)


def _index(value: object, classes: int, class_names: Sequence[str] | None) -> int:
    if isinstance(value, str):
        if class_names is None:
            raise ValueError(f"this network does not know the names of its classes; give {value!r} as an index")
        return look_up({name: index for index, name in enumerate(class_names)}, value, "class")
    if isinstance(value, bool) or not hasattr(value, "__index__") or not 0 <= operator.index(value) < classes:
        raise ValueError(f"a class is an index from 0 to {classes - 1} or a name, got {value!r}")
    return operator.index(value)


def _linear_answer(network: nn.Module, x: Tensor, one: Tensor) -> Tensor:
    """Return the logits, linear in ``x`` and ``one``.

    Raises:
        TypeError: the module, by its name, that computes what no rule is known for.
    """
    try:
        answer = network(Signal.of(x, one))
    except NotLinearError as error:
        names = {module: name for name, module in network.named_modules()}
        frames = [frame.f_locals.get("self") for frame, _ in traceback.walk_tb(error.__traceback__)]
        module = [value for value in frames if isinstance(value, nn.Module) and value in names][-1]
        where = f"{names[module] or 'the network'} ({type(module).__name__})"
        raise TypeError(
            f"{where} computes {error}, and what linear map that is for one image is not known; a rule for it "
            "is one row of operators.linear_map.RULES"
        ) from error
    if not isinstance(answer, Signal):
        raise TypeError(
            f"{type(network).__name__} answers with what is held fixed (a gate, a norm or a probability, computed by "
            "sigmoid, sqrt, softmax, ...) or has left torch's functions; explain takes logits that are linear in "
            "something"
        )
    return answer.as_subclass(Tensor)


def _chosen(logits: Tensor, target: Tensor) -> Tensor:
    return logits.gather(1, target.unsqueeze(1)).squeeze(1)


def _check_sum(contributions: Tensor, bias: Tensor, logits: Tensor, target: Tensor) -> None:
    """Refuse contributions that do not add up.

    Raises:
        ArithmeticError: they and the bias differ from the logit by more than ``TOLERANCE`` of the largest logit.
    """
    total = contributions.double().sum((1, 2, 3)) + bias.double()
    difference = (total - _chosen(logits, target).double()).abs() / logits.abs().amax(1).double().clamp_min(1e-30)
    # Written so that NaN is refused, too.
    if not (difference <= TOLERANCE).all():
        raise ArithmeticError(
            f"contributions and bias differ from the logit by {difference.max():.1e} of the largest logit, more than "
            f"{TOLERANCE:.0e}: the network draws something at random, or computes something outside torch's functions "
            "(a custom autograd function?)"
        )
