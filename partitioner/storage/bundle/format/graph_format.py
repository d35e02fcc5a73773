"""Graphs as data: a line of JSON per node, which is also how a graph prints.

    {"name": "linear_3", "op": "torch.linear", "args": [{"node": "mul_7"}, {"node": "weight_4"}], "kwargs": {}, ...}

    ops         "input" NAME, "weight" NAME, "output", and the names of `bundle.ops`
    arguments   null, true, 1, 1.5, "text", lists; {"node": name}, {"local": i}, {"tuple": []}, {"dtype": "float32"},
                {"float": "inf"}, {"complex": [re, im]}, {"slice": []}, {"device": null}, {"memory_format": name}

Graphs that differ in integers only are one: where they differ stands {"local": i}, the i-th of a rank's integers.
Text becomes a graph without anything being imported, evaluated or run; names must be plain identifiers, because
torch.fx writes them into the code that it generates.
"""

from __future__ import annotations

import hashlib
import json
import keyword
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from partitioner.errors import BundleError
from partitioner.storage.bundle.format.call_signature import misfit
from partitioner.storage.bundle.format.op_names import name_of, op_named
from partitioner.storage.bundle.format.untrusted_json import (
    CONTROL,
    DTYPES,
    IDENTIFIER,
    Record,
    dtype_name,
    short,
    whole_number,
)

__all__ = ["Template", "build", "share"]

Data = Any
_DEEPEST, _LONGEST_TEXT = 10, 10_000
_UNKNOWN = object()
_TAKEN = re.compile(r"self|torch|device|inf|nan|NoneType|fx_pytree|pytree|weight_[0-9]+")
"""What the generated code calls by these names: an input of that name would stand in its place."""
_TABLES: dict[str, dict[Any, Any]] = {
    "dtype": dict(DTYPES),
    "device": {None: torch.device("cpu")},
    "float": {text: float(text) for text in ("inf", "-inf", "nan")},
    "layout": {"strided": torch.strided},
    "memory_format": {
        str(kind).removeprefix("torch."): kind for kind in (torch.contiguous_format, torch.preserve_format)
    },
}


@dataclass(frozen=True)
class Template:
    """The text of a graph, with {"local": i} where the ranks that share it differ."""

    text: str

    @property
    def digest(self) -> str:
        return hashlib.sha256(self.text.encode()).hexdigest()


# -- writing -----------------------------------------------------------------------------------------------------------


@dataclass
class _Local:
    """An integer of a graph, in the place where it stands; counted in the order of the graph."""

    index: int


def share(graphs: Sequence[fx.Graph]) -> list[tuple[Template, tuple[int, ...]]]:
    """For each graph its template and its integers; graphs that differ in integers only have the same template."""
    known = {id(graph): _write(graph) for graph in {id(graph): graph for graph in graphs}.values()}
    written = [known[id(graph)] for graph in graphs]
    groups: dict[str, list[int]] = {}
    for index, (nodes, integers) in enumerate(written):
        groups.setdefault(_lines(nodes, [{"local": place} for place in range(len(integers))]), []).append(index)
    found: list[tuple[Template, tuple[int, ...]]] = [(Template(""), ())] * len(graphs)
    for members in groups.values():
        columns = list(zip(*(written[member][1] for member in members), strict=True))
        differing = [place for place, column in enumerate(columns) if len(set(column)) > 1]
        values: list[Data] = [column[0] for column in columns]
        for index, place in enumerate(differing):
            values[place] = {"local": index}
        template = Template(_lines(written[members[0]][0], values))
        for member in members:
            found[member] = template, tuple(written[member][1][place] for place in differing)
    return found


def _lines(nodes: list[Data], integers: Sequence[Data]) -> str:
    """`integers[i]` is what stands for the graph's i-th integer."""

    def line(node: Data) -> str:
        return json.dumps(node, default=lambda leaf: integers[leaf.index], allow_nan=False, ensure_ascii=False)

    return "".join(line(node) + "\n" for node in nodes)


def _write(graph: fx.Graph) -> tuple[list[Data], list[int]]:
    integers: list[int] = []
    return [_node(node, integers) for node in graph.nodes], integers


def _node(node: fx.Node, integers: list[int]) -> Data:
    data: dict[str, Data] = {"name": node.name}
    if node.op == "placeholder":
        data["op"], data["of"] = "input", str(node.target)
    elif node.op == "get_attr":
        data["op"], data["of"] = "weight", str(node.target)
    else:
        data["op"] = "output" if node.op == "output" else name_of(node)
        data["args"] = [_argument(value, node, integers) for value in node.args]
        if node.kwargs:
            data["kwargs"] = {name: _argument(value, node, integers) for name, value in node.kwargs.items()}
    for note in ("path", "why"):
        if node.meta.get(note):
            data[note] = str(node.meta[note])
    return data


def _argument(value: Any, node: fx.Node, integers: list[int]) -> Data:
    if value is None or isinstance(value, (bool, str)):
        return value
    if isinstance(value, int):
        integers.append(int(value))
        return _Local(len(integers) - 1)
    if isinstance(value, float):
        return value if math.isfinite(value) else {"float": str(value)}
    if isinstance(value, complex):
        return {"complex": [value.real, value.imag]}
    if isinstance(value, fx.Node):
        return {"node": value.name}
    if isinstance(value, torch.dtype):
        return {"dtype": dtype_name(value)}
    if isinstance(value, torch.device):
        return {"device": None}  # whoever loads the bundle says which
    if isinstance(value, torch.memory_format):
        return {"memory_format": str(value).removeprefix("torch.")}
    if isinstance(value, torch.layout) and value is torch.strided:
        return {"layout": "strided"}
    if isinstance(value, slice):
        return {"slice": [_argument(end, node, integers) for end in (value.start, value.stop, value.step)]}
    if isinstance(value, (tuple, list)):
        items = [_argument(item, node, integers) for item in value]
        return {"tuple": items} if isinstance(value, tuple) else items
    raise BundleError(f"a bundle cannot hold {value!r} ({type(value).__name__}), an argument of {node.name!r}")


# -- reading -----------------------------------------------------------------------------------------------------------


def build(
    text: bytes, where: str, *, integers: Sequence[int], inputs: Sequence[str], weights: Sequence[str]
) -> fx.Graph:
    """The graph that `text` describes. Raises BundleError where it is anything but known ops on known names.

    `inputs`: the names that the graph must take, in order; `weights`: those that it may read.
    """
    if not text.endswith(b"\n"):
        raise BundleError(f"{where} is cut off")
    reader = _Reader(integers, frozenset(weights))
    *lines, last = text.split(b"\n")[:-1]
    for number, line in enumerate(lines, 1):
        reader.read(Record.parse(line, f"{where}:{number}"))
    reader.end(Record.parse(last, f"{where}:{len(lines) + 1}"))
    taken = [str(node.target) for node in reader.graph.nodes if node.op == "placeholder"]
    if taken != list(inputs):
        raise BundleError(f"{where} takes the inputs {short(taken)}, where {short(list(inputs))} are described")
    return reader.graph


class _Reader:
    """Builds a graph node by node; a node can only name those before it."""

    def __init__(self, integers: Sequence[int], weights: frozenset[str]) -> None:
        self.graph = fx.Graph()
        self.integers, self.weights = integers, weights
        self.nodes: dict[str, fx.Node] = {}
        self.inputs: set[str] = set()
        """Their names as the code takes them, which those of their nodes may differ from."""

    def read(self, record: Record) -> None:
        name = record.text("name", IDENTIFIER)
        if name in self.nodes or name in self.inputs:
            record.fail("name", "a name of its own")
        op = record.text("op")
        if op == "input":
            node = self.graph.create_node("placeholder", self._input(record), name=name)
        elif op == "weight":
            of = record.text("of")
            if of not in self.weights:
                record.fail("of", "a weight that the rank has")
            node = self.graph.create_node("get_attr", of, name=name)
        else:
            node = self._call(op, record, name)
        self._finish(node, name, record)

    def _finish(self, node: fx.Node, name: str, record: Record) -> None:
        if node.name != name or name == "self" or keyword.iskeyword(name):
            # that of a built-in function, say: torch.fx has chosen another
            record.fail("name", "one that torch.fx can give to a node")
        for note in ("path", "why"):
            if record.has(note):
                node.meta[note] = record.text(note)
        record.done()
        self.nodes[name] = node

    def _input(self, record: Record) -> str:
        of = record.text("of", IDENTIFIER)
        if of in self.nodes or of in self.inputs or keyword.iskeyword(of) or _TAKEN.fullmatch(of):
            record.fail("of", "a name of its own, and none that Python or the generated code needs")
        self.inputs.add(of)
        return of

    def _call(self, op: str, record: Record, name: str) -> fx.Node:
        try:
            kind, target = op_named(op)
        except KeyError:
            record.fail("op", "one that a bundle may call")
        args, kwargs = self._arguments(record)
        wrong = misfit(op, target, args, kwargs)
        if wrong is not None:
            raise BundleError(f"{record.where}: {op!r} is not called as it must be: {wrong}")
        return self.graph.create_node(kind, target, args, kwargs, name=name)

    def end(self, record: Record) -> None:
        if record.any("op") != "output":
            record.fail("op", "the output, which ends the graph")
        name = record.text("name", IDENTIFIER)
        args, kwargs = self._arguments(record)
        several = (
            isinstance(args[0], tuple) and args[0] and all(isinstance(arg, fx.Node) for arg in args[0])
            if args
            else False
        )
        if len(args) != 1 or not (several or isinstance(args[0], fx.Node)) or kwargs:
            record.fail("args", "the node that is the result, or a tuple of those that a stage hands on")
        self._finish(self.graph.create_node("output", "output", args, name=name), name, record)

    def _arguments(self, record: Record) -> tuple[tuple[Any, ...], dict[str, Any]]:
        args, kwargs = record.any("args"), record.any("kwargs") if record.has("kwargs") else {}
        if not isinstance(args, list):
            record.fail("args", "a list")
        if not isinstance(kwargs, dict) or not all(map(_is_keyword, kwargs)):
            record.fail("kwargs", "an object with plain names")
        return (
            tuple(self._argument(value, record, 0) for value in args),
            {name: self._argument(value, record, 0) for name, value in kwargs.items()},
        )

    def _argument(self, value: Data, record: Record, depth: int) -> Any:
        if value is None or isinstance(value, (bool, float)):
            return value
        if whole_number(value, low=-(2**63), high=2**63 - 1):
            return value
        if isinstance(value, str) and len(value) <= _LONGEST_TEXT and not CONTROL.search(value):
            return value
        if depth < _DEEPEST:
            if isinstance(value, list):
                return [self._argument(item, record, depth + 1) for item in value]
            if isinstance(value, dict) and len(value) == 1:
                ((kind, content),) = value.items()
                found = self._marked(kind, content, record, depth)
                if found is not _UNKNOWN:
                    return found
        raise BundleError(f"{record.where}: {str(value)[:80]!r} is no argument that a node can have")

    def _marked(self, kind: str, content: Data, record: Record, depth: int) -> Any:
        if kind == "node" and isinstance(content, str):
            if content not in self.nodes:
                raise BundleError(f"{record.where}: no node before it has the name {content[:80]!r}")
            return self.nodes[content]
        if kind == "local" and whole_number(content, high=len(self.integers) - 1):
            return self.integers[content]
        if kind in ("tuple", "slice") and isinstance(content, list):
            items = tuple(self._argument(item, record, depth + 1) for item in content)
            if kind == "tuple":
                return items
            return slice(*items) if len(items) == 3 else _UNKNOWN
        if kind == "complex" and isinstance(content, list) and [type(part) for part in content] == [float, float]:
            return complex(*content)
        table = _TABLES.get(kind)
        return (
            table.get(content, _UNKNOWN) if table is not None and isinstance(content, (str, type(None))) else _UNKNOWN
        )


def _is_keyword(name: str) -> bool:
    return IDENTIFIER.fullmatch(name) is not None and not keyword.iskeyword(name)
