"""Dividing a network among processes (FSDP2: Zhao et al., PyTorch FSDP, 2023)."""

from collections.abc import Mapping
from typing import Any

import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard

from zoo.resuming.lightning_internals import saves_in_parts


def check_sharding(strategy: ModelParallelStrategy, processes: int, settings: Mapping[str, Any]) -> None:
    """Refuse settings of the strategy with which a network is not divided among all, or not saved as a whole.

    Raises:
        ValueError: tensor parallelism, checkpoints of several files, or settings of ``Classifier`` that cannot be had
            with sharded weights.
    """
    if refused := [name for name in ("compile", "ema", "orthogonality") if settings[name]]:
        raise ValueError(f"a network whose weights are sharded can have no {' and no '.join(refused)}; leave it out")
    if strategy.device_mesh["data_parallel"].size() != processes:
        raise ValueError(
            "the network is not divided among tensor-parallel processes: set --trainer.strategy.data_parallel_size "
            f"to the number of all processes, {processes}, and tensor_parallel_size to 1"
        )
    if saves_in_parts(strategy):
        raise ValueError(
            "a checkpoint is one file with the whole network: --trainer.strategy.save_distributed_checkpoint false"
        )


def shard(model: nn.Module, mesh: DeviceMesh) -> list[nn.Parameter]:
    """Divide a network in place: its blocks, and what is left of it, are gathered when they are needed.

    Returns:
        The parameters that stay whole, whose gradients have yet to be averaged over the processes.
    """
    # It takes no filters with the channels last, and no single numbers, such as a learned radius.
    model.to(memory_format=torch.contiguous_format)
    whole = [parameter for parameter in model.parameters() if not parameter.dim()]
    settings = {"mesh": mesh, "ignored_params": set(whole)}
    for block in blocks(model):
        fully_shard(block, **settings)
    fully_shard(model, **settings)
    return whole


def blocks(model: nn.Module) -> list[nn.Module]:
    """Return the parts of a network's sequences that have weights: the units in which they are sharded."""
    sequences = [module for module in model.modules() if isinstance(module, nn.Sequential | nn.ModuleList)]
    parts = [part for sequence in sequences for part in sequence if any(True for _ in part.parameters())]
    parts = [part for part in dict.fromkeys(parts) if not isinstance(part, nn.Sequential | nn.ModuleList)]
    inner = {module for part in parts for module in part.modules() if module is not part}
    return [part for part in parts if part not in inner]
