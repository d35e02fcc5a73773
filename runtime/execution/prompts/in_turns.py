"""Two runs of one program in turn: what one of them sums over the ranks is under way while the other computes.

    run A     layer | all_reduce begins     ...waits     | finished; next layer | all_reduce begins
    run B           ...waits      | layer | all_reduce begins    ...waits       | finished; next layer

Every all_reduce of the graph becomes its begin, a `yield`, and its end, so that a run is a generator; the runs take
turns by the host alone, in the same order on every rank, and use one stream. What the second reads of the first, the
keys of earlier tokens say, is there: it comes to every place of the graph after the first has left it. An all_reduce
with a residual and a norm behind it is begun and ended with these, as one (`sum_norms.py`). TokenWeave,
arXiv:2505.11329, section 3, splits a batch of tokens so.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Generator, Sequence
from typing import Any

from torch import Tensor, fx

from runtime.communication.channels import Channel, Handle
from runtime.communication.communicator import Binder
from runtime.execution.prompts.sum_norms import SumNorm, begin_sum_norm, sum_norms
from runtime.ops.collectives import all_reduce
from runtime.ops.communicating import read_call
from runtime.program.rank_program import RankProgram

__all__ = ["InTurns", "can_take_turns", "turns_from"]

_PER_LAUNCH = 33e9
"""Operations that a fast GPU does while its host launches what one node of a graph stands for, in turns: 65 us, as
measured of an 8B decoder on two H200. There halves of 4,096 tokens took twice as long as the whole piece."""


def can_take_turns(program: RankProgram) -> bool:
    """Whether there is anything that a run waits for."""
    reduces = (node for node in program.graph.nodes if node.op == "call_function" and node.target is all_reduce)
    return any(program.mesh.size(*read_call(node).axes) > 1 for node in reduces)


def turns_from(program: RankProgram) -> int:
    """Tokens of a piece from which on a GPU has enough to do in each half while its host launches the other."""
    launched = sum(node.op in ("call_function", "call_method") for node in program.graph.nodes)
    matrices = (weight.local_shape for weight in program.weights if len(weight.local_shape) == 2)
    multiplied = sum(rows * columns for rows, columns in matrices)  # once for a token: not so the stacks of experts
    return math.ceil(launched * _PER_LAUNCH / max(1, multiplied))


class InTurns:
    """`graph` as `bound_graph` has it, whose nodes have the names of those of `program`.

    overwrites: nodes by name whose operand nobody reads afterwards.
    """

    def __init__(
        self,
        program: RankProgram,
        graph: fx.Graph,
        communicator: Binder,
        weights: Sequence[Tensor],
        *,
        overwrites: Callable[[fx.Node], bool],
    ) -> None:
        copy = fx.Graph()
        copy.output(copy.graph_copy(graph, {}))
        bound = {node.name: node for node in copy.nodes}
        reduces = {
            bound[node.name]: node
            for node in program.graph.nodes
            if node.op == "call_function" and node.target is all_reduce
        }
        together = list(sum_norms(copy, reduces, lambda reduce: read_call(reduces[reduce]).axes))
        normed = {each.reduce for each in together}
        for reduce, node in reduces.items():
            if reduce not in normed:
                channel = communicator.channel(read_call(node).axes, node=node.name)
                _divide(reduce, functools.partial(channel.all_reduce_begin, overwrite=overwrites(node)))
        for each in together:
            node = reduces[each.reduce]
            channel = communicator.channel(read_call(node).axes, node=node.name)
            _divide_norm(each, channel, overwrite=overwrites(node))
        copy.on_generate_code(lambda _: _with_yields)
        self._function = functools.partial(fx.GraphModule({}, copy).forward, *weights)

    def __call__(self, several: Sequence[Sequence[Tensor]], resume: Callable[[int], None]) -> list[Any]:
        """The result of each run; `resume(i)` is called whenever the i-th of them goes on."""
        runs: list[Generator[None, None, Any]] = [self._function(*values) for values in several]
        results: list[Any] = [None] * len(runs)
        waiting = list(range(len(runs)))
        while waiting:
            for number in list(waiting):
                resume(number)
                try:
                    next(runs[number])
                except StopIteration as end:
                    results[number] = end.value
                    waiting.remove(number)
        return results


def _divide(node: fx.Node, begin: Callable[[Tensor], Handle]) -> None:
    def begun(x: Tensor) -> Handle:  # generated code calls functions
        return begin(x)

    with node.graph.inserting_before(node):
        handle = node.graph.call_function(begun, node.args)
        node.graph.call_function(others_go_on, ())
    node.target, node.args, node.kwargs = _finished, (handle,), {}


def _divide_norm(each: SumNorm, channel: Channel, *, overwrite: bool) -> None:
    norm, (x, *_) = each.norm, each.reduce.args
    *_, size, weight, eps = norm.args

    def begun(*operands: Any, scales: bool) -> Any:
        return begin_sum_norm(channel, *operands, scales=scales, overwrite=overwrite)

    with norm.graph.inserting_before(norm):
        finish = norm.graph.call_function(begun, (each.residual, x, size, weight, eps), dict(norm.kwargs))
        norm.graph.call_function(others_go_on, ())
    norm.target, norm.args, norm.kwargs = _called, (finish,), {}
    norm.graph.erase_node(each.reduce)


def others_go_on() -> None:
    """Stands in the graph where the generated code yields."""


def _finished(handle: Handle) -> Tensor:
    return handle.finish()


def _called(finish: Callable[[], Any]) -> Any:
    return finish()


def _with_yields(lines: list[str]) -> list[str]:
    return ["yield\n" if others_go_on.__name__ in line else line for line in lines]
