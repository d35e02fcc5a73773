"""The proof of rows: in the rewritten graph, too, nothing but attention looks from one token or sequence at another.

    all_reduce, once, shard, all_gather, reorder    each token by itself, along any dim but that of the tokens
    take_rows      x[.., T, ..] -> x[.., T_i, ..]   the tokens are dealt out over axes of the mesh, or anew over others
    collect_rows   x[.., T_i, ..] -> x[.., T, ..]   and come together again, over the same axes
    scatter_rows   x[.., T, ..] -> x[.., T_i, ..]   a sum over axes, of which each rank keeps its own tokens
    cached_attention, latent_attention, last_token  one query per token; one token per sequence
    cached_sequence_attention                       the same; of own tokens, which stay so, or of all, to be merged
    latent_sequence_attention                       likewise
    own_last_token   x[B, T_i, H] -> [B, 1, H]      one token per sequence, from the rank that has it
    localise_experts                                each token's choices by themselves
    limit_experts                                   the same, but that full experts leave some out: the plan says so
    expert_send    hidden [T_i, H] -> [R, H]        rows travel, each with its own token's choices
    expert_return  rows [R, H] -> [T_i, H]          and come back by the way on which they went

It is the proof of `analysis/tokens/token_mixing.py`, about what a pass has made of the traced graph. While tokens are
dealt out over an axis, ranks along it have different ones: a collective over that axis would mix them, and so would an
op with an operand that is dealt out otherwise. A communicating op without a rule here is refused.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal

from torch import fx

from partitioner.analysis.layouts.infer_layout import Layouts
from partitioner.analysis.tokens.token_mixing import BATCH_RULES, SEQUENCE_RULES, TOKENS, Rule, first_mixing
from partitioner.errors import LayoutError
from partitioner.program.node_arguments import arguments
from partitioner.program.program import Program
from partitioner.sharding.layout import REPLICATED, Layout
from runtime.ops.attention import attention
from runtime.ops.cached_attention import cached_attention, last_token
from runtime.ops.collectives import all_gather, all_reduce, landed
from runtime.ops.communicating import COMMUNICATING, axes_text, read_call
from runtime.ops.expert_exchange import expert_return, expert_send, localise_experts
from runtime.ops.experts import limit_experts
from runtime.ops.local import once, reorder, shard
from runtime.ops.rows import collect_rows, scatter_rows, take_rows
from runtime.ops.rows.sequence_attention import cached_sequence_attention
from runtime.ops.rows.share_rows import own_last_token
from runtime.ops.state.latent_attention import latent_attention
from runtime.ops.state.latent_sequence_attention import latent_sequence_attention

__all__ = ["check_rows"]

Dim = Literal["sequence", "batch"]


def check_rows(program: Program) -> None:
    """Raises `LayoutError` at the first node that mixes tokens other than by attention, or sequences at all.

    For programs of which that was proven before they were rewritten.
    """
    whole = _of_the_whole(program)
    dims: tuple[Dim, ...] = ("sequence", "batch")
    for dim in dims:
        if dim in program.symbols:
            proof = _Proof(dim, program.batch_axes)
            found = first_mixing(whole, dim, proof.rules, also=proof.also, picked=(last_token, own_last_token))
            if found is not None:
                raise LayoutError(f"{found}: the rewritten graph may not mix {_PLURAL[dim]} there")


_PLURAL = {"sequence": "tokens", "batch": "sequences"}
_OF_LATENT = ("q", "carried_q", "latent", "carried")


def _of_the_whole(program: Program) -> Program:
    """A copy in which integers that differ between ranks are those of the whole model."""
    copy = program.copy()
    for node in copy.graph.nodes:
        node.args, node.kwargs = program.whole(node.args), program.whole(dict(node.kwargs))
    return replace(copy, table={}, weight_layouts={})


class _Proof:
    """The rules for one question, and over which axes the rows of each value are dealt out."""

    def __init__(self, dim: Dim, batch_axes: tuple[str, ...]) -> None:
        """batch_axes: whose ranks have sequences of their own, from the inputs on."""
        self.dim, self.batch_axes = dim, batch_axes
        self.dealt: dict[fx.Node, tuple[str, ...]] = {}
        # every communicating op is refused but for those that have a rule
        self.rules: dict[Any, Rule] = dict.fromkeys(COMMUNICATING, _unknown)
        self.rules |= SEQUENCE_RULES if dim == "sequence" else BATCH_RULES
        self.rules |= {
            all_reduce: self._all_reduce,
            all_gather: self._along_another_dim,
            collect_rows: self._collect_rows,
            take_rows: self._take_rows,
            scatter_rows: self._scatter_rows,
            localise_experts: self._localise_experts,
            limit_experts: self._localise_experts,
            expert_send: self._expert_send,
            expert_return: self._expert_return,
            landed: _row_by_row,
            once: _row_by_row,
            shard: self._along_another_dim,
            reorder: self._along_another_dim,
        }
        if dim == "sequence":
            self.rules |= {
                cached_attention: _cached_attention,
                latent_attention: _latent_attention,
                cached_sequence_attention: self._cached_sequence,
                latent_sequence_attention: self._cached_sequence,
                last_token: _last_token,
                own_last_token: _last_token,
            }
        else:
            self.rules |= {cached_sequence_attention: _by_sequence, latent_sequence_attention: _latent_by_sequence}

    def _of(self, node: fx.Node) -> tuple[str, ...]:
        """The axes over which rows of `node` are dealt out."""
        return self.batch_axes if node.op == "placeholder" else self.dealt.get(node, ())

    def also(self, node: fx.Node, layouts: Layouts) -> str | None:
        """After any op: its operands have the same rows, and so has its result."""
        if node.target in (take_rows, collect_rows, scatter_rows, expert_send, expert_return):
            return None
        dealt = {self._of(n) for n in node.all_input_nodes if _has_rows(layouts.get(n))}
        if len(dealt) > 1:
            each = " and ".join(sorted(f"over {axes_text(axes)}" if axes else "on every rank" for axes in dealt))
            return f"brings {{what}}s together that ranks have otherwise: {each}"
        axes = dealt.pop() if dealt else ()
        within = self._within(axes)
        if within and node.target in (attention, cached_attention, latent_attention) and node.target in self.rules:
            return f"attends to a rank's own {{what}}s only, which are dealt out over {axes_text(axes)}"
        over_ranks = node.target in (cached_sequence_attention, latent_sequence_attention)
        if within and over_ranks and arguments(node)["how"] == "merge":
            return f"merges what own {{what}}s see, which are dealt out over {axes_text(axes)}"
        if within and node.target is last_token:
            return f"picks one of a rank's own {{what}}s only, which are dealt out over {axes_text(axes)}"
        if axes and _has_rows(layouts.get(node)):
            self.dealt[node] = axes
        return None

    def _within(self, axes: tuple[str, ...]) -> tuple[str, ...]:
        """Over which of the axes the tokens of one sequence are dealt out: of one of its own, a rank has all."""
        return axes[len(self.batch_axes) :] if axes[: len(self.batch_axes)] == self.batch_axes else axes

    # -- rules ---------------------------------------------------------------------------------------------------------

    def _all_reduce(self, node: fx.Node, layouts: Layouts) -> str | None:
        return self._of_other_ranks(node) or _row_by_row(node, layouts)

    def _along_another_dim(self, node: fx.Node, layouts: Layouts) -> str | None:
        """What works along one dim: not along that of the rows."""
        a = arguments(node)
        layout: Layout = layouts[a["x"]]
        if layout.dims[a["dim"]] is not None:
            return "works along the dim of the {what}s"
        return self._of_other_ranks(node) or _row_by_row(node, layouts)

    def _of_other_ranks(self, node: fx.Node) -> str | None:
        if node.target not in COMMUNICATING:
            return None
        call = read_call(node)
        dealt = self._of(call.operands[0])
        if shared := [axis for axis in call.axes if axis in dealt]:
            return f"mixes {{what}}s of different ranks: they are dealt out over {axes_text(tuple(shared))}"
        return None

    def _take_rows(self, node: fx.Node, layouts: Layouts) -> str | None:
        a = arguments(node)
        layout: Layout = layouts[a["x"]]
        layouts[node] = layout
        before = self._of(a["x"])
        along = self._is_along(node, layout, tuple(a["axes"]))
        if along and set(before) & set(a["axes"]):
            return f"deals {{what}}s out that are dealt out over {axes_text(before)} already"
        self._set(node, (*before, *a["axes"]) if along else before)
        return None

    def _collect_rows(self, node: fx.Node, layouts: Layouts) -> str | None:
        a, axes = arguments(node), read_call(node).axes
        layout: Layout = layouts[a["x"]]
        layouts[node] = layout
        before = self._of(a["x"])
        if not self._is_along(node, layout, axes):  # rows of the other question
            self._set(node, before)
            return self._of_other_ranks(node)
        if before[-len(axes) :] != axes:
            how = f"dealt out over {axes_text(before)}" if before else "on every rank"
            return f"collects {{what}}s over {axes_text(axes)}, which are {how}"
        self._set(node, before[: -len(axes)])
        return None

    def _scatter_rows(self, node: fx.Node, layouts: Layouts) -> str | None:
        a, axes = arguments(node), read_call(node).axes
        if problem := self._of_other_ranks(node):
            return problem
        layouts[node] = layouts[a["x"]]
        before = self._of(a["x"])
        self._set(node, (*before, *axes) if self._is_along(node, layouts[node], axes) else before)
        return None

    def _is_along(self, node: fx.Node, layout: Layout, axes: tuple[str, ...]) -> bool:
        """Whether rows are dealt out, or collected, along the dim that is asked about; whole sequences always are."""
        a = arguments(node)
        if axes == self.batch_axes:
            return True
        if self.dim == "batch" and a["outer"] != 1:  # of each sequence its own
            return False
        return layout.dims[a["dim"]] is not None

    def _cached_sequence(self, node: fx.Node, layouts: Layouts) -> str | None:
        a, axes = arguments(node), read_call(node).axes
        wanted = () if a["how"] == "merge" else axes
        names = ("q", "k", "v") if node.target is cached_sequence_attention else _OF_LATENT
        for name in (*names, "positions"):
            if a[name] is not None and (dealt := self._within(self._of(a[name]))) != wanted:
                return (
                    f"shares {{what}}s out over {axes_text(axes)}, and its {name} are dealt out over {dealt or 'none'}"
                )
        attend = _cached_attention if node.target is cached_sequence_attention else _latent_attention
        return attend(node, layouts)

    def _localise_experts(self, node: fx.Node, layouts: Layouts) -> str | None:
        a = arguments(node)
        layouts[node] = (layouts[a["index"]], layouts[a["gates"]])
        return None

    def _expert_send(self, node: fx.Node, layouts: Layouts) -> str | None:
        a = arguments(node)
        sent = [a[name] for name in ("hidden", "index", "gates")]
        tokens = layouts[a["hidden"]].dims[0]
        dealt = {self._of(each) for each in sent}
        if any(layouts[each] != Layout((tokens, None)) for each in sent) or len(dealt) > 1:
            return "sends something other than each {what}'s own choices with it"
        layouts[node] = (*(layouts[each] for each in sent), Layout((tokens,)))
        self._set(node, (f"the experts of {node.name}",))  # nothing may join them but what went with them
        return None

    def _expert_return(self, node: fx.Node, layouts: Layouts) -> str | None:
        a = arguments(node)
        send = a["back"].args[0]
        layouts[node] = layouts[a["rows"]]
        if self._of(a["rows"]) != self._of(send):
            return "sends rows back by another way than that on which they came"
        self._set(node, self._of(arguments(send)["hidden"]))
        return None

    def _set(self, node: fx.Node, axes: tuple[str, ...]) -> None:
        if axes:
            self.dealt[node] = axes


def _has_rows(layout: Any) -> bool:
    each = layout if isinstance(layout, tuple) else (layout,)
    return any(isinstance(one, Layout) and bool(one.split_dims) for one in each)


def _row_by_row(node: fx.Node, layouts: Layouts) -> str | None:
    layouts[node] = layouts[arguments(node)["y" if node.target is once else "x"]]
    return None


def _unknown(node: fx.Node, layouts: Layouts) -> str | None:
    return "communicates, and no rule of `partitioner/proof/rows.py` says what it does with {what}s: add one"


def _cached_attention(node: fx.Node, layouts: Layouts) -> str | None:
    a = arguments(node)
    layouts[node] = per_token = Layout((None, None, TOKENS, None))
    if any(layouts[a[name]] != per_token for name in ("q", "k", "v")):
        return "attends over something other than one row per token"
    return _of_earlier_tokens(a, layouts)


def _latent_attention(node: fx.Node, layouts: Layouts) -> str | None:
    a = arguments(node)
    layouts[node] = per_token = Layout((None, None, TOKENS, None))
    wanted = {"q": per_token, "carried_q": per_token, "latent": Layout((None, TOKENS, None))}
    wanted["carried"] = wanted["latent"]
    if any(a[name] is not None and layouts[a[name]] != layout for name, layout in wanted.items()):
        return "attends over something other than one row per token"
    if layouts[a["key_weight"]].split_dims or layouts[a["value_weight"]].split_dims:
        return "makes keys and values by weights that depend on the {what}s"
    return _of_earlier_tokens(a, layouts)


def _of_earlier_tokens(a: dict[str, Any], layouts: Layouts) -> str | None:
    """Of an attention whose operands have one row per token."""
    if layouts[a["positions"]].dims[1] != TOKENS:
        return "attends over something other than one row per token"
    if not a["causal"]:
        return "is not causal: each token sees those after it"
    for name in ("mask", "sinks"):
        if a[name] is not None and layouts[a[name]].split_dims:
            return f"has {'a bias' if name == 'mask' else 'sinks'} that depends on the tokens"
    return None


def _by_sequence(node: fx.Node, layouts: Layouts) -> str | None:
    """Of the batch: each row by itself, whoever has which of its tokens."""
    a = arguments(node)
    rows = layouts[a["q"]].dims[0]
    others = [layouts[a[name]] for name in ("mask", "sinks") if a[name] is not None]
    alike = all(layouts[a[name]] == Layout((rows, None, None, None)) for name in ("q", "k", "v"))
    if not alike or layouts[a["positions"]].dims != (rows, None):
        return "attends over something other than one row per {what}"
    if any(each.split_dims not in ((), (0,)) for each in others):
        return "has a mask or sinks of other {what}s than its own"
    layouts[node] = Layout((rows, None, None, None))
    return None


def _latent_by_sequence(node: fx.Node, layouts: Layouts) -> str | None:
    a = arguments(node)
    rows = layouts[a["q"]].dims[0]
    wanted = {name: Layout((rows, *[None] * (3 if name in ("q", "carried_q") else 2))) for name in _OF_LATENT}
    if any(a[name] is not None and layouts[a[name]] != layout for name, layout in wanted.items()):
        return "attends over something other than one row per {what}"
    if layouts[a["positions"]].dims != (rows, None):
        return "attends over something other than one row per {what}"
    if layouts[a["key_weight"]].split_dims or layouts[a["value_weight"]].split_dims:
        return "makes keys and values by weights that depend on the {what}s"
    if any(a[name] is not None and layouts[a[name]].split_dims not in ((), (0,)) for name in ("mask", "sinks")):
        return "has a mask or sinks of other {what}s than its own"
    layouts[node] = Layout((rows, None, None, None))
    return None


def _last_token(node: fx.Node, layouts: Layouts) -> str | None:
    if layouts[arguments(node)["x"]] != Layout((None, TOKENS, None)):
        return "picks from something other than one row per token"
    layouts[node] = REPLICATED(3)
    return None
