"""Where and how to train."""

import dataclasses

import torch


@dataclasses.dataclass(frozen=True)
class Device:
    """Where and how to train, as options of ``train.py``.

    Args:
        name: "cuda" or "cpu".
        compile: whether networks are compiled.
    """

    name: str
    compile: bool

    @classmethod
    def choose(cls, name: str, compile: bool | None = None) -> "Device":
        """Return the device called "cpu" or "cuda", or for "auto" the GPU if there is one.

        Args:
            compile: by default, networks are compiled on GPUs only.

        Raises:
            ValueError: another name, or "cuda" where there is none.
        """
        available = torch.cuda.is_available()
        if name not in ("auto", "cpu", "cuda") or (name == "cuda" and not available):
            raise ValueError(f"device is auto, cpu, or cuda where torch finds a GPU; got {name!r}")
        name = "cuda" if available and name != "cpu" else "cpu"
        return cls(name, name == "cuda" if compile is None else compile)

    @property
    def accelerator(self) -> str:
        """What Lightning calls it."""
        return "gpu" if self.name == "cuda" else "cpu"

    @property
    def precision(self) -> str:
        """bfloat16 where it is faster: on GPUs that have it, and on CPUs that have it for compiled networks."""
        if self.name == "cuda":
            fast = torch.cuda.is_bf16_supported(including_emulation=False)
        else:
            fast = self.compile and (torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
        return "bf16-mixed" if fast else "32-true"

    def options(self) -> list[str]:
        settings = {"trainer.accelerator": self.accelerator, "trainer.precision": self.precision}
        settings["model.compile"] = str(self.compile).lower()
        return [word for name, value in settings.items() for word in (f"--{name}", value)]
