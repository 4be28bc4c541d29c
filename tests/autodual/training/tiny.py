"""A training run so small that tests can kill it often; run as a script it trains in the folder named first.

python tiny.py FOLDER [NAME=VALUE ...]      settings as ``--set`` takes them
"""

from __future__ import annotations

import os
import sys
import tomllib

import torch
import torch.distributed as dist
from torch import nn
from torch.utils.data import TensorDataset

from autodual.training import Config, Result, train

SETTINGS = {
    "epochs": 3,
    "batch": 12,
    "threads": 1,
    "checkpoint": 1,
    "domain": [0.0, 1.0],
    "data": {"held_out": 12, "shift": 1, "flip": True},
    "loss": {"method": {"name": "projected", "r": 5}},
    "schedules": {"eps": {"kind": "linear", "start": 0.0, "end": 0.05, "length": 2}, "lr": 0.01},
    "evaluation": {"methods": ["interval", "dual"], "attack": 3, "train": 12},
}


def model(*, normalized: bool = True) -> nn.Module:
    torch.manual_seed(0)
    norm = nn.BatchNorm2d(4) if normalized else nn.Identity()
    return nn.Sequential(nn.Conv2d(1, 4, 3, stride=2), norm, nn.ReLU(), nn.Flatten(), nn.Linear(16, 3))


def images(count: int = 60) -> TensorDataset:
    """Each class is bright in another third of the image."""
    generator = torch.Generator().manual_seed(1)
    y = torch.arange(count) % 3
    x = 0.3 * torch.rand(count, 1, 6, 6, generator=generator)
    for label in range(3):
        x[y == label, :, :, 2 * label : 2 * label + 2] += 0.6
    return TensorDataset(x, y)


def config(**changes) -> Config:
    return Config.build(SETTINGS, [(name.replace("__", "."), value) for name, value in changes.items()])


def main(folder: str, *words: str) -> Result:
    settings = [word.split("=", 1) for word in words]
    changes = [(name, tomllib.loads(f"value = {value}")["value"]) for name, value in settings]
    if "RANK" in os.environ:
        dist.init_process_group("gloo")
    network = model(normalized=dict(changes).get("model") != "plain")
    result = train(network, images(), Config.build(SETTINGS, changes), out=folder, resume=True)
    if dist.is_initialized():
        dist.destroy_process_group()
    return result


if __name__ == "__main__":
    main(*sys.argv[1:])
