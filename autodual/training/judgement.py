"""Judge a classifier on a data set: clean, attacked, and certified by the union of several methods."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset

from autodual.attacks import pgd
from autodual.methods import METHODS, Method
from autodual.network import BoundModule
from autodual.regions import Region
from autodual.training import processes
from autodual.training.batches import fetch

NOBODY = -1


@dataclass(frozen=True)
class Judgement:
    """What was found out about each example; tensors are ``(examples,)``, on the CPU.

    Attributes:
        index: the example's number in the data set.
        y: its label.
        predicted: the class predicted for it.
        clean_loss: cross-entropy of the prediction.
        robust_loss: upper bound of the cross-entropy over the region (thesis, Theorem 2), from the best margins seen.
        margin: the best lower bound of the smallest margin over the region.
        by: which method, counted from 0, certified it; -1 if none did.
        kept: whether it keeps its label at the worst point that the attack found; all True without an attack.
    """

    index: Tensor
    y: Tensor
    predicted: Tensor
    clean_loss: Tensor
    robust_loss: Tensor
    margin: Tensor
    by: Tensor
    kept: Tensor

    @property
    def right(self) -> Tensor:
        """Whether the prediction is the label."""
        return self.predicted == self.y

    @property
    def certified(self) -> Tensor:
        """Whether a method proved that the whole region has the label."""
        return self.by != NOBODY

    @property
    def survived(self) -> Tensor:
        """Whether it is right and stays so under the attack."""
        return self.right & self.kept

    @property
    def contradictions(self) -> int:
        """Number of certified examples that the attack broke: not zero only if a bound is wrong."""
        return int((self.certified & ~self.survived).sum())

    def totals(self) -> dict[str, float]:
        """Return shares of the examples and mean losses, by name."""
        names = {"clean": self.right, "attacked": self.survived, "certified": self.certified}
        names |= {"clean_loss": self.clean_loss, "robust_loss": self.robust_loss}
        return {name: values.double().mean().item() for name, values in names.items()}


def judge(
    net: BoundModule,
    dataset: Dataset,
    region: Region,
    methods: Sequence[str | Method],
    *,
    index: Tensor,
    attack: int = 0,
    batch: int = 100,
    lost: bool = False,
    step: Callable[[int], None] | None = None,
) -> Judgement:
    """Judge examples of a data set; several processes share them and each returns the judgement of all.

    Args:
        net: the compiled classifier; judged in evaluation mode, which is left set.
        dataset: pairs of input and label.
        region: the set around each example, the same for all.
        methods: bounds that prove something; each is asked about the examples that those before it left undecided.
        index: the examples to judge.
        attack: steps of projected gradient descent from the region's centre; 0 for none.
        batch: examples at a time.
        lost: bound misclassified examples by every method too: only their robust loss gains from it.
        step: told the number of examples that were finished, in this process.
    """
    net.eval()
    device = next((parameter.device for parameter in net.parameters()), torch.device("cpu"))
    parts = []
    for chosen in index[processes.rank() :: processes.size()].split(batch):
        x, y = fetch(dataset, chosen, device)
        parts.append(_judged(net, x, y, chosen, region, methods, attack, lost))
        if step is not None:
            step(len(chosen))
    return _joined(part for group in processes.gathered(parts) for part in group)


def by_cost(methods: Iterable[str]) -> tuple[str, ...]:
    """Order methods by name so that the cheaper ones come first; each once."""
    return tuple(sorted(dict.fromkeys(methods), key=[*METHODS].index))


def _judged(
    net: BoundModule,
    x: Tensor,
    y: Tensor,
    index: Tensor,
    region: Region,
    methods: Sequence[str | Method],
    attack: int,
    lost: bool,
) -> Judgement:
    with torch.no_grad():
        scores = net(x)
    right = scores.argmax(1) == y
    margins = torch.full_like(scores, -torch.inf)
    by, undecided = torch.full_like(y, NOBODY), torch.arange(len(y), device=y.device)
    for number, method in enumerate(methods):
        if len(undecided) == 0:
            break
        report = net.verify(x[undecided], y[undecided], region.take(undecided, x), method)
        margins[undecided] = torch.fmax(margins[undecided], report.margins)
        by[undecided[report.certified]] = number
        undecided = undecided[~report.certified & (right[undecided] | lost)]
    kept = torch.ones_like(right)
    if attack:
        worst = pgd(net, x, y, region, steps=attack)
        with torch.no_grad():
            kept = net(worst).argmax(1) == y
    clean, robust = (F.cross_entropy(values, y, reduction="none") for values in (scores, -margins))
    robust = torch.where(margins.isfinite().all(1), robust, torch.inf)
    smallest = margins.scatter(1, y[:, None], torch.inf).amin(1)
    found = (index, y, scores.argmax(1), clean, robust, smallest, by, kept)
    return Judgement(*(values.detach().cpu() for values in found))


def _joined(parts: Iterable[Judgement]) -> Judgement:
    """Join judgements in the order of their examples."""
    lists: list[list[Any]] = [[getattr(part, field.name) for field in fields(Judgement)] for part in parts]
    columns = [torch.cat(values) for values in zip(*lists, strict=True)]
    order = columns[0].argsort()
    return Judgement(*(column[order] for column in columns))
