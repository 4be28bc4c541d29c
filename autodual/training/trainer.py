"""The training loop."""

from __future__ import annotations

import inspect
import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from autodual import losses
from autodual.errors import SpecificationError, TrainingError
from autodual.network import BoundModule, certify
from autodual.training import processes
from autodual.training.batches import Batches, generators_kept, seed_step, split
from autodual.training.config import Config
from autodual.training.folder import Folder, check_same
from autodual.training.initialization import keep_width
from autodual.training.judgement import Judgement, judge
from autodual.training.picture import draw_if_possible

logger = logging.getLogger("autodual.training")

JUDGED = ("clean", "attacked", "certified", "clean_loss", "robust_loss")
"""What an evaluation reports of each set of examples."""


@dataclass(frozen=True)
class Progress:
    """What a watcher is told after every step.

    Attributes:
        step: steps done.
        steps: steps in all.
        epoch: epochs done, with the fraction of the present one.
        loss: of the last step.
        values: the scheduled values of the last step, by name.
        row: the newest line of the log, if there is one.
        left: seconds left, estimated.
    """

    step: int
    steps: int
    epoch: float
    loss: float
    values: Mapping[str, float]
    row: Mapping[str, Any] | None
    left: float


@dataclass(frozen=True)
class Result:
    """How a run ended. The model holds the best weights, in evaluation mode.

    Attributes:
        stopped: why: ``epochs``, ``minutes`` or ``patience``.
        rows: the log, one dict per epoch.
        best: the line of the best weights.
        test: the judgement of the test examples, if there are any.
        seconds: wall time of the training, evaluations included.
    """

    stopped: str
    rows: list[dict[str, Any]]
    best: dict[str, Any] | None
    test: Judgement | None
    seconds: float


@dataclass
class State:
    """What moves while a run goes on, beside the weights and the optimizer."""

    step: int = 0
    seconds: float = 0.0
    losses: float = 0.0  # sum over the steps of this epoch
    gradients: float = 0.0  # likewise, of norms
    counted: int = 0
    score: list[float] | None = None  # of the best evaluation, what is compared first comes first
    best: dict[str, Any] | None = None
    stale: int = 0
    stopped: str | None = None


def train(
    model: nn.Module,
    dataset: Dataset,
    config: Config,
    *,
    held_out: Dataset | None = None,
    test: Dataset | None = None,
    out: Path | str | None = None,
    resume: bool = False,
    watch: Callable[[Progress], None] = lambda _: None,
    clock: Callable[[], float] = time.perf_counter,
) -> Result:
    """Train a classifier to be provably robust.

    The same settings and number of threads give the same weights, bit for bit, on one machine's CPU: also when a run was killed
    and resumed. Where ``torch.distributed`` is initialised, every process calls this with the same arguments; the gradient is
    then that of the whole batch, and the first process writes the files.

    Args:
        model: the classifier; trained in place, and moved to the configured device.
        dataset: pairs ``(x, y)`` by index, of a length.
        config: what to do.
        held_out: examples for choosing the best weights and for stopping early; default: ``config.data.held_out`` of
            ``dataset``.
        test: examples judged once, at the end.
        out: the run's folder; without one nothing is written and nothing can be resumed.
        resume: go on with the run in ``out``, or start it where there is none yet.
        watch: called after every step.
        clock: tells the seconds for ``config.minutes`` and the log. ``time.process_time`` counts the processor's time on this
            process alone, so that runs beside others stay comparable.

    Raises:
        SpecificationError: settings that do not fit the model or the examples.
        TrainingError: the loss is not finite, or the folder does not allow what is asked.

    Example:
        >>> from torch.utils.data import TensorDataset
        >>> _ = torch.manual_seed(0)
        >>> x = torch.rand(200, 2)
        >>> model = nn.Sequential(nn.Linear(2, 16), nn.ReLU(), nn.Linear(16, 2))
        >>> settings = {"epochs": 20, "batch": 50, "data": {"held_out": 50}, "schedules": {"eps": 0.02, "lr": 0.05}}
        >>> result = train(model, TensorDataset(x, (x.sum(1) > 1).long()), Config.build(settings))
        >>> result.stopped, result.best["certified"] > 0.8
        ('epochs', True)
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(config.threads or threads)
    try:
        with generators_kept():
            return _Run(model, dataset, config, held_out, test, None if out is None else Path(out), watch, clock).run(resume)
    finally:
        torch.set_num_threads(threads)


def make_loss(net: BoundModule, config: Config) -> nn.Module:
    """Build the configured loss.

    Raises:
        SpecificationError: there is no such loss, or it has no such numbers or options.
    """
    kind = losses.LOSSES.get(config.loss.name)
    if kind is None:
        raise SpecificationError(f"loss.name: there is no loss {config.loss.name!r}; known are {', '.join(losses.LOSSES)}")
    moved = [name for name in config.schedules if name not in ("eps", "lr")]
    unknown = [name for name in [*moved, *config.loss.numbers] if name not in kind.numbers]
    if unknown:
        known = ", ".join(kind.numbers) or "none"
        raise SpecificationError(f"the loss {config.loss.name!r} has no number {unknown[0]!r}; it has: {known}")
    own = [*inspect.signature(kind).parameters]
    if config.method is not None and "method" not in own:
        raise SpecificationError(f"the loss {config.loss.name!r} has its own way to bound: leave loss.method out")
    method = {} if config.method is None else {"method": config.method}
    known = [name for name in own if name not in ("network", "method", "reduction", "numbers")]
    unknown = [name for name in config.loss.options if name not in known]
    if unknown:
        raise SpecificationError(
            f"the loss {config.loss.name!r} has no option {unknown[0]!r}; it has: {', '.join(known) or 'none'}"
        )
    return kind(net, **method, **config.loss.options, **config.loss.numbers)


@dataclass
class _Run:
    """One call of ``train``."""

    model: nn.Module
    dataset: Dataset
    config: Config
    held_out: Dataset | None
    test: Dataset | None
    out: Path | None
    watch: Callable[[Progress], None]
    clock: Callable[[], float]
    state: State = field(default_factory=State)

    def __post_init__(self) -> None:
        config, device = self.config, torch.device(self.config.device)
        self.model.to(device)
        if config.initialization == "interval":
            seed_step(config.seed, 0)
            keep_width(self.model)
        index, self.held_index = split(len(self.dataset), config.data.held_out, config.seed)
        if self.held_out is None:
            self.held_out = self.dataset if config.data.held_out else None
        else:
            self.held_index = torch.arange(len(self.held_out))
        if config.evaluation.patience is not None and self.held_out is None:
            raise SpecificationError("evaluation.patience needs held-out examples: set data.held_out, e.g. a tenth of all")
        self.batches = Batches(self.dataset, index, config.batch, config.seed, config.data, device)
        self.steps = config.epochs * self.batches.per_epoch
        self.net = certify(self.model)
        self.loss = processes.wrapped(make_loss(self.net, config))
        self.optimizer = torch.optim.AdamW(self.model.parameters(), weight_decay=config.optimizer.weight_decay)
        self.rows: list[dict[str, Any]] = []
        self.weights: dict[str, Tensor] | None = None
        self.folder = None if self.out is None else Folder(self.out, self.columns)

    @property
    def columns(self) -> tuple[str, ...]:
        """Of the log."""
        judged = ("train", *JUDGED)
        names = [*JUDGED, *(f"train_{name}" for name in judged[1:])]
        return ("epoch", "step", "seconds", "loss", "gradient", *self.config.schedules, *names)

    def run(self, resume: bool) -> Result:
        """Train to the end."""
        self._start(resume)
        began, before = self.clock(), self.state.seconds
        while self.state.stopped is None:
            loss, values = self._step()
            self.state.seconds = before + self.clock() - began
            late = self.config.minutes is not None and self.state.seconds >= 60 * self.config.minutes
            if self.config.minutes is not None and processes.from_first(late):
                self.state.stopped = "minutes"
            if self.state.step == self.steps:
                self.state.stopped = "epochs"
            if self.state.step % self.batches.per_epoch == 0 or self.state.stopped:
                self._end_epoch()
                self.state.seconds = before + self.clock() - began
            if self.state.step % self.config.checkpoint == 0 or self.state.counted == 0:
                self._save()
            self._tell(loss, values)
        return self._finish()

    def _step(self) -> tuple[float, dict[str, float]]:
        """Take one step; return its loss and what was scheduled for it."""
        config, progress = self.config, self.state.step / self.batches.per_epoch
        values = {name: schedule(progress) for name, schedule in config.schedules.items()}
        numbers = {name: value for name, value in values.items() if name not in ("eps", "lr")}
        seed_step(config.seed, self.state.step)
        x, y, weight = self.batches.at(self.state.step)
        self.loss.train()
        loss = weight * self.loss(x, y, config.region(values["eps"]), **numbers)
        (mean,) = processes.total(loss.detach().double().reshape(1) / processes.size())
        self._check_finite(mean, "the loss", values)
        for group in self.optimizer.param_groups:
            group["lr"] = values["lr"]
        self.optimizer.zero_grad()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), config.optimizer.clip or math.inf).item()
        self._check_finite(norm, "the gradient's norm", values)
        self.optimizer.step()
        self.state.step += 1
        self.state.counted += 1
        self.state.losses += mean
        self.state.gradients += norm
        return mean, values

    def _check_finite(self, value: float, what: str, values: Mapping[str, float]) -> None:
        if not math.isfinite(value):
            place = f"step {self.state.step} (epoch {self.state.step / self.batches.per_epoch:.2f})"
            moved = ", ".join(f"{name} {number:g}" for name, number in values.items())
            kept = f"; {self.folder.last} is the last good checkpoint" if self.folder else ""
            raise TrainingError(
                f"{what} is {value} at {place}, {moved}. Try a smaller lr, optimizer.clip = 10, a slower growth of eps "
                f'or initialization = "interval"{kept}'
            )

    def _end_epoch(self) -> None:
        """Judge the weights where it is time to, and write a line of the log."""
        state, config = self.state, self.config
        epoch = state.step / self.batches.per_epoch
        row = {"epoch": epoch, "step": state.step, "seconds": round(state.seconds, 2)}
        row |= {"loss": state.losses / max(state.counted, 1), "gradient": state.gradients / max(state.counted, 1)}
        row |= {name: schedule(epoch) for name, schedule in config.schedules.items()}
        state.losses = state.gradients = 0.0
        state.counted = 0
        better = False
        if state.stopped or round(epoch) % config.evaluation.every == 0:
            row |= self._judged()
            better = self._compare(row)
        logger.info("%s", describe(row, config.epochs))
        self.rows.append(row)
        lost = overfitted(self.rows)
        if lost and processes.rank() == 0:
            logger.warning("%s", lost)
        if self.folder is not None and processes.rank() == 0:
            self.folder.append(row)
            if better:
                self.folder.save_best(self.weights)

    def _judged(self) -> dict[str, float]:
        """Judge the held-out examples (those of the test where nothing is held out), and some training examples."""
        some, result = self.config.evaluation, {}
        if self.held_out is not None:
            result |= self._judge(self.held_out, self.held_index[: some.limit]).totals()
        elif self.test is not None:
            result |= self._judge(self.test, torch.arange(len(self.test))[: some.limit]).totals()
        if some.train:
            totals = self._judge(self.dataset, self.batches.index[: some.train]).totals()
            result |= {f"train_{name}": value for name, value in totals.items()}
        return result

    def _judge(self, dataset: Dataset, index: Tensor) -> Judgement:
        some, region = self.config.evaluation, self.config.region(self.config.judged_eps)
        found = judge(self.net, dataset, region, some.methods, index=index, attack=some.attack, batch=some.batch, lost=True)
        if found.contradictions:
            raise TrainingError(
                f"an attack broke {found.contradictions} certified examples: please report it, it must never happen"
            )
        return found

    def _compare(self, row: dict[str, Any]) -> bool:
        """Keep the weights if they are the best so far; stop if there were none better for long.

        Only held-out examples choose. Without any, the newest weights count as the best.
        """
        state, patience = self.state, self.config.evaluation.patience
        score = None if self.held_out is None else [row["certified"], row["clean"]]
        if score is None or state.score is None or score > state.score:
            state.score, state.best, state.stale = score, row, 0
            self.weights = {name: value.detach().cpu().clone() for name, value in self.model.state_dict().items()}
            return True
        settled = max(schedule.settled for name, schedule in self.config.schedules.items() if name != "lr")
        state.stale += row["epoch"] > settled
        if patience is not None and state.stale >= patience and state.stopped is None:
            state.stopped = "patience"
        return False

    def _start(self, resume: bool) -> None:
        """Begin anew or where the last checkpoint is."""
        if self.folder is None:
            if resume:
                raise SpecificationError("resume needs out, the folder of the run")
            return
        found = processes.from_first(self.folder.last.exists())
        if not (resume and found):
            if processes.rank() == 0:
                self.folder.begin(self.config)
                self._save()
            return
        saved = processes.from_first(self.folder.load() if processes.rank() == 0 else None)
        check_same(saved["config"], self.config)
        if saved["examples"] != len(self.dataset):
            raise TrainingError(
                f"the run was begun with {saved['examples']} training examples, now there are {len(self.dataset)}"
            )
        self.model.load_state_dict(saved["model"])
        self.optimizer.load_state_dict(saved["optimizer"])
        self.state, self.weights = State(**saved["state"]), saved["best"]
        self.rows = processes.from_first(self.folder.cut(saved["log"]) if processes.rank() == 0 else None)
        logger.info("resumed at step %d of %d", self.state.step, self.steps)
        if self.state.stopped == "minutes" and (self.config.minutes is None or self.state.seconds < 60 * self.config.minutes):
            self.state.stopped = None

    def _tell(self, loss: float, values: dict[str, float]) -> None:
        state, limit = self.state, self.config.minutes
        left = state.seconds / state.step * (self.steps - state.step)
        left = left if limit is None else min(left, 60 * limit - state.seconds)
        newest = self.rows[-1] if self.rows else None
        epoch = state.step / self.batches.per_epoch
        self.watch(Progress(state.step, self.steps, epoch, loss, values, newest, 0.0 if state.stopped else left))

    def _finish(self) -> Result:
        """Put the best weights into the model, judge the test examples, write the summary."""
        state = self.state
        if self.weights is not None:
            self.model.load_state_dict(self.weights)
        self.net.eval()
        found = None if self.test is None else self._judge(self.test, torch.arange(len(self.test)))
        if self.folder is not None and processes.rank() == 0:
            self.folder.summarize(
                {
                    "stopped": state.stopped,
                    "steps": state.step,
                    "seconds": round(state.seconds, 2),
                    "processes": processes.size(),
                    "torch": torch.__version__,
                    "eps": self.config.judged_eps,
                    "best": state.best,
                    "test": None if found is None else {"examples": len(found.y), **found.totals()},
                    "settings": self.config.as_dict(),
                }
            )
            draw_if_possible(self.rows, self.folder.path / "curves.png", "test" if self.held_out is None else "held out")
        return Result(str(state.stopped), self.rows, state.best, found, state.seconds)

    def _save(self) -> None:
        if self.folder is None or processes.rank():
            return
        self.folder.save(
            {
                "config": self.config.as_dict(),
                "examples": len(self.dataset),
                "state": vars(self.state),
                "model": self.model.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "best": self.weights,
            }
        )


COLLAPSE = 0.2


def overfitted(rows: Sequence[Mapping[str, Any]]) -> str | None:
    """Say that training has overfitted to its own attack, if the last line of the log shows that.

    At the same radius the share of examples that survive projected gradient descent falls suddenly, while the loss does not
    rise: what is minimised no longer is the worst loss. Source: Wong, Rice, Kolter, fast is better than free (2020); thesis,
    section 4.1.

    Args:
        rows: the log.
    """
    judged = [row for row in rows if "attacked" in row]
    if len(judged) < 2 or judged[-1] is not rows[-1] or judged[-1]["eps"] != judged[-2]["eps"]:
        return None
    before, now = judged[-2:]
    if now["attacked"] > before["attacked"] - COLLAPSE or now["loss"] > before["loss"]:
        return None
    return (
        f"catastrophic overfitting at epoch {now['epoch']:.4g}: the share that survives an attack fell from "
        f"{before['attacked']:.1%} to {now['attacked']:.1%} while the loss did not rise. Go back to earlier weights, and try a "
        "smaller lr, a loss with more attack steps (pgd) or one over bounds"
    )


def describe(row: Mapping[str, Any], epochs: int) -> str:
    """Write a line of the log for people."""
    parts = [f"epoch {row['epoch']:.4g}/{epochs}", f"loss {row['loss']:.4g}", f"eps {row['eps']:.4g}"]
    parts += [f"{name} {row[name]:.1%}" for name in ("clean", "attacked", "certified") if name in row]
    return "  ".join([*parts, f"{row['seconds']:.0f} s"])
