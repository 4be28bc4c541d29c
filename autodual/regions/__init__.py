"""Input sets: what is known about the point a model will see. ``Region`` is the contract, ``docs/regions.md`` the guide."""

from __future__ import annotations

from autodual.regions.balls import L1, L2, LInf
from autodual.regions.base import Noise, Region
from autodual.regions.boxes import Box

__all__ = ["L1", "L2", "Box", "LInf", "Noise", "Region"]
