"""What is remembered between runs: appending to a cache, reading and writing states, recurrences over tokens."""

from __future__ import annotations

from typing import Any

from torch import fx

from partitioner.analysis.rules.notation import Notation, Operand, Rules, is_tensor, letters, value_of
from runtime.ops.state import (
    cache_append,
    gated_delta_rule,
    gated_linear_attention,
    position_mask,
    rows_at,
    selective_scan,
    state_read,
    state_write,
)

RULES = Rules()


@RULES.of(cache_append)
def _append(node: fx.Node, a: dict[str, Any]) -> Notation:
    names = letters(len(value_of(node).shape))
    batch, tokens = names[0], names[-2]
    appended = tuple("s" if name == tokens else name for name in names)
    operands = (Operand(a["x"], appended), Operand(a["positions"], (batch, "s")), Operand(a["slots"], (tokens,)))
    return Notation(operands, (names,), frozenset(("s", tokens)))


@RULES.of(state_read)
def _read(node: fx.Node, a: dict[str, Any]) -> Notation:
    # how the ranks hold it is the program's to say: see `placement` and `check`
    names = letters(len(value_of(node).shape))
    rows = letters(len(value_of(a["batch"]).shape) - 1, "in")
    return Notation((Operand(a["batch"], (names[0], *rows)),), (names,))


@RULES.of(state_write)
def _write(node: fx.Node, a: dict[str, Any]) -> Notation:
    names = letters(len(value_of(node).shape))
    return Notation((Operand(a["value"], names), Operand(a["active"], names[:1])), (names,))


@RULES.of(position_mask)
def _position_mask(node: fx.Node, a: dict[str, Any]) -> Notation:
    operands = [Operand(a["positions"], ("b", "s")), Operand(a["slots"], ("t",))]
    if is_tensor(a.get("padding")):
        operands.append(Operand(a["padding"], ("b", "t")))
    return Notation(tuple(operands), (("b", "h", "s", "t"),))


@RULES.of(rows_at)
def _rows_at(node: fx.Node, a: dict[str, Any]) -> Notation:
    names = letters(len(value_of(node).shape))
    dim = a["dim"]
    table = (None, *("p" if i == dim else name for i, name in enumerate(names) if i))
    operands = (Operand(a["table"], table), Operand(a["positions"], (names[0], names[dim])))
    return Notation(operands, (names,), frozenset("p"), terms=(frozenset((0,)),))


@RULES.of(gated_linear_attention, gated_delta_rule)
def _gated(node: fx.Node, a: dict[str, Any]) -> Notation:
    """Each sequence, each head and each index of its values by itself; all tokens, and all of a key.

    The delta rule's decay may be one for each index of a key.
    """
    decay = "bshk"[: len(value_of(a["decay"]).shape)]
    given = {"q": "bshk", "k": "bshk", "v": "bshv", "decay": decay, "beta": "bsh", "state": "bhkv"}
    operands = tuple(Operand(a[name], tuple(names)) for name, names in given.items() if is_tensor(a.get(name)))
    return Notation(operands, (tuple("bshv"), tuple("bhkv")), frozenset("sk"))


@RULES.of(selective_scan)
def _selective_scan(node: fx.Node, a: dict[str, Any]) -> Notation:
    """Each sequence and each channel by itself; all tokens, and all that a channel keeps."""
    given = {"x": "bds", "dt": "bds", "a": "dn", "b": "bns", "c": "bns", "state": "bdn"}
    operands = tuple(Operand(a[name], tuple(names)) for name, names in given.items() if is_tensor(a.get(name)))
    return Notation(operands, (tuple("bds"), tuple("bdn")), frozenset("sn"))
