"""The thesis' small architecture, for images of one channel and of three: what training is measured on."""

from __future__ import annotations

from torch import Tensor, nn

import autodual


class ChannelsFirst(nn.Module):
    """Bring images from (height, width, channels), as they are stored, to (channels, height, width)."""

    def forward(self, x: Tensor) -> Tensor:
        """Permute the axes."""
        return x.permute(0, 3, 1, 2)


def small(channels: int = 1, side: int = 28) -> nn.Sequential:
    """Build two convolutions of 16 and 32 filters and a hidden layer of 100 units (thesis, section 3.3)."""
    return nn.Sequential(
        nn.Conv2d(channels, 16, 4, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 32, 4, stride=2, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(32 * (side // 4) ** 2, 100),
        nn.ReLU(),
        nn.Linear(100, 10),
    )


def small_cifar() -> nn.Sequential:
    """Build the same for CIFAR-10 as stored, pixels in [0, 1], normalised inside."""
    normalize = autodual.Normalize((0.4914, 0.4822, 0.4465), (0.2471, 0.2435, 0.2616))
    return nn.Sequential(ChannelsFirst(), normalize, *small(3, 32))
