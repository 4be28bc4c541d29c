"""Run a subcommand in several processes: ``torchrun --nproc-per-node 4 -m autodual train ...``."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist

from autodual.cli.common import CommandError


@contextmanager
def group(device: str) -> Iterator[bool]:
    """Join the other processes that torchrun started, if it did.

    Args:
        device: where to compute; with ``cuda`` each process of a machine takes another one.

    Yields:
        Whether this process is the one that prints.

    Raises:
        CommandError: there are fewer devices than processes.
    """
    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ or dist.is_initialized():
        yield not dist.is_initialized() or dist.get_rank() == 0
        return
    local = int(os.environ.get("LOCAL_RANK", 0))
    if device.startswith("cuda"):
        if local >= torch.cuda.device_count():
            raise CommandError(f"torchrun started process {local} on a machine with {torch.cuda.device_count()} CUDA devices")
        torch.cuda.set_device(local)
    dist.init_process_group("nccl" if device.startswith("cuda") else "gloo")
    try:
        yield dist.get_rank() == 0
    finally:
        dist.destroy_process_group()
