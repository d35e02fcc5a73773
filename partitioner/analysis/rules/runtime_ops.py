"""The ops that our own runtime adds: attention, routed experts, the look-up over a split table."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import fx

from partitioner.analysis.rules.contractions import grouped_attention, mask_operand
from partitioner.analysis.rules.notation import Letters, Notation, Operand, Rules, is_tensor, letters, value_of
from partitioner.program.program import PerRankInt
from runtime.ops.attention import attention
from runtime.ops.cached_attention import cached_attention, last_token
from runtime.ops.collectives import landed
from runtime.ops.embedding import vocab_parallel_embedding
from runtime.ops.expert_exchange import expert_return, expert_send, localise_experts
from runtime.ops.experts import expert_combine, expert_dispatch, grouped_linear, limit_experts
from runtime.ops.mask import attention_mask
from runtime.ops.rows.sequence_attention import cached_sequence_attention, sequence_attention
from runtime.ops.rows.share_rows import own_last_token
from runtime.ops.state.latent_attention import latent_attention
from runtime.ops.state.latent_sequence_attention import latent_sequence_attention

RULES = Rules()


@RULES.of(attention, cached_attention)
def _attention(node: fx.Node, a: dict[str, Any]) -> Notation | None:
    kv_map = a.get("kv_map")
    kv_heads = None if isinstance(kv_map, PerRankInt) else kv_map
    return grouped_attention(a["q"], a["k"], a["v"], _extras(node, a), kv_heads)


def _extras(node: fx.Node, a: dict[str, Any]) -> list[Operand]:
    extras = []
    if is_tensor(a.get("mask")):
        extras.append(mask_operand(a["mask"], value_of(node)))
    if is_tensor(a.get("sinks")):
        shape = value_of(a["sinks"]).shape
        heads = value_of(node).shape[1]
        names: Letters = (
            ("h",)
            if len(shape) == 1
            else tuple(n if s == heads and n == "h" else None for n, s in zip("bhst", shape, strict=True))
        )
        extras.append(Operand(a["sinks"], names))
    if is_tensor(a.get("positions")):
        extras.append(Operand(a["positions"], ("b", "s")))
    return extras


@RULES.of(latent_attention)
def _latent_attention(node: fx.Node, a: dict[str, Any]) -> Notation:
    """Each head by itself, with its own products of one narrow value."""
    given = {
        "q": "bhsp", "carried_q": "bhse", "latent": "btr", "carried": "bte", "key_weight": "hpr",
        "value_weight": "hvr",
    }  # fmt: skip
    operands = [Operand(a[name], tuple(names)) for name, names in given.items() if is_tensor(a[name])]
    return Notation((*operands, *_extras(node, a)), (tuple("bhsv"),), frozenset("stperv"))


@RULES.of(latent_sequence_attention)
def _latent_sequence_attention(node: fx.Node, a: dict[str, Any]) -> Notation:
    """The same, with a rank's own tokens along s in queries and in the narrow value."""
    found: Notation = _latent_attention(node, a)  # type: ignore[assignment]
    if a["how"] == "merge":
        return found
    tokens = {a["latent"], a["carried"]}
    operands = tuple(
        replace(each, letters=tuple("s" if name == "t" else name for name in each.letters))
        if each.node in tokens
        else each
        for each in found.operands
    )
    return replace(found, operands=operands, whole=frozenset("tperv"))


@RULES.of(sequence_attention, cached_sequence_attention)
def _sequence_attention(node: fx.Node, a: dict[str, Any]) -> Notation:
    """As attention, with a rank's own tokens along s in queries, keys and values alike; a mask has all keys, and all
    queries (u) where heads are exchanged for tokens. Where parts are merged, every rank has all tokens of the run.
    """
    found: Notation = _attention(node, a)  # type: ignore[assignment]
    if a["how"] == "merge":
        return found
    tokens = {a["k"]: {"t": "s"}, a["v"]: {"t": "s"}, a["mask"]: {"s": "u"} if a["how"] == "ulysses" else {}}
    operands = tuple(
        replace(each, letters=tuple(tokens.get(each.node, {}).get(name or "", name) for name in each.letters))
        for each in found.operands
    )
    return replace(found, operands=operands, whole=frozenset("tude"))


@RULES.of(last_token)
def _last_token(node: fx.Node, a: dict[str, Any]) -> Notation:
    operands = (Operand(a["x"], ("b", "s", "h")), Operand(a["last"], ("b",)))
    return Notation(operands, (("b", "one", "h"),), frozenset("s"), terms=(frozenset((0,)),))


@RULES.of(own_last_token)
def _own_last_token(node: fx.Node, a: dict[str, Any]) -> Notation:
    """The row is on one of the ranks that share out the tokens, zeros are on the others."""
    operands = (Operand(a["x"], ("b", "s", "h")), Operand(a["last"], ("b",)))
    return Notation(operands, (("b", "one", "h"),), sums=frozenset("s"), terms=(frozenset((0,)),))


@RULES.of(attention_mask)
def _attention_mask(node: fx.Node, a: dict[str, Any]) -> Notation:
    return Notation((), (letters(len(value_of(node).shape), "out"),))


@RULES.of(vocab_parallel_embedding)
def _vocab_parallel_embedding(node: fx.Node, a: dict[str, Any]) -> Notation:
    lead = letters(len(value_of(a["ids"]).shape))
    operands = (Operand(a["ids"], lead), Operand(a["weight"], ("v", "h")))
    return Notation(operands, ((*lead, "h"),), sums=frozenset("v"), terms=(frozenset((1,)),))


@RULES.of(expert_dispatch)
def _expert_dispatch(node: fx.Node, a: dict[str, Any]) -> Notation:
    """Rows are tokens in another order: only the hidden dim runs through."""
    operands = (Operand(a["hidden"], ("t", "h")), Operand(a["index"], ("u", "k")))
    return Notation(operands, (("rows", "h"), ("order",), ("experts",)), frozenset("tuk"), terms=(frozenset((0,)),))


@RULES.of(grouped_linear)
def _grouped_linear(node: fx.Node, a: dict[str, Any]) -> Notation:
    weight: Letters = ("e", "k", "n") if a.get("transposed") else ("e", "n", "k")
    operands = [Operand(a["rows"], ("t", "k")), Operand(a["weight"], weight), Operand(a["counts"], ("e",))]
    terms = [frozenset((0, 1))]
    if is_tensor(a.get("bias")):
        operands.append(Operand(a["bias"], ("e", "n")))
        terms.append(frozenset((3,)))
    return Notation(tuple(operands), (("t", "n"),), frozenset("e"), frozenset("k"), tuple(terms))


@RULES.of(expert_combine)
def _expert_combine(node: fx.Node, a: dict[str, Any]) -> Notation:
    operands = (Operand(a["rows"], ("r", "h")), Operand(a["order"], ("r",)), Operand(a["gates"], ("t", "k")))
    return Notation(operands, (("t", "h"),), frozenset("rk"), terms=(frozenset((0, 2)),))


@RULES.of(localise_experts)
def _localise_experts(node: fx.Node, a: dict[str, Any]) -> Notation:
    operands = (Operand(a["index"], ("t", "k")), Operand(a["gates"], ("t", "k")))
    return Notation(operands, (("t", "k"), ("t", "k")), frozenset("k"))


@RULES.of(limit_experts)
def _limit_experts(node: fx.Node, a: dict[str, Any]) -> Notation:
    """All tokens that a rank has count for one another."""
    operands = (Operand(a["index"], ("t", "k")), Operand(a["gates"], ("t", "k")))
    return Notation(operands, (("t", "k"), ("t", "k")), frozenset("tk"))


@RULES.of(expert_send)
def _expert_send(node: fx.Node, a: dict[str, Any]) -> Notation:
    operands = (
        Operand(a["hidden"], ("t", "h")),
        Operand(a["index"], ("t", "k")),
        Operand(a["gates"], ("t", "k")),
    )
    outputs = (("t", "h"), ("t", "k"), ("t", "k"), ("t",))
    return Notation(operands, outputs, frozenset("thk"))


@RULES.of(landed)
def _landed(node: fx.Node, a: dict[str, Any]) -> Notation:
    names = letters(len(value_of(node).shape))
    return Notation((Operand(a["x"], names),), (names,), terms=(frozenset((0,)),))


@RULES.of(expert_return)
def _expert_return(node: fx.Node, a: dict[str, Any]) -> Notation:
    operands = (Operand(a["rows"], ("t", "h")), Operand(a["back"], ("t",)))
    return Notation(operands, (("t", "h"),), frozenset("t"), terms=(frozenset((0,)),))
