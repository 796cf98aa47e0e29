"""What decoupled networks cost beside their plain twins: python -m benchmarks.models

Times and peak memory of inference and of a training step, eager and compiled, and of the folded network; then how the
cost of tanh_cosine grows with batch, resolution, width and depth beside that of its twin.
"""

import copy
import fnmatch
import warnings
from collections.abc import Mapping
from typing import Any

import timm
import torch
from torch import nn

from benchmarks import measure
from operators import OperatorConfig, convert_decoupled, fold
from zoo.architectures.resnet import CIFARResNet

OPERATORS = {
    "tanh_cosine": OperatorConfig("tanh", "cosine"),
    "tanh_cosine, radius by channel": OperatorConfig("tanh", "cosine", radius_mode="learned_per_channel"),
    "tanh_square_cosine": OperatorConfig("tanh", "square_cosine"),
}
FOLDED = "tanh_cosine, folded"
# Architecture: (image size, batch on a CPU, batch on a GPU, whether it is compiled).
NETWORKS = {"resnet18": (224, 8, 256, True), "resnet50": (224, 8, 256, False), "cnn6": (32, 64, 1024, False)}

# What grows, and through which values; the rest stays at the middle one.
BATCH, SIZE, WIDTH, UNITS = 8, 64, 32, 3
SERIES: dict[str, tuple[int, ...]] = {
    "batch": (1, 2, 4, 8, 16, 32),
    "resolution": (32, 48, 64, 96, 128),
    "width": (16, 32, 64, 128),
    "depth": (8, 14, 20, 32, 44),
}


def measure_network(
    networks: Mapping[str, nn.Module],
    shape: tuple[int, ...],
    *,
    training: bool,
    compiled: bool,
    rounds: int,
    device: torch.device,
) -> dict[str, dict[str, float]]:
    """Return the numbers of networks for images of this shape: times, ratios to ``"plain"``, peak memory as a ratio."""
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    images = torch.rand(shape, device=device, dtype=dtype).to(memory_format=torch.channels_last)
    copies = {name: copy.deepcopy(network) for name, network in networks.items()}
    numbers = measure.compete(copies, images, training=training, compiled=compiled, rounds=rounds)
    for number in numbers.values():
        number["images_per_second"] = 1e3 * shape[0] / number["ms"]
    return numbers


def twins(plain: nn.Module, operators: Mapping[str, OperatorConfig]) -> dict[str, nn.Module]:
    """Return a network and its copies with each operator."""
    converted = {name: convert_decoupled(copy.deepcopy(plain), operator)[0] for name, operator in operators.items()}
    return {measure.PLAIN: plain, **converted}


def measure_networks(only: str, compile: bool, rounds: int, device: torch.device) -> list[dict[str, Any]]:
    """Return a row for each network, in inference and training, eager and compiled."""
    rows = []
    for architecture, (size, cpu_batch, gpu_batch, compiled_too) in NETWORKS.items():
        if not fnmatch.fnmatch(architecture, only):
            continue
        shape = (cpu_batch if device.type == "cpu" else gpu_batch, 3, size, size)
        networks = twins(timm.create_model(architecture), OPERATORS)
        for compiled in (False, True) if compile and (compiled_too or device.type != "cpu") else (False,):
            for training in (False, True):
                candidates = networks if training else {**networks, FOLDED: fold(networks["tanh_cosine"])[0]}
                settings = {"training": training, "compiled": compiled}
                numbers = measure_network(candidates, shape, **settings, rounds=rounds, device=device)
                rows.append({"network": architecture, "batch": shape[0], "size": size, **settings, "numbers": numbers})
                print(architecture, "train" if training else "infer", "compiled" if compiled else "eager")
                for name, number in numbers.items():
                    print(f"  {name}: {number['ms']:.1f} ms, {number['ratio']:.2f}, memory {number['memory']:.2f}")
    return rows


def measure_growth(only: str, rounds: int, device: torch.device) -> list[dict[str, Any]]:
    """Return a row for each value of each series: a training step of tanh_cosine and of its plain twin."""
    rows = []
    for series, values in SERIES.items():
        if not fnmatch.fnmatch(series, only):
            continue
        for value in values:
            units = (value - 2) // 6 if series == "depth" else UNITS
            width = value if series == "width" else WIDTH
            size = value if series == "resolution" else SIZE
            batch = value if series == "batch" else BATCH
            network = CIFARResNet(units, (width, 2 * width, 4 * width))
            numbers = measure_network(
                twins(network, {"tanh_cosine": OPERATORS["tanh_cosine"]}),
                (batch, 3, size, size),
                training=True,
                compiled=False,
                rounds=rounds,
                device=device,
            )
            rows.append({"series": series, "value": value, "numbers": numbers})
            print(series, value, f"{numbers['tanh_cosine']['ratio']:.2f}")
    return rows


def main() -> None:
    parsed = measure.arguments(__doc__, "models.json", rounds=9, names=[*NETWORKS, *SERIES])
    warnings.filterwarnings("ignore", module="torch")
    device = torch.device(parsed.device)
    torch.manual_seed(0)
    rows = measure_networks(parsed.only, parsed.compile, parsed.rounds, device)
    growth = measure_growth(parsed.only, parsed.rounds, device)
    dtype = "float32" if device.type == "cpu" else "bfloat16"
    measure.write(
        {
            **measure.describe(parsed.device, parsed.threads),
            "rounds": parsed.rounds,
            "dtype": dtype,
            "rows": rows,
            "growth": growth,
        },
        parsed.output,
    )


if __name__ == "__main__":
    main()
