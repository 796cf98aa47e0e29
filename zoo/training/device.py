"""Where and how to train."""

import dataclasses
import statistics
import time

import torch

from operators.functional import SLOW_ON_CPUS
from zoo.architectures.resnet import CIFARResNet

# Of the time of a step in float32: a saving that no noise makes up.
WORTH_BFLOAT16 = 0.8


@dataclasses.dataclass(frozen=True)
class Device:
    """Where and how to train, as options of ``train.py``.

    Args:
        name: "cuda" or "cpu".
        compile: whether networks are compiled.
        precision: what Lightning calls it.
        why: in words, why that precision.
    """

    name: str
    compile: bool
    precision: str = "32-true"
    why: str = ""

    @classmethod
    def choose(cls, name: str, compile: bool | None = None) -> "Device":
        """Return the device called "cpu" or "cuda", or for "auto" the GPU if there is one, and what is faster there.

        Args:
            compile: by default, networks are compiled on GPUs only.

        Raises:
            ValueError: another name, or "cuda" where there is none.
        """
        available = torch.cuda.is_available()
        if name not in ("auto", "cpu", "cuda") or (name == "cuda" and not available):
            raise ValueError(f"device is auto, cpu, or cuda where torch finds a GPU; got {name!r}")
        name = "cuda" if available and name != "cpu" else "cpu"
        if name == "cuda":
            fast = torch.cuda.is_bf16_supported(including_emulation=False)
            why = f"the GPU has {'' if fast else 'no '}bfloat16"
        elif torch.bfloat16 not in SLOW_ON_CPUS:
            share = bfloat16_share()
            fast, why = share < WORTH_BFLOAT16, f"a step in bfloat16 takes {share:.0%} of the time in float32 here"
        else:
            fast, why = False, "this processor has no bfloat16"
        return cls(name, name == "cuda" if compile is None else compile, "bf16-mixed" if fast else "32-true", why)

    @property
    def accelerator(self) -> str:
        """What Lightning calls it."""
        return "gpu" if self.name == "cuda" else "cpu"

    def __str__(self) -> str:
        how = "compiled" if self.compile else "eager"
        return f"on {'the GPU' if self.name == 'cuda' else 'the CPU'}, {self.precision} ({self.why}), {how}"

    def options(self) -> list[str]:
        settings = {"trainer.accelerator": self.accelerator, "trainer.precision": self.precision}
        settings["model.compile"] = str(self.compile).lower()
        return [word for name, value in settings.items() for word in (f"--{name}", value)]


def bfloat16_share(rounds: int = 5) -> float:
    """Return the time of a training step in bfloat16 as a share of that in float32: a narrow ResNet, on this CPU."""
    with torch.random.fork_rng(devices=[]):
        network, images = CIFARResNet(3, (16, 32, 64)), torch.rand(64, 3, 32, 32)
    network.to(memory_format=torch.channels_last)
    images = images.to(memory_format=torch.channels_last)
    shares = []
    # The first round finds out how to compute what.
    for _ in range(rounds + 1):
        times = []
        for bfloat16 in (False, True):
            start = time.perf_counter()
            with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
                network(images).sum().backward()
            times.append(time.perf_counter() - start)
        shares.append(times[1] / times[0])
    return statistics.median(shares[1:])
