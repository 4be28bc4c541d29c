"""The source text's Algorithm 1, line by line, in float64 on dense matrices: a reference that shares no code with the library.

For a classifier x -> W_1 -> ReLU -> ... -> W_{k-1} -> logits and the ball |x' - x|_inf <= epsilon it computes the activation
bounds l_i, u_i of every layer and the margins J, lower bounds of f_y - f_j: equations (3.8), (3.9) and (3.18) of Wong's thesis,
section 3.1. One slip of the printed algorithm is put right: the inner sums run over I_j, the layer a term came from.

Indices are the text's: W[1] .. W[k-1], bounds l[2] .. l[k]. A vector `epsilon` makes the ball a box: that is how a domain
(pixels in 0..1) enters.

    python benchmarks/algorithm1.py --data DIR --models DIR --only mnist --limit 50
"""

from __future__ import annotations

import copy
import time
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from benchmarks.common import PUBLISHED, data_arguments, load_images, load_model

Array = NDArray[np.float64]


@dataclass(frozen=True)
class DenseNetwork:
    """Weights and biases of x -> W_1 -> ReLU -> ... -> W_{k-1}, each under its number in the text."""

    weights: dict[int, Array]
    biases: dict[int, Array]

    @property
    def k(self) -> int:
        """Number of layers of activations, input and logits included."""
        return len(self.weights) + 1

    def __call__(self, x: Array) -> Array:
        """Run the network (3.1) on one flat input."""
        z = x
        for i in range(1, self.k):
            z_hat = self.weights[i] @ z + self.biases[i]
            z = np.maximum(z_hat, 0.0)
        return z_hat


def dense(model: nn.Sequential, input_shape: tuple[int, ...]) -> DenseNetwork:
    """Unroll a chain of convolutions, linear maps and ReLUs: each affine layer is applied to zero and to the identity."""
    weights: dict[int, Array] = {}
    biases: dict[int, Array] = {}
    shape = input_shape
    for layer in model:
        if isinstance(layer, (nn.Conv2d, nn.Linear)):
            layer = copy.deepcopy(layer).double()
            size = int(np.prod(shape))
            with torch.no_grad():
                zero = layer(torch.zeros(1, *shape, dtype=torch.float64))
                columns = layer(torch.eye(size, dtype=torch.float64).reshape(size, *shape)) - zero
            weights[len(weights) + 1] = columns.flatten(1).T.contiguous().numpy()
            biases[len(biases) + 1] = zero.flatten().numpy()
            shape = tuple(zero.shape[1:])
        elif isinstance(layer, nn.Flatten):
            shape = (int(np.prod(shape)),)
        elif not isinstance(layer, nn.ReLU):
            raise TypeError(f"only convolutions, linear maps, ReLU and Flatten are unrolled, found {type(layer).__name__}")
    return DenseNetwork(weights, biases)


def activation_bounds(network: DenseNetwork, x: Array, epsilon: Array | float) -> tuple[dict[int, Array], dict[int, Array]]:
    """Algorithm 1: lower and upper bounds l_2, u_2 .. l_k, u_k of the activations before each ReLU, and of the logits."""
    W, b, k = network.weights, network.biases, network.k
    epsilon = np.broadcast_to(epsilon, x.shape)
    lower: dict[int, Array] = {}
    upper: dict[int, Array] = {}
    undecided: dict[int, NDArray[np.bool_]] = {}
    nu: dict[int, Array] = {}
    gamma: dict[int, Array] = {}

    # initialization
    nu_hat_1 = W[1].T
    gamma[1] = b[1]
    lower[2] = x @ W[1].T + b[1] - epsilon @ np.abs(W[1].T)
    upper[2] = x @ W[1].T + b[1] + epsilon @ np.abs(W[1].T)

    for i in range(2, k):
        # form I_i^-, I_i^+, I_i; form D_i as in (3.20)
        undecided[i] = (lower[i] < 0) & (upper[i] > 0)
        D = diagonal(lower[i], upper[i])
        # initialize new terms
        nu[i] = (D[:, None] * W[i].T)[undecided[i]]
        gamma[i] = b[i]
        # propagate existing terms
        for j in range(2, i):
            nu[j] = (nu[j] * D) @ W[i].T
        for j in range(1, i):
            gamma[j] = (gamma[j] * D) @ W[i].T
        nu_hat_1 = (nu_hat_1 * D) @ W[i].T
        # compute bounds
        psi = x @ nu_hat_1 + sum(gamma[j] for j in range(1, i + 1))
        radius = epsilon @ np.abs(nu_hat_1)
        lower[i + 1] = psi - radius + sum(lower[j][undecided[j]] @ np.maximum(-nu[j], 0.0) for j in range(2, i + 1))
        upper[i + 1] = psi + radius - sum(lower[j][undecided[j]] @ np.maximum(nu[j], 0.0) for j in range(2, i + 1))
    return lower, upper


def diagonal(lower: Array, upper: Array) -> Array:
    """Return the diagonal of D_i, equation (3.20): 0, 1 or u/(u-l)."""
    undecided = (lower < 0) & (upper > 0)
    gap = np.where(undecided, upper - lower, 1.0)
    return np.where(undecided, upper / gap, (lower >= 0).astype(np.float64))


def dual_objective(
    network: DenseNetwork, x: Array, epsilon: Array | float, bounds: tuple[dict[int, Array], dict[int, Array]], c: Array
) -> Array:
    """J of (3.8) at the dual point (3.9) with alpha from (3.18), for every row of ``c`` (rows, logits)."""
    W, b, k = network.weights, network.biases, network.k
    lower, upper = bounds
    epsilon = np.broadcast_to(epsilon, x.shape)
    nu = -c
    objective = np.zeros(len(c))
    for i in range(k - 1, 0, -1):
        objective -= nu @ b[i]
        nu_hat = nu @ W[i]
        if i > 1:
            undecided = (lower[i] < 0) & (upper[i] > 0)
            nu = nu_hat * diagonal(lower[i], upper[i])
            objective += np.maximum(nu[:, undecided], 0.0) @ lower[i][undecided]
    return objective - nu_hat @ x - np.abs(nu_hat) @ epsilon


def margins(
    network: DenseNetwork, x: Array, y: int, epsilon: Array | float, domain: tuple[float, float] | None = None
) -> Array:
    """Lower bounds of f_y - f_j for every class j (0 at j = y) over the ball around one flat input."""
    if domain is not None:
        low, high = np.maximum(x - epsilon, domain[0]), np.minimum(x + epsilon, domain[1])
        x, epsilon = (low + high) / 2, (high - low) / 2
    classes = len(network.biases[network.k - 1])
    c = -np.eye(classes)
    c[:, y] += 1.0
    return dual_objective(network, x, epsilon, activation_bounds(network, x, epsilon), c)


def main() -> None:
    """Print the robust error and the time per image on the first images of one data set."""
    parser = data_arguments("Algorithm 1 of the source text on published weights, float64, dense matrices.")
    parser.add_argument("--only", choices=sorted(PUBLISHED), default="mnist", help="which classifier")
    parser.add_argument("--limit", type=int, default=50, help="number of test images")
    arguments = parser.parse_args()
    entry = PUBLISHED[arguments.only]
    images, labels = load_images(arguments.data, entry, arguments.limit)
    network = dense(load_model(arguments.models, entry), tuple(images.shape[1:]))
    inputs = images.double().flatten(1).numpy()
    wrong = sum(int(network(x).argmax() != y) for x, y in zip(inputs, labels.tolist(), strict=True))
    percent = 100 / len(labels)
    print(f"{arguments.only}: {len(labels)} images, {percent * wrong:.2f} % wrong (published for all: {entry.clean_error} %)")
    for domain, _ in entry.uncertified:
        start = time.perf_counter()
        bounds = [margins(network, x, y, entry.epsilon, domain) for x, y in zip(inputs, labels.tolist(), strict=True)]
        seconds = time.perf_counter() - start
        open_cases = sum(not np.all(np.delete(row, y) > 0) for row, y in zip(bounds, labels.tolist(), strict=True))
        print(
            f"  epsilon {entry.epsilon}, domain {domain}: {percent * open_cases:.2f} % not certified "
            f"(published for all: {entry.robust_error} %), {1000 * seconds / len(labels):.0f} ms per image"
        )


if __name__ == "__main__":
    main()
