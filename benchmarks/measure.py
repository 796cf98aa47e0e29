"""Timing and memory that the benchmarks share: every ratio comes from one run, with the competitors taking turns."""

import argparse
import fnmatch
import gc
import json
import os
import platform
import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from zoo.files import write_whole

Step = Callable[[], None]
PLAIN = "plain"
# Vectors, and fast half precision.
FLAGS = ("avx2", "avx512f", "avx512_bf16", "avx512_fp16", "amx_bf16", "amx_fp16")
RESULTS = Path(__file__).resolve().parent.parent / "results"


def compare(steps: Mapping[str, Step], rounds: int, warm_up: int = 3) -> dict[str, dict[str, float]]:
    """Time each step once a round, in turn, and return for each one its milliseconds and its ratio to ``"plain"``.

    ``ms`` is the median over the rounds, ``ratio`` the median of the ratios within a round, ``low`` and ``high`` are
    the quartiles of those ratios.
    """
    for step in steps.values():
        for _ in range(warm_up):
            step()
    order = random.Random(0)
    times: dict[str, list[float]] = {name: [] for name in steps}
    gc.collect()
    gc.disable()
    try:
        for _ in range(rounds):
            # In a new order each time, for a step meets the caches and the freed memory that the one before it left.
            for name in order.sample(list(steps), len(steps)):
                times[name].append(_seconds(steps[name]))
    finally:
        gc.enable()
    numbers = {}
    for name, own in times.items():
        ratios = [mine / base for mine, base in zip(own, times[PLAIN], strict=True)]
        low, ratio, high = statistics.quantiles(ratios, n=4)
        numbers[name] = {"ms": 1e3 * statistics.median(own), "ratio": ratio, "low": low, "high": high}
    return numbers


def compete(
    networks: Mapping[str, nn.Module],
    images: Tensor,
    *,
    training: bool,
    compiled: bool,
    rounds: int,
    autocast: torch.dtype | None = None,
) -> dict[str, dict[str, float]]:
    """Return what :func:`compare` says of networks, and their peak memory as a ratio to that of ``"plain"``.

    They are moved to the device of ``images``, and to their dtype unless they run under ``autocast``, with channels
    last, and compiled there.
    """
    torch.compiler.reset()
    make_step = training_step if training else inference_step
    steps, peaks = {}, {}
    for name, network in networks.items():
        dtype = None if autocast else images.dtype
        network.to(images.device, dtype, memory_format=torch.channels_last)
        if compiled:
            network.compile(fullgraph=True, dynamic=False)
        if autocast:
            network = Autocast(network, autocast)
        steps[name] = make_step(network, images)
        peaks[name] = peak_bytes(steps[name], network, images)
    numbers = compare(steps, rounds)
    for name, peak in peaks.items():
        numbers[name]["memory"] = peak / peaks[PLAIN]
    return numbers


class Autocast(nn.Module):
    """A network under autocast to a dtype."""

    def __init__(self, network: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.network, self.dtype = network, dtype

    def forward(self, images: Tensor) -> Tensor:
        with torch.autocast(images.device.type, self.dtype):
            return self.network(images)


def training_step(network: nn.Module, images: Tensor) -> Step:
    """Return one forward and backward pass as a function; the gradient of the answer is the same in every call."""
    network.train()
    with torch.no_grad():
        gradient = torch.randn_like(network(images))

    def step() -> None:
        network.zero_grad(set_to_none=True)
        images.grad = None
        network(images).backward(gradient)

    return step


def inference_step(network: nn.Module, images: Tensor) -> Step:
    """Return one forward pass without gradients as a function."""
    network.eval()
    images = images.detach()

    @torch.inference_mode()
    def step() -> None:
        network(images)

    return step


def peak_bytes(step: Step, network: nn.Module, images: Tensor) -> int:
    """Return the most memory that a step holds at once, the network's and the images' own included."""
    step()
    network.zero_grad(set_to_none=True)
    images.grad = None
    held = images.nbytes + sum(tensor.nbytes for tensor in network.state_dict().values())
    if images.is_cuda:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        return held + torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        step()
    changes = [event for event in record.profiler.kineto_results.events() if event.name() == "[memory]"]
    now = peak = 0
    for event in sorted(changes, key=lambda event: event.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return held + peak


def bytes_per_second(device: torch.device) -> float:
    """Return the rate at which a large tensor is copied, bytes read and bytes written counted."""
    source = torch.ones(1 << 25, device=device)
    target = torch.empty_like(source)
    seconds = sorted(_seconds(lambda: target.copy_(source)) for _ in range(9))[4]
    return 2 * source.nbytes / seconds


def arguments(description: str, output: str, rounds: int, names: Sequence[str]) -> argparse.Namespace:
    """Parse the command line that every benchmark has, and set the number of threads.

    Args:
        output: the file in ``results/`` for the whole of ``names``; a part of them needs another one.
        names: what can be measured.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=rounds, help="interleaved repeats (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="CPU threads (default: %(default)s)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda")
    parser.add_argument("--only", default="*", metavar="GLOB", help="measure only what has such a name; see --list")
    parser.add_argument("--list", action="store_true", help="print the names that --only takes, and measure nothing")
    parser.add_argument("--no-compile", dest="compile", action="store_false", help="leave torch.compile out")
    parser.add_argument(
        "--output", type=Path, default=RESULTS / output, help="the JSON file (default: results/" + output + ")"
    )
    parsed = parser.parse_args()
    if parsed.rounds < 3:
        parser.error(f"--rounds must be at least 3 for a median and quartiles, got {parsed.rounds}")
    if parsed.list:
        parser.exit(message="\n".join(names) + "\n")
    if not fnmatch.filter(names, parsed.only):
        parser.error(f"--only {parsed.only!r} matches nothing of: {'; '.join(names)}")
    if parsed.only != "*" and parsed.output == RESULTS / output:
        parser.error(f"--only measures a part of what results/{output} holds; name another file (--output)")
    torch.set_num_threads(parsed.threads)
    return parsed


def describe(device: str, threads: int) -> dict[str, Any]:
    """Return what the numbers depend on beside the code."""
    name = torch.cuda.get_device_name() if device != "cpu" else f"{threads} threads of {processor()}"
    return {"hardware": name, "torch": str(torch.__version__)}


def processor() -> str:
    """Return what this machine's processor is called, with those of its instructions on which times depend most."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    facts = {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    flags = [flag for flag in FLAGS if flag in facts.get("flags", "").split()]
    return f"{facts.get('model name', platform.machine())} ({', '.join(flags) or platform.machine()})"


def earlier(output: Path, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a file of results has, if it was measured with these settings; else nothing."""
    record = json.loads(output.read_text(encoding="utf-8")) if output.is_file() else {}
    return record if record.items() >= settings.items() else {}


def write(record: Mapping[str, Any], path: Path) -> None:
    """Write the numbers as JSON, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, json.dumps(record, indent=1, ensure_ascii=False) + "\n")
    print(f"written: {path}")


def _seconds(step: Step) -> float:
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.synchronize()
    start = time.perf_counter()
    step()
    if cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - start
