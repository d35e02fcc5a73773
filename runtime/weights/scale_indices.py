"""Indices of scales, checked before a kernel reads by them: they may come from a bundle that somebody forged."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from partitioner.errors import WeightError
from runtime.program.shards import WeightShard

__all__ = ["require_scales"]


def require_scales(weights: Sequence[WeightShard], tensors: Sequence[Tensor]) -> None:
    """Raises `WeightError` where rows or columns of codes (`runtime.ops.kernels.stored.stored_linear`) name scales
    that are not there.
    """
    named = {weight.name: tensor for weight, tensor in zip(weights, tensors, strict=True)}
    for name in named:
        owner = name.removesuffix(".codes")
        scales, rows, columns = (named.get(f"{owner}.{role}") for role in ("scales", "rows", "columns"))
        if owner == name or scales is None or rows is None or columns is None:
            continue
        for role, given, count in (("rows", rows, scales.shape[0]), ("columns", columns, scales.shape[-1])):
            if given.numel():
                low, high = torch.stack(torch.aminmax(given)).tolist()
                if not 0 <= low <= high < count:
                    raise WeightError(
                        f"'{owner}.{role}' names number {low if low < 0 else high} of the {count} {role} of its "
                        f"scales; required is 0 to {count - 1}: what was saved is damaged or was altered, write it anew"
                    )
