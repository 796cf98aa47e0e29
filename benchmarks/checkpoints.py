"""How fast the embedded checkpoints are beside their plain twins: python -m benchmarks.checkpoints

Inference, eager and compiled, all networks of a family taking turns in one run; the numbers go into each checkpoint's
config.json and card. python -m zoo reports writes them into the README.
"""

import argparse
import os
import warnings
from collections.abc import Mapping, Sequence

import torch
from torch import nn

import zoo
from benchmarks import measure
from zoo.checkpoints.catalogue import PRETRAINED
from zoo.checkpoints.config import read_config
from zoo.models.spec import PLAIN, ModelSpec


def families() -> dict[str, list[str]]:
    """Return the names of the checkpoints by that of their twin, which comes first."""
    found: dict[str, list[str]] = {}
    for name in zoo.list_checkpoints():
        spec = ModelSpec.from_dict(read_config(PRETRAINED / name))
        found.setdefault(name.removesuffix(spec.operator_name) + PLAIN, []).append(name)
    return {twin: sorted(names, key=lambda name: name != twin) for twin, names in found.items() if twin in names}


def speeds(names: Sequence[str], batch: int, rounds: int, device: str) -> dict[str, dict[str, float]]:
    """Return images a second and their ratio to the first network's, eager and compiled, of each network."""
    numbers: dict[str, dict[str, float]] = {name: {} for name in names}
    for mode in ("eager", "compiled"):
        networks: Mapping[str, nn.Module] = {
            measure.PLAIN if name == names[0] else name: zoo.load(name).network for name in names
        }
        spec = zoo.load(names[0]).spec
        images = torch.rand(batch, spec.in_chans, spec.input_size, spec.input_size, device=device)
        images = images.to(memory_format=torch.channels_last)
        times = measure.compete(networks, images, training=False, compiled=mode == "compiled", rounds=rounds)
        for name in names:
            time = times[measure.PLAIN if name == names[0] else name]
            numbers[name][f"{mode}_images_per_second"] = round(1e3 * batch / time["ms"], 1)
            numbers[name][f"{mode}_ratio"] = round(1 / time["ratio"], 3)
            print(f"{name}, {mode}: {1e3 * batch / time['ms']:,.0f} images/s, {1 / time['ratio']:.2f} of the twin's")
    return numbers


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=128, help="images a batch (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=15, help="interleaved repeats (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="CPU threads (default: %(default)s)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda")
    parsed = parser.parse_args()
    if parsed.rounds < 3:
        parser.error(f"--rounds must be at least 3 for a median and quartiles, got {parsed.rounds}")
    torch.set_num_threads(parsed.threads)
    warnings.filterwarnings("ignore", module="torch")
    for names in families().values():
        for name, numbers in speeds(names, parsed.batch, parsed.rounds, parsed.device).items():
            machine = measure.describe(parsed.device, parsed.threads)
            zoo.record(name, speed={**numbers, "batch": parsed.batch, "rounds": parsed.rounds, **machine})


if __name__ == "__main__":
    main()
