"""Which examples a step sees: a function of seed, step and process alone, so that a position restores everything.

Each epoch has its own permutation. A step takes the next ``batch`` examples of it; what is left at the end of an epoch and
fills no batch is left out of that epoch. Several processes take consecutive parts of each step's examples, whose sizes differ
by at most one.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset, TensorDataset, default_collate

from autodual.errors import SpecificationError
from autodual.training import processes
from autodual.training.config import Data

SPLIT, ORDER, VARIATION, STEP = range(4)
"""What random numbers are for; each use has its own."""


def key(*numbers: int) -> int:
    """Mix numbers into a seed."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> np.uint64(1))


def split(examples: int, held_out: int, seed: int) -> tuple[Tensor, Tensor]:
    """Return the indices to train on and those held out, drawn by the seed.

    Raises:
        SpecificationError: nothing is left to train on.
    """
    if not held_out < examples:
        raise SpecificationError(f"data.held_out is {held_out}, but there are only {examples} training examples")
    order = torch.randperm(examples, generator=torch.Generator().manual_seed(key(seed, SPLIT)))
    return order[held_out:].sort().values, order[:held_out].sort().values


@dataclass(frozen=True)
class Batches:
    """The examples of every step.

    Attributes:
        dataset: the examples, ``(x, y)`` by index.
        index: those to train on.
        batch: examples for each step, all processes together.
        seed: of the order and of the variations.
        data: how examples are varied.
        device: where they are needed.
    """

    dataset: Dataset
    index: Tensor
    batch: int
    seed: int
    data: Data
    device: torch.device

    def __post_init__(self) -> None:
        """Check that there is a batch, and an example for each process."""
        if self.batch > len(self.index):
            raise SpecificationError(f"batch is {self.batch}, but there are only {len(self.index)} examples to train on")
        if self.batch < processes.size():
            raise SpecificationError(f"batch is {self.batch}: too few for {processes.size()} processes, each needs an example")

    @property
    def per_epoch(self) -> int:
        """Steps of an epoch."""
        return len(self.index) // self.batch

    def at(self, step: int) -> tuple[Tensor, Tensor, float]:
        """Return this process' inputs and labels of a step, varied, and the weight of their mean.

        Gradients are averaged over processes, whose parts may differ by one example. With a mean weighted by
        its part's size over the average size, that average is the gradient of the whole batch's mean.
        """
        epoch, place = divmod(step, self.per_epoch)
        part = processes.share(self.batch)
        chosen = self.index[_order(len(self.index), self.seed, epoch)[place * self.batch :][: self.batch][part]]
        x, y = fetch(self.dataset, chosen, self.device)
        weight = (part.stop - part.start) * processes.size() / self.batch
        return self._varied(x, step, part), y, weight

    def _varied(self, x: Tensor, step: int, part: slice) -> Tensor:
        """Shift and mirror images; numbers are drawn for the whole batch, so that any number of processes sees the same."""
        if not self.data.shift and not self.data.flip:
            return x
        if x.dim() != 4:
            raise SpecificationError(
                f"data.shift and data.flip are for images (batch, channels, height, width), got {tuple(x.shape)}"
            )
        generator = torch.Generator().manual_seed(key(self.seed, VARIATION, step))
        places = torch.randint(2 * self.data.shift + 1, (self.batch, 2), generator=generator)[part].to(x.device)
        mirrored = torch.rand(self.batch, generator=generator)[part].to(x.device) < 0.5
        if self.data.flip:
            x = torch.where(mirrored[:, None, None, None], x.flip(3), x)
        return cropped(F.pad(x, [self.data.shift] * 4), places, x.shape[2:])


def cropped(x: Tensor, places: Tensor, shape: torch.Size) -> Tensor:
    """Cut a window of the given height and width out of every image, its upper left corner at ``places`` ``(batch, 2)``."""
    rows, columns = (places[:, axis, None] + torch.arange(shape[axis], device=x.device) for axis in (0, 1))
    examples = torch.arange(len(x), device=x.device)[:, None, None]
    return x[examples, :, rows[:, :, None], columns[:, None, :]].movedim(3, 1).contiguous()


def fetch(dataset: Dataset, index: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return inputs and labels of some examples.

    Raises:
        SpecificationError: an example is not a pair of an input tensor and a label.
    """
    found = dataset[index] if isinstance(dataset, TensorDataset) else default_collate([dataset[i] for i in index.tolist()])
    if not isinstance(found, (tuple, list)) or len(found) != 2 or not all(isinstance(part, Tensor) for part in found):
        raise SpecificationError("every example of the data set must be a pair (x, y) of an input tensor and its label")
    return found[0].to(device), found[1].to(device).long()


@lru_cache(maxsize=2)
def _order(examples: int, seed: int, epoch: int) -> Tensor:
    return torch.randperm(examples, generator=torch.Generator().manual_seed(key(seed, ORDER, epoch)))


def seed_step(seed: int, step: int) -> None:
    """Seed every global generator for one step of this process: what losses and data sets draw depends on nothing else."""
    number = key(seed, STEP, step, processes.rank())
    torch.manual_seed(number)
    random.seed(number)
    np.random.seed(number % 2**32)  # noqa: NPY002 - data sets of the user's may still use it


@contextmanager
def generators_kept() -> Iterator[None]:
    """Put the states of the global generators back afterwards."""
    python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002
    devices: list[Any] = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices=devices):
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)  # noqa: NPY002
