"""What a training run needs of ``torch.distributed``; alone, one process is a group of one."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel


def rank() -> int:
    """Return this process' number; number 0 writes the files."""
    return dist.get_rank() if _together() else 0


def size() -> int:
    """Return the number of processes."""
    return dist.get_world_size() if _together() else 1


def share(length: int) -> slice:
    """Return this process' part of ``length`` consecutive items; parts differ by at most one."""
    return slice(rank() * length // size(), (rank() + 1) * length // size())


def total(values: Tensor) -> list[float]:
    """Add a vector up over all processes."""
    if _together():
        dist.all_reduce(values)
    return values.tolist()


def gathered(value: Any) -> list[Any]:
    """Return every process' value, in every process."""
    if not _together():
        return [value]
    values = [None] * size()
    dist.all_gather_object(values, value)
    return values


def from_first(value: Any) -> Any:
    """Return the first process' value, in every process."""
    if not _together():
        return value
    values = [value]
    dist.broadcast_object_list(values, src=0)
    return values[0]


def wrapped(module: nn.Module) -> nn.Module:
    """Return a module whose backward pass averages gradients over all processes."""
    if not _together():
        return module
    devices = {parameter.device for parameter in module.parameters()}
    device = devices.pop() if len(devices) == 1 else torch.device("cpu")
    return DistributedDataParallel(module, device_ids=[device] if device.type == "cuda" else None)


def _together() -> bool:
    return dist.is_available() and dist.is_initialized()
