"""A small robust classifier of handwritten digits and the test images it was never shown: what ``make demo`` certifies.

The images are scikit-learn's bundled digits (8x8 pixels, 1,797 of them), themselves the test set of "Optical
Recognition of Handwritten Digits" by E. Alpaydin and C. Kaynak, UCI Machine Learning Repository, CC BY 4.0
(https://doi.org/10.24432/C50P49). A quarter of them, 450 in the proportions of the classes, are kept here for testing;
``examples/train_digits.py`` made both files beside this one.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

TEST_SET = Path(__file__).with_name("test.npz")
WEIGHTS = Path(__file__).with_name("weights.pt")
PIXEL_LEVELS = 16


def build() -> nn.Sequential:
    """Return the untrained classifier: two convolutions and two linear layers, input ``(batch, 1, 8, 8)`` in [0, 1]."""
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(8, 16, 4, stride=2, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(256, 64),
        nn.ReLU(),
        nn.Linear(64, 10),
    )


def load_model() -> nn.Sequential:
    """Return the trained classifier in evaluation mode."""
    model = build()
    model.load_state_dict(torch.load(WEIGHTS, map_location="cpu", weights_only=True))
    return model.eval()


def load_test_set() -> tuple[Tensor, Tensor]:
    """Return the 450 test images, ``(450, 1, 8, 8)`` with pixels in [0, 1], and their labels."""
    with np.load(TEST_SET) as arrays:
        x, y = arrays["x"], arrays["y"]
    return torch.from_numpy(x).float()[:, None] / PIXEL_LEVELS, torch.from_numpy(y).long()
