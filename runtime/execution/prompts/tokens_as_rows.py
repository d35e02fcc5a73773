"""Several tokens at once through a graph for single ones: the tokens of a run become rows of its batch.

    input_ids, position_ids [B, S]       ->  [B * S, 1]: the graph, in which no row looks at another, runs as it is
    cached_attention(q [B, H, 1, D] ..)  ->  of [B, H, S, D], which it makes of the rows and takes apart again
    state_read, state_write, which the token before decides  ->  its value of the token before: all tokens, shifted by 1
    loops over tokens (`token_loops.py`) ->  token by token, over values of all tokens that were made before
    the result [B, 1, V]                 ->  of each sequence's last token

All that is not a loop, products with weights above all, is done for all tokens at once. That the graph is fit for it,
the compiler has proven (`partitioner.analysis.tokens.tokens_as_rows`).
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from runtime.execution.prompts.token_loops import TokenLoop, loops_of, states_of
from runtime.ops.attention import attention
from runtime.ops.cached_attention import cached_attention, last_token
from runtime.ops.collectives import all_gather, all_reduce
from runtime.ops.state import state_read, state_write

__all__ = ["is_size", "of_rows", "tokens_as_rows"]

_IDS, _POSITIONS, _ACTIVE, _LAST = "input_ids", "position_ids", "active", "last"
_PER_TOKEN, _PER_SEQUENCE = (_IDS, _POSITIONS), (_ACTIVE, _LAST)
_SIZES = (torch.ops.aten.sym_size.int,)
_ATTENDED = 3
"""Of an attention over a cache: queries, keys and values come first, then positions."""
_ROW_BY_ROW = {"linear", "add", "sub", "mul", "div", "tanh", "to", "float"}
"""Ops that may stand between the last hidden state and the logits, as `passes/last_token.py` has them."""


def is_size(node: fx.Node) -> bool:
    """Whether a node of a rank's graph yields an integer: a size, or what is computed of sizes."""
    if node.op == "call_method":
        return node.target == "size" and len(node.args) > 1
    if node.op != "call_function":
        return False
    if node.target in _SIZES:
        return True
    module = str(getattr(node.target, "__module__", ""))
    counts = module in ("_operator", "math") and node.target is not operator.getitem
    return counts and bool(node.all_input_nodes) and all(map(is_size, node.all_input_nodes))


def of_rows(graph: fx.Graph) -> set[fx.Node]:
    """The values that differ between rows: all that is made of inputs and states."""
    found = set[fx.Node]()
    for node in graph.nodes:
        is_given = node.op == "placeholder" and node.target in (*_PER_TOKEN, *_PER_SEQUENCE)
        if is_given or (node.op != "output" and any(n in found for n in node.all_input_nodes)):
            found.add(node)
    return found


def tokens_as_rows(graph: fx.Graph, *, whole: Mapping[str, Sequence[int]] | None = None) -> fx.Graph:
    """`graph`, of a rank, for several tokens of each sequence. See the module's docstring.

    whole: the shapes of states, by name, where texts are run from their first token on and nothing is kept.
    """
    return _Rewriting(graph, whole).made()


# -- what stands in the graph that is made -----------------------------------------------------------------------------


def rows_of(x: Tensor) -> Tensor:
    """[B, S] -> [B * S, 1]."""
    return x.reshape(-1, 1)


def by_sequence(rows: Tensor, ids: Tensor) -> Tensor:
    """[B * S, ..] -> [B, S, ..]."""
    return rows.reshape(*ids.shape, *rows.shape[1:])


def tokens_in_row(rows: Tensor, ids: Tensor) -> Tensor:
    """[B * S, H, 1, D] -> [B, H, S, D]."""
    return by_sequence(rows, ids).squeeze(3).transpose(1, 2)


def rows_of_tokens(x: Tensor) -> Tensor:
    """[B, H, S, D] -> [B * S, H, 1, D]."""
    return x.transpose(1, 2).flatten(0, 1)[:, :, None]


def of_token_before(rows: Tensor, first: Tensor, ids: Tensor) -> Tensor:
    """Rows [B * S, ..], first [B, ..] -> what each token's row would be of the token before; `first` of the first."""
    values = by_sequence(rows, ids)
    return torch.cat((first[:, None].to(values.dtype), values[:, :-1]), dim=1).flatten(0, 1)


def of_last_token(rows: Tensor, ids: Tensor) -> Tensor:
    """[B * S, ..] -> [B, ..]."""
    return by_sequence(rows, ids)[:, -1]


def of_last_tokens(rows: Tensor, ids: Tensor, last: Tensor) -> Tensor:
    """[B * S, 1, H], last [B] -> [B, 1, H]."""
    return last_token(by_sequence(rows, ids).squeeze(2), last)


def of_all_tokens(rows: Tensor, ids: Tensor) -> Tensor:
    """[B * S, 1, H] -> [B, S, H]."""
    return by_sequence(rows, ids).squeeze(2)


def of_no_token(ids: Tensor, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """A state before the first token, [B, *shape]."""
    return torch.zeros((ids.shape[0], *shape), dtype=dtype, device=ids.device)


def loop_over_tokens(body: Callable[..., Sequence[Tensor]], states: int) -> Callable[..., tuple[Tensor, ...]]:
    """body(one, *states [B, ..], *values of a token [B, ..], *whole) -> new states, then values of that token.

    one: [B, 1], for sizes. The function made takes the ids [B, S], tuples of states, of rows [B * S, ..] and of what is
    the same for all; it yields the last states [B, ..], then values [B * S, ..].
    """

    def token_loop(
        ids: Tensor, before: Sequence[Tensor], rows: Sequence[Tensor], whole: Sequence[Tensor]
    ) -> tuple[Tensor, ...]:
        one, held = ids[:, :1], tuple(before)
        per_token = zip(*(by_sequence(each, ids).unbind(1) for each in rows), strict=True)
        found = []
        for values in per_token if rows else ((),) * ids.shape[1]:
            yielded = body(one, *held, *values, *whole)
            held = tuple(yielded[:states])
            found.append(yielded[states:])
        stacked = (torch.stack(each, dim=1).flatten(0, 1) for each in zip(*found, strict=True))
        return (*held, *stacked)

    return token_loop


# -- making it ---------------------------------------------------------------------------------------------------------


class _Rewriting:
    def __init__(self, graph: fx.Graph, whole: Mapping[str, Sequence[int]] | None) -> None:
        self._source, self._graph, self._whole = graph, fx.Graph(), whole
        self._rows = of_rows(graph)
        states, loops = states_of(graph), loops_of(graph)
        assert not isinstance(states, str), states
        assert not isinstance(loops, str), loops
        self._loops = {node: loop for loop in loops for node in loop.nodes}
        self._shifts = {read: write for read, write in states.values() if read not in self._loops}
        self._given = {str(node.target): node for node in graph.nodes if node.op == "placeholder"}
        self._found: dict[fx.Node, fx.Node] = {}
        """By node: its rows in the graph that is made; sizes and what is the same for all rows as they are."""
        self._last: dict[fx.Node, fx.Node] = {}
        """By write of a loop: its state after the last token."""
        self._end = _end(graph, self._rows) if whole is None else None

    def made(self) -> fx.Graph:
        inputs = {}
        for node in self._source.nodes:
            if node.op in ("placeholder", "get_attr"):
                inputs[node] = self._found[node] = self._graph.node_copy(node)
        self._ids = inputs[self._given[_IDS]]
        for name in _PER_TOKEN:
            if name in self._given:
                self._found[self._given[name]] = self._graph.call_function(rows_of, (inputs[self._given[name]],))
        self._inputs = inputs
        for node in self._source.nodes:
            self._make_all(node)
        self._graph.lint()
        return self._graph

    def _make_all(self, node: fx.Node) -> None:
        """Makes `node` after all that it needs."""
        waiting = [node]
        while waiting:
            each = waiting[-1]
            ahead = [n for n in self._needs(each) if n not in self._found]
            if each in self._found or not ahead:
                waiting.pop()
                if each not in self._found:
                    self._make(each)
            else:
                waiting += ahead

    def _needs(self, node: fx.Node) -> Iterable[fx.Node]:
        if node in self._loops:
            return [n for n in self._loops[node].given if not is_size(n)]
        if node in self._shifts:
            (value,) = self._shifts[node].args[:1]
            return [value] if isinstance(value, fx.Node) else []
        return node.all_input_nodes

    def _make(self, node: fx.Node) -> None:
        if node in self._loops:
            self._make_loop(self._loops[node])
        elif node in self._shifts:
            first = self._read(node)
            value = self._found[self._shifts[node].args[0]]  # type: ignore[index]
            self._found[node] = self._call(of_token_before, value, first, self._ids)
        elif node.target is state_write:
            value = self._found[node.args[0]]  # type: ignore[index]
            self._write(node, self._call(of_last_token, value, self._ids))
            self._found[node] = value
        elif node.target in (attention, cached_attention):
            self._make_attention(node)
        elif node.op == "output" and self._whole is not None:
            (logits,) = node.all_input_nodes
            self._found[node] = self._graph.output(self._call(of_all_tokens, self._found[logits], self._ids))
        else:
            made = self._graph.node_copy(node, self._found.__getitem__)
            self._found[node] = made
        if node is self._end:
            last = self._inputs[self._given[_LAST]]
            self._found[node] = self._call(of_last_tokens, self._found[node], self._ids, last)

    def _make_attention(self, node: fx.Node) -> None:
        operands = [self._call(tokens_in_row, self._found[x], self._ids) for x in node.args[:_ATTENDED]]  # type: ignore[index]
        positions = () if node.target is attention else (self._inputs[self._given[_POSITIONS]],)
        rest = fx.node.map_arg(node.args[_ATTENDED + len(positions) :], self._found.__getitem__)
        made = self._graph.create_node(
            "call_function", node.target, (*operands, *positions, *rest),
            fx.node.map_arg(node.kwargs, self._found.__getitem__), node.name,
        )  # fmt: skip
        made.meta.update(node.meta)
        self._found[node] = self._call(rows_of_tokens, made)

    def _make_loop(self, loop: TokenLoop) -> None:
        given = [n for n in loop.given if not is_size(n)]
        rows, whole = [n for n in given if n in self._rows], [n for n in given if n not in self._rows]
        body = fx.Graph()
        one = body.placeholder("one")
        inside = dict.fromkeys(self._given.values(), one)  # whose sizes are asked for
        inside |= {node: body.placeholder(node.name) for node in (*loop.reads, *rows, *whole)}

        def copied(node: fx.Node) -> fx.Node:
            if node not in inside:
                assert is_size(node), node
                inside[node] = body.node_copy(node, copied)
            return inside[node]

        for node in loop.body:
            inside[node] = body.node_copy(node, copied)
        handed = loop.handed_on
        last = [copied(write.args[0]) for write in loop.writes]  # type: ignore[arg-type]
        body.output((*last, *(inside[node] for node in handed)))
        run = loop_over_tokens(fx.GraphModule({}, body).forward, len(loop.reads))
        before = tuple(self._read(read) for read in loop.reads)
        operands = (tuple(self._found[n] for n in rows), tuple(self._found[n] for n in whole))
        made = self._call(run, self._ids, before, *operands)
        results = [self._call(operator.getitem, made, i) for i in range(len(last) + len(handed))]
        for write, state in zip(loop.writes, results[: len(last)], strict=True):
            self._write(write, state)
        for node in loop.nodes:
            self._found[node] = self._ids  # of the others, nobody asks
        for node, value in zip(handed, results[len(last) :], strict=True):
            self._found[node] = value

    def _read(self, node: fx.Node) -> fx.Node:
        if self._whole is not None:
            shape: Any = list(self._whole[str(node.kwargs["state"])])
            return self._call(of_no_token, self._ids, shape, node.kwargs["dtype"])
        made = self._graph.create_node("call_function", state_read, (self._ids,), dict(node.kwargs), node.name)
        made.meta.update(node.meta)
        return made

    def _write(self, node: fx.Node, value: fx.Node) -> None:
        if self._whole is not None:
            return
        active = self._inputs[self._given[_ACTIVE]]
        made = self._graph.create_node("call_function", state_write, (value, active), dict(node.kwargs), node.name)
        made.meta.update(node.meta)

    def _call(self, function: Callable[..., Any], *operands: Any) -> fx.Node:
        return self._graph.call_function(function, operands)


def _end(graph: fx.Graph, rows: set[fx.Node]) -> fx.Node:
    """The earliest value from which on each row of the result comes from one row."""
    (node,) = graph.output_node().all_input_nodes
    while node.op in ("call_function", "call_method"):
        name = str(getattr(node.target, "__name__", node.target)).partition(".")[0]
        sources = [n for n in node.all_input_nodes if n in rows]
        if name not in _ROW_BY_ROW and node.target not in (all_reduce, all_gather):
            break
        if len(sources) != 1 or len(sources[0].users) != 1 or node.args[0] is not sources[0] or is_size(sources[0]):
            break
        (node,) = sources
    return node
