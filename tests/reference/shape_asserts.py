"""Models with assert statements; in a test module pytest would rewrite them."""

import torch
from torch import nn


class ShapeAssert(nn.Module):
    def forward(self, x):
        assert x.dim() == 3, "wrong"
        assert x.shape[1] == 2
        torch._assert(x.shape[1] == 2, "wrong")
        return x.flatten(1).relu()


class ValueAssert(nn.Module):
    def forward(self, x):
        assert (x > -100).all()  # value assert
        return x.relu()


class CombinedAssert(nn.Module):
    def forward(self, x):
        assert x.dim() == 3 and x.shape[1] == 2  # noqa: PT018
        return x.relu()
