"""The interval walk of a loss: boxes by the shortest way, and the last affine segment merged with the rows asked for.

Nothing is claimed of a loss, so there are no allowances for rounding here, and no reference trajectory: of the model's own
values only constants are computed. That leaves two runs of each affine operator, one for centres and one for radii.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from autodual.bounds.run import Run


def interval_rows(run: Run, rows: Float[Tensor, "rows batch outputs"]) -> Float[Tensor, "batch rows"]:
    """Bound linear functions of the output from below by interval arithmetic.

    Rows go back through the affine operators behind the last nonlinear ones, or the inputs, whose boxes then decide.

    Args:
        run: of a loss.
        rows: the functions, for each example its own.
    """
    output = run.program.graph.output
    pending, centers = {output: rows.reshape(len(rows), *run.hull(output).lower.shape)}, {}
    total = rows.new_zeros(rows.shape[:2])
    for name in reversed(run.order):
        nu = pending.pop(name, None)
        if nu is None:
            continue
        if name in run.regions:
            region = run.regions[name]
            centers[name] = run.values[name]
            total = total - region.excess(run.given[name], nu if region.symmetric else -nu)
        elif run.layers[name].facts.affine:
            centers[name] = None
            parents = run.program.parents[name]
            parts = run.layers[name].transpose(nu, tuple(run.hull(parent).lower for parent in parents))
            for parent, part in zip(parents, parts, strict=True):
                pending[parent] = pending[parent] + part if parent in pending else part
        else:
            box = run.hull(name)
            centers[name] = 0.5 * (box.lower + box.upper)
            radius = run.examples(name, 0.5 * (box.upper - box.lower))
            total = total - torch.einsum("rbf,bf->rb", run.examples(name, nu.abs(), lead=1), radius)
    for name in run.program.rules:
        if name in centers and centers[name] is None:
            centers[name] = run.layers[name].forward(*(centers[parent] for parent in run.program.parents[name]))
    middle = torch.einsum("rbk,bk->rb", rows, run.examples(output, centers[output]))
    return (middle + total).T
