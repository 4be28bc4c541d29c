"""Certify and attack a whole data set in batches; what ``certify`` and ``demo`` print comes from here."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

import autodual
from autodual.attacks import pgd
from autodual.estimators import Sampling
from autodual.methods import Method

Step = Callable[[int], None]


@dataclass(frozen=True)
class Certification:
    """What one method proved about a data set; every tensor is per example, on the CPU.

    Attributes:
        certified: the predicted class is right and provably the same in the whole region.
        predicted: the class predicted at the centre.
        margin: lower bound of the smallest margin over the region.
        guarantee: how far the margins can be trusted.
        milliseconds: wall time per example.
        sampling: the random numbers behind the margins, if there are any.
    """

    certified: Tensor
    predicted: Tensor
    margin: Tensor
    guarantee: str
    milliseconds: float
    sampling: Sampling | None = None


def certify(
    net: autodual.BoundModule,
    x: Tensor,
    y: Tensor,
    *,
    region: autodual.Region,
    method: str | Method,
    batch: int,
    step: Step | None = None,
) -> Certification:
    """Certify every example.

    Args:
        net: the compiled model.
        x: inputs.
        y: labels.
        region: the set around each input, the same for all.
        method: name or options of the bound.
        batch: examples at a time.
        step: told the number of finished examples after each batch.
    """
    certified, predicted, margins, guarantee, sampling = [], [], [], "REAL", None
    start = time.perf_counter()
    for inputs, labels in zip(x.split(batch), y.split(batch), strict=True):
        with torch.no_grad():
            report = net.verify(inputs, labels, region, method=method)
        others = report.margins.scatter(1, labels[:, None], torch.inf)
        certified.append(report.certified.cpu())
        predicted.append(report.predicted.cpu())
        margins.append(others.amin(1).cpu())
        guarantee, sampling = str(report.guarantee), report.sampling
        if step is not None:
            step(len(inputs))
    elapsed = time.perf_counter() - start
    milliseconds = 1000 * elapsed / max(len(x), 1)
    return Certification(torch.cat(certified), torch.cat(predicted), torch.cat(margins), guarantee, milliseconds, sampling)


def survives(
    net: autodual.BoundModule,
    x: Tensor,
    y: Tensor,
    *,
    region: autodual.Region,
    steps: int,
    batch: int,
    step: Step | None = None,
) -> Tensor:
    """Attack every example with projected gradient descent; tell which keep their label at the worst point found.

    Args:
        net: the compiled model.
        x: inputs.
        y: labels.
        region: the set around each input, the same for all.
        steps: gradient steps per restart.
        batch: examples at a time.
        step: told the number of finished examples after each batch.
    """
    kept, generator = [], torch.Generator(device=x.device).manual_seed(0)
    for inputs, labels in zip(x.split(batch), y.split(batch), strict=True):
        worst = pgd(net, inputs, labels, region, steps=steps, restarts=2, generator=generator)
        with torch.no_grad():
            kept.append((net(worst).argmax(1) == labels).cpu())
        if step is not None:
            step(len(inputs))
    return torch.cat(kept)
