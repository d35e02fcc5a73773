"""A model's code for one token that is right for one sequence only, made right for several while it is traced.

    hidden[1, 1, H] + shifted[1, H]  ->  [1, 1, H]        what the code says of one sequence
    hidden[B, 1, H] + shifted[B, H]  ->  [B, B, H]        what torch makes of B of them: each with all others
                                         [B, 1, H]        what is meant: a row of each by itself

Where tensors of several ranks are combined element by element, those with a row for each sequence are lined up by it,
and the dims that they lack come behind. With one sequence that changes nothing, so the graph says what the code says;
and that no row looks at another is proven of the graph (`partitioner.analysis.tokens.tokens_as_rows`).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import SymInt, Tensor
from torch.overrides import TorchFunctionMode

__all__ = ["RowsApart"]

_ELEMENTWISE = {"add", "sub", "mul", "div", "truediv", "maximum", "minimum", "max", "min", "pow", "where"}


class RowsApart(TorchFunctionMode):
    """Within it, tensors are combined row by row. rows: how many there are, a symbol of the trace."""

    def __init__(self, rows: int | SymInt) -> None:
        super().__init__()
        self._rows = rows

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if _name(func) in _ELEMENTWISE:
            ranks = [arg.dim() for arg in args if isinstance(arg, Tensor)]
            args = tuple(self._lined_up(arg, max(ranks)) if isinstance(arg, Tensor) else arg for arg in args)
        return func(*args, **(kwargs or {}))

    def _lined_up(self, tensor: Tensor, rank: int) -> Tensor:
        if not tensor.dim() or not self._has_rows(tensor.shape[0]):
            return tensor
        for _ in range(rank - tensor.dim()):
            tensor = torch.unsqueeze(tensor, 1)
        return tensor

    def _has_rows(self, size: int | SymInt) -> bool:
        """Compared as expressions: a comparison of numbers would bind the trace to them."""
        if isinstance(size, SymInt) and isinstance(self._rows, SymInt):
            return bool(size.node.expr == self._rows.node.expr)
        return False


def _name(func: Any) -> str:
    name = str(getattr(func, "__name__", "")).strip("_")
    return name[1:] if name[:1] in ("r", "i") and name[1:] in _ELEMENTWISE else name
