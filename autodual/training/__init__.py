"""Training of provably robust networks: schedules, settings, the loop, and how its results are judged."""

from autodual.training.config import NORMS, Config
from autodual.training.judgement import Judgement, by_cost, judge
from autodual.training.schedules import Constant, Cosine, Linear, Periodic, Schedule, Smooth, Steps
from autodual.training.trainer import Progress, Result, make_loss, train

__all__ = [
    "Config", "Constant", "Cosine", "Judgement", "Linear", "NORMS", "Periodic", "Progress", "Result", "Schedule", "Smooth",
    "Steps", "by_cost", "judge", "make_loss", "train",
]
