"""Initial weights for training on interval bounds."""

from __future__ import annotations

import math

import torch
from torch import nn

_LINEAR = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


@torch.no_grad()
def keep_width(model: nn.Module) -> None:
    """Draw weights for which interval bounds keep their width from layer to layer, on average; biases become 0.

    A layer turns widths d of its n inputs into ``sum |w| d``, and a ReLU halves them on average. With ``w ~ N(0, s^2)``, whose
    mean magnitude is ``s sqrt(2 / pi)``, the width stays if ``n s sqrt(2 / pi) / 2 = 1``, so ``s = sqrt(2 pi) / n``. Usual
    initial weights have ``s`` of order ``1 / sqrt(n)``: their widths grow by ``sqrt(n)`` at each layer. Source: Shi et al.,
    Fast Certified Robust Training with Short Warmup (2021), section 3.1.

    Args:
        model: its linear and convolutional layers are changed in place, drawing from torch's global generator.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> layer = nn.Linear(1000, 500)
        >>> keep_width(layer)
        >>> round(layer.weight.abs().sum(1).mean().item() / 2, 1)
        1.0
    """
    for module in model.modules():
        if isinstance(module, _LINEAR):
            inputs = module.weight[0].numel()
            module.weight.normal_(0.0, math.sqrt(2 * math.pi) / inputs)
            if module.bias is not None:
                module.bias.zero_()
