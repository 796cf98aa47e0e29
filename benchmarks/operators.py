"""What single decoupled layers cost beside nn.Conv2d: python -m benchmarks.operators

Each layer is compared with the plain convolution of its shape, with the literal formula (the patch norm by a
convolution with a filter of ones, as in the authors' code, and automatic gradients), and with BcosConv2d where the
package bcos is installed, after checking that it computes what linear_square_cosine computes. The estimate is the time
of the plain layer plus that of moving the bytes of tanh_cosine's extra passes.
"""

import dataclasses
import fnmatch
import importlib.util
import warnings
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks import measure
from operators import DecoupledConv2d, OperatorConfig
from operators.functional import SLOW_ON_CPUS

OPERATORS = {
    "linear_cosine": OperatorConfig("linear", "cosine"),
    "tanh_cosine": OperatorConfig("tanh", "cosine"),
    "tanh_cosine, learned radius": OperatorConfig("tanh", "cosine", radius_mode="learned"),
    "tanh_cosine, the authors' radius": OperatorConfig(
        "tanh", "cosine", radius_mode="learned_per_channel", radius_relative=True
    ),
    "linear_square_cosine": OperatorConfig("linear", "square_cosine", eps=1e-6),
    "tanh_linear": OperatorConfig("tanh", "linear"),
}
LITERAL, BCOS = "literal tanh_cosine", "BcosConv2d"
COMPILED = ("tanh_cosine", "tanh_cosine, the authors' radius", "linear_square_cosine")


@dataclasses.dataclass(frozen=True)
class Layer:
    """The shape of a convolution with "same" padding and stride 1, and of its input."""

    in_channels: int
    out_channels: int
    kernel: int
    size: int
    groups: int = 1
    compiled: bool = False
    precision: str = "float32"

    @property
    def name(self) -> str:
        groups = f", {self.groups} groups" if self.groups > 1 else ""
        groups = ", depthwise" if self.groups == self.in_channels else groups
        shape = f"{self.in_channels} to {self.out_channels}{groups}, {self.size}×{self.size}"
        return f"{self.kernel}×{self.kernel}, {shape}{'' if self.precision == 'float32' else ', ' + self.precision}"

    @property
    def is_fast(self) -> bool:
        """Whether this machine has convolutions in this precision; without, torch's take ten times as long."""
        return torch.cuda.is_available() or getattr(torch, self.precision) not in SLOW_ON_CPUS

    @property
    def arguments(self) -> dict[str, Any]:
        return {
            "in_channels": self.in_channels,
            "out_channels": self.out_channels,
            "kernel_size": self.kernel,
            "padding": self.kernel // 2,
            "groups": self.groups,
            "bias": False,
        }

    def flops(self, batch: int, training: bool) -> int:
        """Return the floating-point operations of the plain convolution; a training step makes three of it."""
        products = batch * self.size**2 * self.out_channels * self.in_channels // self.groups * self.kernel**2
        return 2 * products * (3 if training else 1)

    def extra_bytes(self, batch: int, training: bool, item: int) -> int:
        """Return the bytes that a layer scaled by a map moves beside the plain one, if each pass moves them just once.

        Inference reads the input for its norms, and reads and writes the output to scale it (or the input, if that is
        smaller and the kernel 1×1). A training step also reads output and gradient for the gain's gradient, writes
        the scaled gradient, and reads the input to add the norm's share to its gradient, read and written.
        """
        input, output = (batch * self.size**2 * width * item for width in (self.in_channels, self.out_channels))
        scaled = min(input, output) if self.kernel == 1 else output
        return input + 2 * scaled + (3 * scaled + 3 * input if training else 0)


LAYERS = (
    Layer(64, 64, 3, 56, compiled=True),
    Layer(128, 128, 3, 28),
    Layer(256, 256, 3, 14, compiled=True),
    Layer(512, 512, 3, 7),
    Layer(256, 256, 1, 28),
    Layer(64, 256, 1, 56, compiled=True),
    Layer(256, 64, 1, 56, compiled=True),
    Layer(128, 128, 3, 28, groups=32, compiled=True),
    Layer(128, 128, 3, 28, groups=128, compiled=True),
    Layer(144, 144, 3, 56, groups=144),
    *(
        Layer(*shape, groups=groups, precision=precision)
        for precision in ("bfloat16", "float16")
        for shape, groups in (
            ((64, 64, 3, 56), 1),
            ((256, 256, 3, 14), 1),
            ((256, 256, 1, 28), 1),
            ((128, 128, 3, 28), 128),
        )
    ),
)


class LiteralTanhCosine(nn.Conv2d):
    """``tanh ‖x‖ · ⟨w, x⟩ / (‖w‖ ‖x‖)`` written down as it is defined."""

    def forward(self, input: Tensor) -> Tensor:
        ones = torch.ones(self.groups, self.in_channels // self.groups, *self.kernel_size).to(input)
        squares = F.conv2d(input.square(), ones, padding=self.padding, groups=self.groups)
        x_norm = (squares + 1e-4).sqrt()
        h = torch.tanh(x_norm)
        if self.groups > 1:
            x_norm, h = (norm.repeat_interleave(self.out_channels // self.groups, 1) for norm in (x_norm, h))
        w_norm = (self.weight.square().sum((1, 2, 3), keepdim=True) + 1e-4).sqrt()
        return h * (super().forward(input) / (x_norm * w_norm.view(-1, 1, 1)))


def measure_layer(
    layer: Layer, training: bool, batch: int, rounds: int, device: torch.device, compiled: bool
) -> dict[str, Any]:
    """Return the numbers of one layer in inference or in a training step, all competitors eager or all compiled."""
    torch.manual_seed(0)
    autocast = None if layer.precision == "float32" else getattr(torch, layer.precision)
    images = torch.randn(batch, layer.in_channels, layer.size, layer.size, device=device, dtype=autocast)
    images = images.contiguous(memory_format=torch.channels_last).requires_grad_(training)
    networks: dict[str, nn.Module] = {measure.PLAIN: nn.Conv2d(**layer.arguments)}
    for name in COMPILED if compiled else OPERATORS:
        networks[name] = DecoupledConv2d(**layer.arguments, operator=OPERATORS[name])
    if not compiled:
        networks[LITERAL] = LiteralTanhCosine(**layer.arguments)
    if importlib.util.find_spec("bcos"):
        networks[BCOS] = bcos_twin(networks["linear_square_cosine"], layer)
    settings = {"training": training, "compiled": compiled, "rounds": rounds}
    numbers = measure.compete(networks, images, **settings, autocast=autocast)
    return {
        "layer": layer.name,
        "precision": layer.precision,
        "training": training,
        "compiled": compiled,
        "gflop": layer.flops(batch, training) / 1e9,
        "extra_mb": layer.extra_bytes(batch, training, images.element_size()) / 1e6,
        "numbers": numbers,
    }


def bcos_twin(layer: nn.Module, shape: Layer) -> nn.Module:
    """Return the package's layer with the filters of ours, after comparing their answers.

    Raises:
        ValueError: the answers differ by more than 1e-5 of the largest.
    """
    from bcos.modules.bcosconv2d import BcosConv2d

    arguments = {name: value for name, value in shape.arguments.items() if name != "bias"}
    twin = BcosConv2d(**arguments, b=2)
    twin.linear.weight.data.copy_(layer.weight.data)
    images = torch.randn(2, shape.in_channels, shape.size, shape.size)
    with torch.no_grad():
        mine, theirs = layer(images), twin(images)
    if (difference := (mine - theirs).abs().max() / mine.abs().max()) > 1e-5:
        raise ValueError(f"BcosConv2d differs from linear_square_cosine by {difference:.1e}, so it is not compared")
    return twin


def main() -> None:
    parsed = measure.arguments(__doc__, "operators.json", rounds=15, names=[layer.name for layer in LAYERS])
    warnings.filterwarnings("ignore", module="torch")
    device = torch.device(parsed.device)
    batch = 8 if device.type == "cpu" else 64
    bandwidth = measure.bytes_per_second(device)
    rows = []
    for layer in LAYERS:
        if not fnmatch.fnmatch(layer.name, parsed.only) or not layer.is_fast:
            continue
        for compiled in (False, True) if layer.compiled and parsed.compile else (False,):
            for training in (False, True):
                row = measure_layer(layer, training, batch, parsed.rounds, device, compiled)
                plain_seconds = row["numbers"][measure.PLAIN]["ms"] / 1e3
                row["estimate"] = 1 + row["extra_mb"] * 1e6 / bandwidth / plain_seconds
                rows.append(row)
                ratios = {name: f"{number['ratio']:.2f}" for name, number in row["numbers"].items()}
                print(layer.name, "train" if training else "infer", "compiled" if compiled else "eager", ratios)
    record = {
        **measure.describe(parsed.device, parsed.threads),
        "rounds": parsed.rounds,
        "batch": batch,
        "gb_per_second": bandwidth / 1e9,
    }
    measure.write({**record, "rows": rows}, parsed.output)


if __name__ == "__main__":
    main()
