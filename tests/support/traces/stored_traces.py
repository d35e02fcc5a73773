"""Traces as files, for the processes of one run of the tests: a worker reads what another one has traced.

    write(path, program)     the graph node by node, and all else of the program
    read(path)               the same program, with a graph of its own
    key(description)         the name of a trace in every process; None where it has none

A folder of traces is made for one run and goes with it (`tests/conftest.py`): what is read was written by the same
code.
"""

from __future__ import annotations

import dataclasses
import hashlib
import inspect
import io
import marshal
import os
import pickle
import re
from pathlib import Path
from typing import Any

import torch
from torch import fx

from partitioner.program.program import Program

__all__ = ["key", "read", "write"]

_ADDRESS = re.compile(r" at 0x[0-9a-f]+")
_MADE_BY_A_TEST = ("<locals>", "<lambda>", "tests.")
"""What an address alone tells from others of its name, wherever one of these is in what Python says of it."""


def key(description: Any) -> str | None:
    """`description`: of strings, numbers, types, functions and tuples of them, equal where traces are the same."""
    text = _text(description)
    return None if text is None else hashlib.sha256(text.encode()).hexdigest()


def _text(value: Any) -> str | None:
    if isinstance(value, tuple):
        parts = [_text(each) for each in value]
        return None if None in parts else f"({', '.join(map(str, parts))})"
    if isinstance(value, type):
        return f"{value.__module__}.{value.__qualname__}"
    if inspect.isfunction(value):
        return _code(value)
    found = repr(value)
    addresses = _ADDRESS.search(found) is not None
    return None if addresses and any(each in found for each in _MADE_BY_A_TEST) else _ADDRESS.sub("", found)


def _code(function: Any) -> str:
    """A function by what it does, and by what it wraps."""
    found = []
    while function is not None:
        digest = hashlib.sha256(marshal.dumps(function.__code__)).hexdigest()
        found.append(f"{function.__module__}.{function.__qualname__} {digest}")
        function = vars(function).get("__wrapped__")
    return " of ".join(found)


def write(path: Path, program: Program) -> None:
    """It is there as a whole or not at all; of two writers, the last one's stays."""
    made = path.with_suffix(f".{os.getpid()}")
    with made.open("wb") as file:
        numbers = dict[fx.Node, int]()
        _Pickler(file, numbers).dump(dataclasses.replace(program, graph=None))  # type: ignore[arg-type]
        for node in program.graph.nodes:
            _Pickler(file, numbers).dump(
                (node.op, node.target, node.name, node.type, node.args, node.kwargs, node.meta)
            )
            numbers[node] = len(numbers)
        _Pickler(file, numbers).dump(None)
    made.replace(path)


def read(path: Path) -> Program:
    graph, nodes = fx.Graph(), list[fx.Node]()
    with io.BytesIO(path.read_bytes()) as file:
        program: Program = _Unpickler(file, nodes).load()
        while (about := _Unpickler(file, nodes).load()) is not None:
            op, target, name, kind, args, kwargs, meta = about
            node = graph.create_node(op, target, args, kwargs, name, kind)
            node.name = name
            node.meta = meta
            nodes.append(node)
    return dataclasses.replace(program, graph=graph)


class _Pickler(pickle.Pickler):
    """Nodes are told by their number, ops of torch by their name."""

    def __init__(self, file: Any, numbers: dict[fx.Node, int]) -> None:
        super().__init__(file, protocol=5)
        self.numbers = numbers

    def persistent_id(self, value: Any) -> Any:
        if isinstance(value, fx.Node):
            return "node", self.numbers[value]
        if isinstance(value, torch._ops.OpOverload):
            return "op", value._schema.name, value._overloadname
        return None


class _Unpickler(pickle.Unpickler):
    def __init__(self, file: Any, nodes: list[fx.Node]) -> None:
        super().__init__(file)
        self.nodes = nodes

    def persistent_load(self, told: Any) -> Any:
        kind, *about = told
        if kind == "node":
            return self.nodes[about[0]]
        (space, name), overload = about[0].split("::"), about[1]
        return getattr(getattr(getattr(torch.ops, space), name), overload)
