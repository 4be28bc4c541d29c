"""What is asked of the outputs, and whether inputs, labels and rows fit the model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from autodual.errors import SpecificationError


def margin_rows(y: Int[Tensor, " batch"], classes: int, like: Tensor) -> Float[Tensor, "batch classes classes"]:
    """Return the rows ``e_y - e_j`` for every class j: ``[batch, classes, classes]``, zero at ``j = y`` (errata 16)."""
    identity = torch.eye(classes, dtype=like.dtype, device=like.device)
    return identity[y][:, None, :] - identity


def rival_rows(
    y: Int[Tensor, " batch"], classes: int, like: Tensor
) -> tuple[Float[Tensor, "batch rivals classes"], Int[Tensor, "batch rivals"]]:
    """Return the rows ``e_y - e_j`` for every class j but y, and those classes."""
    identity = torch.eye(classes, dtype=like.dtype, device=like.device)
    rivals = torch.arange(classes - 1, device=like.device).expand(len(y), -1)
    rivals = rivals + (rivals >= y[:, None])
    return identity[y][:, None, :] - identity[rivals], rivals


def spread_rivals(
    values: Float[Tensor, "batch rivals"], rivals: Int[Tensor, "batch rivals"], classes: int
) -> Float[Tensor, "batch classes"]:
    """Put the rivals' values in their classes' places, and 0 in the labels'."""
    return values.new_zeros(len(values), classes).scatter(1, rivals, values)


def check_rows(spec: Tensor, batch: int, outputs: int, like: Tensor) -> Tensor:
    """Check linear functionals of the outputs: ``(rows, outputs)`` or ``(batch, rows, outputs)``.

    Raises:
        SpecificationError: wrong type, width, batch or device, or NaN.
    """
    if not isinstance(spec, Tensor):
        raise SpecificationError(
            f"spec must be a tensor (rows, {outputs}) or ({batch}, rows, {outputs}), got {type(spec).__name__}"
        )
    fits = spec.ndim in (2, 3) and spec.shape[-1] == outputs and (spec.ndim == 2 or spec.shape[0] == batch)
    if not fits:
        raise SpecificationError(
            f"spec must have shape (rows, {outputs}) or ({batch}, rows, {outputs}), got {tuple(spec.shape)}"
        )
    if spec.device != like.device:
        raise SpecificationError(
            f"spec is on {spec.device} but the input is on {like.device}: use spec.to({str(like.device)!r})"
        )
    if not spec.isfinite().all():
        raise SpecificationError("spec contains NaN or infinity")
    return spec.to(like)


def check_labels(y: Any, batch: int, classes: int, device: torch.device) -> Int[Tensor, " {batch}"]:
    """Check labels: one integer per example, ``0 <= y < classes``.

    Raises:
        SpecificationError: wrong type or count, or a label out of range.
    """
    y = _as_labels(y, device)
    if y.ndim == 0 and batch == 1:
        y = y[None]
    if y.is_floating_point() or y.is_complex() or y.dtype == torch.bool:
        raise SpecificationError(f"y must hold integer class labels, got dtype {y.dtype}")
    if y.shape != (batch,):
        raise SpecificationError(f"y must have shape ({batch},), one label per example, got {tuple(y.shape)}")
    bad = ((y < 0) | (y >= classes)).nonzero()
    if len(bad):
        i = int(bad[0])
        raise SpecificationError(f"label y[{i}] = {int(y[i])} is out of range: the model has {classes} outputs")
    return y.long()


def _as_labels(y: Any, device: torch.device) -> Tensor:
    """Turn whatever was given as labels into a tensor that has values."""
    try:
        y = torch.as_tensor(y)
    except (TypeError, ValueError, RuntimeError) as error:
        found = type(y).__name__ if y is not None else "None"
        raise SpecificationError(f"y must hold one integer class label per example, got {found}: {error}") from error
    if y.is_meta:
        raise SpecificationError(f"y is a meta tensor of shape {tuple(y.shape)}: it has no values; labels must be known")
    return y.to(device)


def check_inputs(arguments: Mapping[str, Any], perturbed: tuple[str, ...], like: Tensor | None) -> None:
    """Check the perturbed inputs: float tensors, finite, on the model's device and of its dtype, same batch.

    Args:
        arguments: the model's arguments by name.
        perturbed: names of those that have a region.
        like: one of the model's parameters, or None for a model without any.

    Raises:
        SpecificationError: names the argument, what was found and what to do.
    """
    sizes = {}
    for name in perturbed:
        x = arguments[name]
        if not isinstance(x, Tensor):
            raise SpecificationError(f"{name} must be a tensor, got {type(x).__name__}")
        if x.ndim == 0:
            raise SpecificationError(f"{name} is a scalar: axis 0 must be the batch")
        if not x.is_floating_point():
            raise SpecificationError(f"{name} has dtype {x.dtype}: a region needs a floating-point input; use {name}.float()")
        if like is not None and x.device != like.device:
            raise SpecificationError(
                f"{name} is on {x.device} but the model is on {like.device}: use {name}.to({str(like.device)!r})"
            )
        if like is not None and like.is_floating_point() and x.dtype != like.dtype:
            raise SpecificationError(f"{name} has dtype {x.dtype} but the model has {like.dtype}: use {name}.to({like.dtype})")
        bad = (~x.isfinite()).reshape(len(x), -1).any(1).nonzero() if x.numel() else []
        if len(bad):
            raise SpecificationError(f"{name} contains NaN or infinity, first in example {int(bad[0])}")
        sizes[name] = len(x)
    if len(set(sizes.values())) > 1:
        raise SpecificationError(f"inputs disagree on the batch size: {sizes}")
