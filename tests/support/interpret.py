"""Run a Program's whole graph on one process, node by node: the plainest meaning that a graph can have."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx
from torch.utils._pytree import tree_map

from partitioner.program.program import Program


class _Interpreter(fx.Interpreter):
    def __init__(self, program: Program, lifted: bool) -> None:
        super().__init__(torch.nn.Module(), graph=program.graph)
        self.program = program
        self.lifted = lifted

    def get_attr(self, target: Any, args: Any, kwargs: Any) -> Tensor:
        return self.program.weight_data[target]

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        if self.lifted:
            args, kwargs = tree_map(lambda leaf: torch.float64 if leaf is torch.float32 else leaf, (args, kwargs))
        return super().call_function(target, args, kwargs)


def run(program: Program, *, lifted: bool = False, **given: Tensor) -> Tensor:
    """The output for these inputs; those not given get their defaults. `lifted`: casts to float32 go to float64."""
    shape = given["input_ids"].shape
    makers = {
        "arange": lambda: torch.arange(shape[1]).expand(shape),
        "ones": lambda: torch.ones(shape, dtype=torch.long),
        "zeros": lambda: torch.zeros(shape, dtype=torch.long),
    }
    inputs = [given[i.name] if i.name in given else makers[i.default]() for i in program.inputs]
    unknown = set(given) - {i.name for i in program.inputs}
    assert not unknown, f"the program takes no {unknown}"
    with torch.no_grad():
        result: Tensor = _Interpreter(program, lifted).run(*inputs)
    return result
