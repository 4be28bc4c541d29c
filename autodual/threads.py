"""Independent parts of one computation, each on a thread of its own.

PyTorch shares out every operator among threads, which pays for large tensors only. Parts that fit a core's cache are walked
faster by a thread each.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import TypeVar

import torch
from torch import Tensor

Part = TypeVar("Part")
Result = TypeVar("Result")


def workers(like: Tensor) -> int:
    """Return how many threads may work beside each other on tensors like this one.

    Operators of other devices do not wait for each other anyway, and what autograd records belongs to one thread.
    """
    return 1 if torch.is_grad_enabled() or like.device.type != "cpu" else torch.get_num_threads()


def in_threads(work: Callable[[Part], Result], parts: Iterable[Part], like: Tensor) -> list[Result]:
    """Do some work on every part, on as many threads as PyTorch may use, and return the results in order.

    Args:
        work: without side effects that parts could notice of each other.
        parts: at best several for each thread, and of one size.
        like: a tensor of the device in question.
    """
    parts, threads, inference = list(parts), workers(like), torch.is_inference_mode_enabled()
    if threads == 1 or len(parts) < threads:
        return [work(part) for part in parts]

    def alone(part: Part) -> Result:
        with torch.inference_mode(inference), torch.no_grad():
            return work(part)

    torch.set_num_threads(1)
    try:
        return list(_pool(threads).map(alone, parts))
    finally:
        torch.set_num_threads(threads)


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    """Return threads that are kept: the first matrix product of a new one takes as long as some chunks do."""
    return ThreadPoolExecutor(threads, "autodual", torch.set_num_threads, (1,))


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_pool.cache_clear)  # a child process has none of its parent's threads


def evenly(count: int, room: int, threads: int) -> int:
    """Return the size of parts of one size, at most ``room``: as many for every thread, if there is work enough for all."""
    parts = -(-count // max(room, 1))
    if parts >= threads:
        parts = -(-parts // threads) * threads
    return -(-count // max(parts, 1))
