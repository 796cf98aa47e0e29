"""Convert the smallest architecture of every timm module and check it: python -m benchmarks.timm_sweep

A row that results/timm_sweep.json has already is kept; --only GLOB measures it again. Networks have random weights.
Parameters that timm initialises to constants (gains of 0, layer scales of 1e-6) are moved away from them, so that every
convolution takes part in the answer. python -m benchmarks.conversion writes the table in docs/conversion.md.
"""

import argparse
import copy
import dataclasses
import fnmatch
import json
import os
import time
import warnings
from collections import Counter
from collections.abc import Callable
from typing import Any

import timm
import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from benchmarks import measure
from operators import ConversionReport, OperatorConfig, convert_decoupled, decoupled_layers, revert
from zoo.architectures import ARCHITECTURES

IDENTITY = OperatorConfig("linear", "cosine", weighting="linear")
OPERATOR = OperatorConfig("tanh", "cosine")
# Relative to the largest answer.
TOLERANCE = 1e-4
# Networks made for larger images, and able to take others, get images of this size.
LARGEST = 224
OUTPUT = measure.RESULTS / "timm_sweep.json"


class Failure(Exception):
    """A check that did not hold, in words."""


@dataclasses.dataclass(frozen=True)
class Case:
    """An architecture with random weights, and what its plain network answers.

    Attributes:
        arguments: those of ``timm.create_model``.
        network: the plain network, in evaluation mode.
        images: (2, C, H, W).
        answer: the network's, in evaluation mode.
    """

    architecture: str
    arguments: dict[str, Any]
    network: nn.Module
    images: Tensor
    answer: Tensor

    @classmethod
    def create(cls, architecture: str) -> "Case":
        config = timm.get_pretrained_cfg(architecture)
        channels, size, _ = config.input_size
        arguments = {"num_classes": 10}
        if size > LARGEST and not config.fixed_input_size:
            size = max(LARGEST, (config.min_input_size or (0,))[-1])
        torch.manual_seed(0)
        network = timm.create_model(architecture, **arguments).eval()
        move_constants(network)
        images = torch.randn(2, channels, size, size)
        with torch.no_grad():
            return cls(architecture, arguments, network, images, network(images))

    def double(self) -> "Case":
        """Return the same case in double precision."""
        network, images = copy.deepcopy(self.network).double(), self.images.double()
        with torch.no_grad():
            return dataclasses.replace(self, network=network, images=images, answer=network(images))

    def converted(self, operator: OperatorConfig | str) -> tuple[nn.Module, ConversionReport]:
        return convert_decoupled(copy.deepcopy(self.network), operator, depthwise=True)


def state_dict_keys(case: Case) -> None:
    """The converted network has the keys of the plain one, in the same order."""
    if list(case.converted(OPERATOR)[0].state_dict()) != list(case.network.state_dict()):
        raise Failure("other keys")


def forward_backward(case: Case) -> None:
    """In training, answers and gradients are finite, and every converted filter has a gradient."""
    network, _ = case.converted(OPERATOR)
    answer = network.train()(case.images)
    answer.square().mean().backward()
    gradients = {name: p.grad for name, p in network.named_parameters() if p.grad is not None}
    if not answer.isfinite().all() or not all(gradient.isfinite().all() for gradient in gradients.values()):
        raise Failure("not finite")
    if missing := [
        name for name in decoupled_layers(network) if not gradients.get(f"{name}.weight", torch.zeros(())).any()
    ]:
        raise Failure(f"no gradient in {', '.join(missing)}")


def operator_matters(case: Case) -> None:
    """With another operator the answer is another one: the converted layers are in use."""
    if relative_difference(case.converted(OPERATOR)[0], case) < 10 * TOLERANCE:
        raise Failure("the answer does not change")


def identity(case: Case) -> str:
    """``linear_cosine`` weighted ``linear`` answers what the plain network answers; the relative difference."""
    difference = relative_difference(case.converted(IDENTITY)[0], case)
    if not difference <= TOLERANCE:
        exact = case.double()
        in_double = relative_difference(exact.converted(IDENTITY)[0], exact)
        rounding = (case.answer - exact.answer).abs().max() / exact.answer.abs().max()
        raise Failure(
            f"differs by {difference:.1e}, in double precision by {in_double:.1e}; single precision itself costs the "
            f"plain network {rounding:.1e}"
        )
    return f"{difference:.0e}"


def features_only(case: Case) -> None:
    """A network made with ``features_only`` is converted, and its feature maps keep their shapes."""
    network = timm.create_model(case.architecture, features_only=True)
    with torch.no_grad():
        before = [features.shape for features in network.eval()(case.images)]
        after = [features.shape for features in convert_decoupled(network, OPERATOR, depthwise=True)[0](case.images)]
    if before != after:
        raise Failure("other shapes")


def reset_classifier(case: Case) -> None:
    """A converted network takes a fresh classifier, and its convolutions stay converted."""
    network, report = case.converted(OPERATOR)
    network.reset_classifier(7)
    with torch.no_grad():
        shape = network(case.images).shape
    if shape != (2, 7):
        raise Failure(f"answers {tuple(shape)}")
    if len(decoupled_layers(network)) != len(report.converted):
        raise Failure("convolutions became plain")


def deepcopy(case: Case) -> None:
    """A copy of a converted network answers the same and shares no parameter with it."""
    network, _ = case.converted(OPERATOR)
    twin = copy.deepcopy(network)
    with torch.no_grad():
        if not torch.equal(network(case.images), twin(case.images)):
            raise Failure("another answer")
    if {id(p) for p in network.parameters()} & {id(p) for p in twin.parameters()}:
        raise Failure("shared parameters")


def reverted(case: Case) -> None:
    """``revert`` gives back the same classes, keys and, to the last bit, answers."""
    network = revert(case.converted(OPERATOR)[0])
    if [type(module) for module in network.modules()] != [type(module) for module in case.network.modules()]:
        raise Failure("other classes")
    if list(network.state_dict()) != list(case.network.state_dict()):
        raise Failure("other keys")
    with torch.no_grad():
        if not torch.equal(network(case.images), case.answer):
            raise Failure("another answer")


CHECKS: dict[str, Callable[[Case], str | None]] = {
    "state-dict keys": state_dict_keys,
    "forward and backward": forward_backward,
    "another answer": operator_matters,
    "identity": identity,
    "features_only": features_only,
    "reset_classifier": reset_classifier,
    "deepcopy": deepcopy,
    "revert": reverted,
}


def examine(architecture: str) -> dict[str, Any]:
    """Return what was converted and what each check found: ``"ok"``, a remark, or ``"failed: ..."``."""
    case = Case.create(architecture)
    _, report = case.converted(OPERATOR)
    found = {}
    for name, check in CHECKS.items():
        try:
            found[name] = check(case) or "ok"
        # Whatever a network raises is what a user would have met.
        except Exception as error:
            found[name] = f"failed: {error if isinstance(error, Failure) else f'{type(error).__name__}: {error}'}"[:300]
    return {
        "architecture": architecture,
        "parameters": sum(parameter.numel() for parameter in case.network.parameters()),
        "images": list(case.images.shape),
        "converted": dict(Counter(layer.kind for layer in report.converted)),
        "skipped": dict(Counter(f"{layer.kind}: {layer.reason}" for layer in report.skipped)),
        "checks": found,
    }


def move_constants(network: nn.Module) -> None:
    """Add noise to every parameter whose values are all the same."""
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.numel() and parameter.min() == parameter.max():
                parameter += 0.1 * torch.randn_like(parameter)


def relative_difference(network: nn.Module, case: Case) -> float:
    with torch.no_grad():
        difference = (network(case.images) - case.answer).abs().max()
    return (difference / case.answer.abs().max()).item()


def modules() -> list[str]:
    """Return the names of timm's modules that hold architectures."""
    return [name for name in timm.list_modules() if hasattr(timm.models, name)]


def smallest(module: str) -> tuple[str, bool]:
    """Return the architecture of a timm module with the fewest parameters, and whether it has a convolution.

    Of several, it is the one with the most convolutions.
    """
    sizes = {}
    # Ours are registered beside timm's.
    for name in sorted(set(timm.list_models(module=module)) - set(ARCHITECTURES)):
        with torch.device("meta"):
            try:
                network = timm.create_model(name)
            # Some networks look at numbers while they are built, which a meta tensor does not have.
            except (RuntimeError, NotImplementedError):
                with torch.device("cpu"):
                    network = timm.create_model(name)
        convolutions = sum(isinstance(layer, _ConvNd) for layer in network.modules())
        sizes[name] = sum(parameter.numel() for parameter in network.parameters()), -convolutions
    name = min(sizes, key=lambda name: sizes[name])
    return name, sizes[name][1] < 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="*", metavar="GLOB", help="only timm modules with such a name")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="CPU threads (default: %(default)s)")
    parsed = parser.parse_args()
    torch.set_num_threads(parsed.threads)
    warnings.filterwarnings("ignore")
    rows = {}
    if OUTPUT.is_file():
        rows = json.loads(OUTPUT.read_text(encoding="utf-8"))["rows"]
    for module in fnmatch.filter(modules(), parsed.only):
        if module in rows and parsed.only == "*":
            continue
        began = time.perf_counter()
        architecture, has_convolution = smallest(module)
        rows[module] = examine(architecture) if has_convolution else {"architecture": architecture}
        failed = [f"{name} {found}" for name, found in rows[module].get("checks", {}).items() if "failed" in found]
        print(f"{module}: {architecture}, {time.perf_counter() - began:.0f} s, {'; '.join(failed) or 'ok'}", flush=True)
        record = {"timm": timm.__version__, "torch": str(torch.__version__), "rows": dict(sorted(rows.items()))}
        measure.write(record, OUTPUT)


if __name__ == "__main__":
    main()
