"""From a rank's graph to the function that runs it: weights as leading arguments, collectives bound to a communicator.

    get_attr "model.norm.weight"     -> an argument: no module attributes are looked up while running
    all_reduce(x, "tp")              -> the communicator's own function of x
    device=... in the graph          -> the engine's device

Values are dropped after their last use, as torch.fx's generated code does.
"""

from __future__ import annotations

import inspect
import linecache
import traceback
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

from runtime.communicator import Communicator
from runtime.ops.collectives import COLLECTIVES
from runtime.rank_program import RankProgram

__all__ = ["build_executable", "failing_node"]

# operations that always return memory of their own, which a collective may therefore overwrite
_FRESH = frozenset({"add", "addmm", "baddbmm", "bmm", "embedding", "linear", "matmul", "mm", "mul"})
_FRESH_OWN = frozenset({"vocab_parallel_embedding"})


def build_executable(program: RankProgram, communicator: Communicator, device: torch.device) -> Callable[..., Any]:
    """A function of the weights in the order of `program.weights`, then of the inputs in their order."""
    graph = fx.Graph()
    copied: dict[fx.Node, fx.Node] = {}
    arguments = {weight.name: graph.placeholder(f"weight_{index}") for index, weight in enumerate(program.weights)}
    for node in program.graph.nodes:
        if node.op == "get_attr":
            copied[node] = arguments[str(node.target)]
            continue
        new = copied[node] = graph.node_copy(node, copied.__getitem__)
        if node.op == "call_function":
            assert callable(node.target)
            if node.target in COLLECTIVES:
                _bind(new, node.target, node, communicator)
            else:
                new.args = fx.node.map_aggregate(new.args, lambda leaf: _moved(leaf, device))
                new.kwargs = fx.node.map_aggregate(new.kwargs, lambda leaf: _moved(leaf, device))
    function: Callable[..., Any] = fx.GraphModule({}, graph).forward
    return function


def failing_node(error: BaseException) -> str | None:
    """The name of the node at which an executable raised `error`, read off the generated line; None: somewhere else."""
    found = None
    for frame, line in traceback.walk_tb(error.__traceback__):
        if frame.f_code.co_filename.startswith("<eval_with_key>"):
            found = linecache.getline(frame.f_code.co_filename, line).partition(" = ")[0].strip()
    return found


def _bind(new: fx.Node, op: Callable[..., Tensor], node: fx.Node, communicator: Communicator) -> None:
    given = inspect.signature(op).bind(*new.args, **new.kwargs).arguments
    x, axis = given.pop("x"), given.pop("axis")
    options = {name: list(value) if isinstance(value, (list, tuple)) else value for name, value in given.items()}
    new.target = communicator.bind(op, axis, node=node.name, options=options, overwrite=_is_last_use(node))
    new.args, new.kwargs = (x,), {}


def _is_last_use(node: fx.Node) -> bool:
    source = node.all_input_nodes[0]
    if not callable(source.target) or len(source.users) != 1:
        return False
    name = source.target.__name__.partition(".")[0]
    is_torch = source.target.__module__ is None or source.target.__module__.startswith("torch")
    return name in (_FRESH if is_torch else _FRESH_OWN)


def _moved(leaf: Any, device: torch.device) -> Any:
    return device if isinstance(leaf, torch.device) else leaf
