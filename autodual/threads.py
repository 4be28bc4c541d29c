"""Independent parts of one computation, each on a thread of its own.

PyTorch shares out every operator among threads, which pays for large tensors only. Parts that fit a core's cache are walked
faster by a thread each.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from threading import Barrier, Lock, Thread
from typing import TypeVar

import torch
from torch import Tensor

Part = TypeVar("Part")
Result = TypeVar("Result")


def workers(like: Tensor) -> int:
    """Return how many threads may work beside each other on tensors like this one.

    One where derivatives are recorded, for that is switched on by each thread for itself; one for other devices, whose
    operators do not wait for each other anyway.
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

    def alone(part: Part) -> Result:
        with torch.inference_mode(inference), torch.no_grad():
            return work(part)

    if not 1 < threads <= len(parts):
        return [work(part) for part in parts]
    try:
        futures = [_pool(threads).submit(alone, part) for part in parts]
    except RuntimeError:  # at the interpreter's end there are no threads to be had any more
        return [work(part) for part in parts]
    return [future.result() for future in futures]


def _pool(threads: int) -> ThreadPoolExecutor:
    """Return threads that are kept: the first matrix product of a new one takes as long as some chunks do."""
    with _making:
        return _kept(threads)


@cache
def _kept(threads: int) -> ThreadPoolExecutor:
    """Start threads whose operators have one thread each.

    ``torch.set_num_threads`` sets the number for its own thread and, alas, for those that start later, so that has to be put
    back. A thread learns of it when it first asks.
    """
    known, ready = [], Barrier(threads)

    def settle() -> None:
        known.append(torch.get_num_threads())
        ready.wait(timeout=60)
        torch.set_num_threads(1)

    pool = ThreadPoolExecutor(threads, "autodual", settle)
    list(pool.map(lambda _: None, range(threads)))  # a thread for each, since none is idle before all have come
    putting_back = Thread(target=torch.set_num_threads, args=known[:1])
    putting_back.start()
    putting_back.join()
    return pool


_making = Lock()


def _forget_threads() -> None:
    """Start anew in a child process, which has none of its parent's threads."""
    global _making
    _making = Lock()
    _kept.cache_clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_threads)


def evenly(count: int, room: int, threads: int) -> int:
    """Return the size of parts of one size, at most ``room``: as many for every thread, if there is work enough for all."""
    parts = -(-count // max(room, 1))
    if parts >= threads:
        parts = -(-parts // threads) * threads
    return -(-count // max(parts, 1))
