"""What a decoupled convolution costs beside the plain one: ``make bench``.

Each round times the plain and the decoupled networks in turn, so that all meet the same load of the machine; printed
are the plain one's median milliseconds and the median over the rounds of the ratio decoupled / plain.
"""

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import zoo
from operators import DecoupledConv2d
from zoo.cards import markdown_table

OPERATORS = ("linear_cosine", "sphere_cosine", "tanh_cosine", "tanh_linear")
# Name: (in_channels, out_channels, kernel, image size).
LAYERS = {
    "3×3, 64 to 64": (64, 64, 3, 32),
    "3×3, 256 to 256": (256, 256, 3, 8),
    "1×1, 64 to 256": (64, 256, 1, 32),
}
NETWORKS = ("cnn6", "resnet20")
BATCH = 16
HEADER = ("what", "step", "plain, ms", *OPERATORS)


def measure(rounds: int, device: str) -> list[dict[str, Any]]:
    """Return one row for every layer and network, in training and in inference."""
    rows = []
    for training in (True, False):
        for name, (in_channels, out_channels, kernel, size) in LAYERS.items():
            images = torch.rand(BATCH, in_channels, size, size, device=device).requires_grad_(training)
            arguments = (in_channels, out_channels, kernel, 1, kernel // 2)
            layers = {operator: DecoupledConv2d(*arguments, operator=operator) for operator in OPERATORS}
            numbers = compare({"plain": nn.Conv2d(*arguments), **layers}, images, training, rounds)
            rows.append({"what": name, **numbers})
        for name in NETWORKS:
            images = torch.rand(BATCH, 3, 32, 32, device=device)
            networks = {operator: zoo.build(name, operator) for operator in OPERATORS}
            rows.append({"what": name, **compare({"plain": zoo.build(name), **networks}, images, training, rounds)})
    return rows


def compare(networks: dict[str, nn.Module], images: Tensor, training: bool, rounds: int) -> dict[str, Any]:
    """Return the median milliseconds of the network "plain" and the median ratio of each other one to it."""
    images = images.detach().to(memory_format=torch.channels_last).requires_grad_(images.requires_grad)
    steps = {
        name: step(network.to(images.device, memory_format=torch.channels_last), images, training)
        for name, network in networks.items()
    }
    for function in steps.values():
        for _ in range(3):
            function()
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds):
        for name, function in steps.items():
            times[name].append(seconds(function))
    plain = times.pop("plain")
    ratios = {
        name: statistics.median(mine / base for mine, base in zip(own, plain, strict=True))
        for name, own in times.items()
    }
    return {"training": training, "plain_ms": 1e3 * statistics.median(plain), "ratios": ratios}


def step(network: nn.Module, images: Tensor, training: bool) -> Callable[[], None]:
    """Return one training step (forward and backward) or one inference as a function."""

    def train() -> None:
        network.zero_grad(set_to_none=True)
        network(images).square().mean().backward()

    @torch.inference_mode()
    def infer() -> None:
        network(images)

    network.train(training)
    return train if training else infer


def seconds(function: Callable[[], None]) -> float:
    start = time.perf_counter()
    function()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def table_rows(record: dict[str, Any]) -> list[list[str]]:
    """Return the cells below ``HEADER``."""
    return [
        [
            row["what"],
            "train" if row["training"] else "infer",
            f"{row['plain_ms']:.1f}",
            *(f"{row['ratios'][operator]:.2f}" for operator in OPERATORS),
        ]
        for row in record["rows"]
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=11, help="interleaved repeats (default: 11)")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="CPU threads (default: all)")
    parser.add_argument("--output", type=Path, help="write the numbers as JSON, too")
    parser.add_argument("--markdown", type=Path, help="measure nothing, print the table of such a JSON file")
    arguments = parser.parse_args()
    if arguments.markdown:
        print(markdown_table(HEADER, table_rows(json.loads(arguments.markdown.read_text(encoding="utf-8")))))
        return
    torch.set_num_threads(arguments.threads)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    hardware = torch.cuda.get_device_name() if device == "cuda" else f"{arguments.threads} CPU threads"
    rows = measure(arguments.rounds, device)
    record = {
        "hardware": f"{hardware} ({platform.machine()})",
        "torch": str(torch.__version__),
        "rounds": arguments.rounds,
        "rows": rows,
    }
    table = Table(*HEADER, title=f"decoupled / plain, {record['hardware']}")
    table.columns[0].no_wrap = True
    for row in table_rows(record):
        table.add_row(*row)
    Console().print(table)
    if arguments.output:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
