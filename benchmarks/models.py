"""What decoupled networks cost beside their plain twins: python -m benchmarks.models

Times and peak memory of inference and of a training step, eager and compiled, of the folded network and of that whose
depthwise convolutions stay plain; then how the cost of tanh_cosine grows with batch, resolution, width and depth beside
that of its twin, and what calibrate takes.
"""

import copy
import dataclasses
import fnmatch
import itertools
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import timm
import torch
from torch import nn

from benchmarks import measure
from operators import OperatorConfig, calibrate, convert_decoupled, fold
from operators.functional import SLOW_ON_CPUS
from operators.selection import is_depthwise
from zoo.architectures.resnet import CIFARResNet

OPERATORS = {
    "tanh_cosine": OperatorConfig("tanh", "cosine"),
    "tanh_cosine, radius by channel": OperatorConfig("tanh", "cosine", radius_mode="learned_per_channel"),
    "tanh_square_cosine": OperatorConfig("tanh", "square_cosine"),
}
FOLDED, PARTIAL = "tanh_cosine, folded", "tanh_cosine, depthwise plain"


@dataclasses.dataclass(frozen=True)
class Network:
    """What is built, and how it is measured; it is compiled on GPUs in any case.

    Args:
        batches: on a CPU and on a GPU.
        compiled: the steps that are compiled on a CPU, too: "infer", "train".
    """

    build: Callable[[], nn.Module]
    size: int
    batches: tuple[int, int]
    compiled: tuple[str, ...] = ()
    precision: str = "float32"


def of_timm(name: str, *compiled: str) -> Network:
    """Return one of timm's networks on images of 224×224."""
    return Network(lambda: timm.create_model(name), 224, (8, 256), compiled)


# Those of one kind of convolution, those with depthwise and grouped ones, and one in half precision.
DENSE, SPARSE, WIDE = (
    ("resnet18", "resnet50", "cnn6"),
    (
        "tf_efficientnet_lite0",
        "mobilenetv2_100",
        "mobilenetv3_small_100",
        "convnext_atto",
        "resnext50_32x4d",
    ),
    "resnet20, 64-128-256 filters, bfloat16",
)
NETWORKS = {
    "resnet18": of_timm("resnet18", "infer", "train"),
    "resnet50": of_timm("resnet50"),
    "cnn6": Network(lambda: timm.create_model("cnn6"), 32, (64, 1024)),
    **{name: of_timm(name, *(["infer"] if name == "mobilenetv2_100" else [])) for name in SPARSE},
    WIDE: Network(lambda: CIFARResNet(3, (64, 128, 256)), 32, (64, 1024), precision="bfloat16"),
}
CALIBRATED, CALIBRATION_IMAGES = "tf_efficientnet_lite0", 100

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
    precision: str = "float32",
) -> dict[str, dict[str, float]]:
    """Return the numbers of networks for images of this shape: times, ratios to ``"plain"``, peak memory as a ratio."""
    autocast = None if precision == "float32" else getattr(torch, precision)
    images = torch.rand(shape, device=device).to(memory_format=torch.channels_last)
    copies = {name: copy.deepcopy(network) for name, network in networks.items()}
    settings = {"training": training, "compiled": compiled, "rounds": rounds, "autocast": autocast}
    numbers = measure.compete(copies, images, **settings)
    for number in numbers.values():
        number["images_per_second"] = 1e3 * shape[0] / number["ms"]
    return numbers


def twins(plain: nn.Module, operators: Mapping[str, OperatorConfig]) -> dict[str, nn.Module]:
    """Return a network and its copies with each operator in all convolutions."""
    converted = {
        name: convert_decoupled(copy.deepcopy(plain), operator, depthwise=True)[0]
        for name, operator in operators.items()
    }
    return {measure.PLAIN: plain, **converted}


def competitors(name: str) -> dict[str, nn.Module]:
    """Return a network, its decoupled copies, and one whose depthwise convolutions stay plain if it has such."""
    plain = NETWORKS[name].build()
    networks = twins(plain, OPERATORS)
    if any(map(is_depthwise, plain.modules())):
        networks[PARTIAL] = convert_decoupled(copy.deepcopy(plain), OPERATORS["tanh_cosine"])[0]
    return networks


def measure_networks(only: str, compile: bool, rounds: int, device: torch.device) -> list[dict[str, Any]]:
    """Return a row for each network, in inference and training, eager and compiled."""
    rows = []
    for name, network in NETWORKS.items():
        gpu = device.type != "cpu"
        if not fnmatch.fnmatch(name, only) or (not gpu and getattr(torch, network.precision) in SLOW_ON_CPUS):
            continue
        shape = (network.batches[gpu], 3, network.size, network.size)
        networks = competitors(name)
        for compiled, training in itertools.product((False, True), (False, True)):
            if compiled and not (compile and (gpu or ("train" if training else "infer") in network.compiled)):
                continue
            candidates = networks if training else {**networks, FOLDED: fold(networks["tanh_cosine"])[0]}
            settings = {"training": training, "compiled": compiled, "precision": network.precision}
            numbers = measure_network(candidates, shape, **settings, rounds=rounds, device=device)
            rows.append({"network": name, "batch": shape[0], "size": network.size, **settings, "numbers": numbers})
            print(name, "train" if training else "infer", "compiled" if compiled else "eager")
            for competitor, number in numbers.items():
                print(f"  {competitor}: {number['ms']:.1f} ms, {number['ratio']:.2f}, memory {number['memory']:.2f}")
    return rows


def measure_calibration(rounds: int, device: torch.device) -> dict[str, Any]:
    """Return what ``calibrate`` takes, in passes of the plain network over the same images, all at once."""
    plain = NETWORKS[CALIBRATED].build().to(device, memory_format=torch.channels_last).eval()
    size = NETWORKS[CALIBRATED].size
    images = torch.randn(CALIBRATION_IMAGES, 3, size, size, device=device).to(memory_format=torch.channels_last)

    def calibrate_copy() -> None:
        calibrate(convert_decoupled(copy.deepcopy(plain), "tanh_cosine")[0], [images], progress=False)

    steps = {measure.PLAIN: measure.inference_step(plain, images), "calibrate": calibrate_copy}
    numbers = measure.compare(steps, rounds, warm_up=1)["calibrate"]
    print(f"calibrate {CALIBRATED}: {numbers['ms'] / 1e3:.1f} s, {numbers['ratio']:.1f} passes")
    return {"network": CALIBRATED, "images": CALIBRATION_IMAGES, "size": size, **numbers}


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
    parsed = measure.arguments(__doc__, "models.json", rounds=9, names=[*NETWORKS, *SERIES, "calibrate"])
    warnings.filterwarnings("ignore", module="torch")
    device = torch.device(parsed.device)
    torch.manual_seed(0)
    rows = measure_networks(parsed.only, parsed.compile, parsed.rounds, device)
    growth = measure_growth(parsed.only, parsed.rounds, device)
    calibration = measure_calibration(3, device) if fnmatch.fnmatch("calibrate", parsed.only) else None
    measure.write(
        {
            **measure.describe(parsed.device, parsed.threads),
            "rounds": parsed.rounds,
            "rows": rows,
            "growth": growth,
            "calibration": calibration,
        },
        parsed.output,
    )


if __name__ == "__main__":
    main()
