"""Train the digit classifier of the demo so that its certificates are good, and store it with its test images.

    python examples/train_digits.py            (needs scikit-learn: pip install 'autodual[dev]'; some minutes on one core)

The loss is ``robust_loss``: cross-entropy of minus the certified margins, an upper bound of the worst loss that any
perturbation of size eps can cause. Minimising it makes the *proof* succeed, not merely an attack fail. Bounds of an
untrained network are so loose that large radii teach nothing, so eps grows from 0 to its final value in the first
half of the training.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

import autodual
from autodual.digits import PIXEL_LEVELS, TEST_SET, WEIGHTS, build

# %% The data: 1,797 images of 8x8 pixels with values 0..16, a quarter of each class kept for testing.


def split() -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Return training images, training labels, test images and test labels, as bytes."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    images, labels = digits.images.astype(np.uint8), digits.target.astype(np.uint8)
    train_x, test_x, train_y, test_y = train_test_split(images, labels, test_size=450, stratify=labels, random_state=0)
    return train_x, train_y, test_x, test_y


# %% The training: eps ramps up, then stays; the learning rate falls in two steps towards the end.


def train(x: Tensor, y: Tensor, eps: float, epochs: int, batch: int, lr: float) -> torch.nn.Module:
    """Minimise the robust loss with Adam."""
    model = build()
    net = autodual.certify(model)
    optimizer = torch.optim.Adam(model.parameters(), lr)
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, [int(0.6 * epochs), int(0.85 * epochs)], gamma=0.3)
    start = time.perf_counter()
    for epoch in range(epochs):
        for step, index in enumerate(torch.randperm(len(y)).split(batch)):
            done = (epoch + step * batch / len(y)) / epochs
            loss = net.robust_loss(x[index], y[index], autodual.LInf(eps * min(1.0, 2 * done), domain=(0.0, 1.0)))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        schedule.step()
        if epoch % 5 == 4:
            print(f"epoch {epoch + 1:3d}  robust loss {loss.item():.3f}  {time.perf_counter() - start:.0f} s", flush=True)
    return model.eval()


# %% What came out: clean and certified accuracy on the images kept for testing.


def report(model: torch.nn.Module, x: Tensor, y: Tensor, eps: float) -> None:
    """Print clean and certified accuracy, and check what the demo relies on."""
    net = autodual.certify(model)
    clean = (net(x).argmax(1) == y).float().mean().item()
    certified = net.verify(x, y, autodual.LInf(eps, domain=(0.0, 1.0))).certified.float().mean().item()
    loss = F.cross_entropy(net(x), y).item()
    print(f"test: clean {clean:.1%}, certified at eps {eps:g} {certified:.1%}, clean loss {loss:.3f}")
    if not certified <= clean:
        raise SystemExit("more certified than right: that cannot be")


def as_tensors(images: np.ndarray, labels: np.ndarray) -> tuple[Tensor, Tensor]:
    """Return images in [0, 1] with a channel axis, and integer labels."""
    return torch.from_numpy(images).float()[:, None] / PIXEL_LEVELS, torch.from_numpy(labels).long()


def main() -> None:
    """Train, report and store."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--eps", type=float, default=0.1, help="radius trained for, pixels in [0, 1]")
    parser.add_argument("--epochs", type=int, default=60)
    parser.add_argument("--batch", type=int, default=100)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=WEIGHTS.parent, help="folder for test.npz and weights.pt")
    arguments = parser.parse_args()

    torch.manual_seed(arguments.seed)
    torch.set_num_threads(1)  # sums in another order give other weights
    train_x, train_y, test_x, test_y = split()
    model = train(*as_tensors(train_x, train_y), arguments.eps, arguments.epochs, arguments.batch, arguments.lr)
    report(model, *as_tensors(test_x, test_y), arguments.eps)
    arguments.output.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(arguments.output / TEST_SET.name, x=test_x, y=test_y)
    torch.save(model.state_dict(), arguments.output / WEIGHTS.name)


if __name__ == "__main__":
    main()
