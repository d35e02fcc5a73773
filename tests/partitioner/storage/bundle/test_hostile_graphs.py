"""Graphs that were forged, all hashes right: each is refused before anything of it runs.

A canary lies where code would be run from: a folder that must not appear, and functions that must not be called.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import partitioner
from partitioner import BundleError, PartitionerError
from tests.support.bundle_forger import IDS, Forger, use

Nodes = list[dict[str, Any]]


pytestmark = pytest.mark.usefixtures("canary")

CODE = "__import__('os').mkdir('canary')"


def named(nodes: Nodes, op: str) -> dict[str, Any]:
    return next(node for node in nodes if node["op"] == op)


OPS = (
    "os.system", "torch.load", "builtins.eval", "eval", "exec", "aten.from_file.default", "__import__",
    "tensor.__class__",
    "tensor.__reduce__", "tensor.add_", "aten.add_.Tensor", "aten.add.out", "aten.copy_.default",
    "aten.set_.source_Storage",
    "aten.as_strided.default", "aten.__class__.x", "aten.add.__class__", "aten.add._schema", "aten.add", "aten.add.",
    "aten.add.Tensor.x", "aten.nonsense.default", "aten.bernoulli.p", "op.__globals__",
    "op.attention.__code__", "op.Tensor",
    "int.attrgetter", "int.methodcaller", "int.call", "int.setitem", "plugin.nothing", "plugin.",
    "plugin.tensor-parallel",
    "prims.add.default", "torch.ops.load_library", "torch.compile", "", " ", "torch.add\n",
    "torch.add; " + CODE, CODE,
    "Output", "call_function", "get_attr", "placeholder", "input\u0000", "torch.\uff41dd",
)  # fmt: skip


@pytest.mark.parametrize("op", OPS)
def test_an_op_that_is_not_in_the_list(op: str, folder: Path) -> None:
    with Forger(folder).node("torch.mul") as node:
        node["op"] = op
    with pytest.raises(BundleError):
        use(folder)


NAMES = (
    "__import__('os')", "a b", "a;b", "a\nb", "a'b", 'a"b', "x = 1", "class", "lambda", "None", "True",
    "self", "torch",
    "len", "print", "inf", "nan", "device", "", "1a", "a.b", "a-b", "\u00e4", "a" * 300, "forward(",
    "x): " + CODE + " #",
    "input_ids", "#", "\\", "{x}", "%s", "a\u2028b", "__debug__",
)  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_a_name_that_would_be_code(name: str, folder: Path) -> None:
    """Every node after it speaks of it by that name, so that the name alone is wrong."""
    with Forger(folder).nodes() as nodes:
        old = named(nodes, "torch.mul")["name"]
        text = json.dumps(nodes).replace(f'"{old}"', json.dumps(name))
        nodes[:] = json.loads(text)
    with pytest.raises(BundleError):
        use(folder)


@pytest.mark.parametrize(
    "name",
    ["class", "self", "torch", "weight_0", "a.b", "a=" + CODE, "*args", "**kwargs", "x: int", "", "lambda", "other"],
)
def test_a_name_of_an_input_that_would_be_code(name: str, folder: Path) -> None:
    """In the graph and in the description of the rank alike."""
    forger = Forger(folder)
    with forger.nodes() as nodes:
        if name == "other":
            name = named(nodes, "torch.mul")["name"]  # one value would take another's place
        named(nodes, "input")["of"] = name
    for rank in range(2):
        with forger.json(f"ranks/{rank}.json") as data:
            data["programs"]["text"]["inputs"][0]["name"] = name
    with pytest.raises(BundleError):
        partitioner.load(folder).verify()


@pytest.mark.parametrize(
    "name",
    [
        "x'); " + CODE + "; ('", "a..b", ".a", "a.", "", "a b", "a\nb", "__class__", "__class__.__base__.forward",
        "__init__.__globals__.x", "forward", "model.forward.x", "_parameters", "_modules.x", "load_state_dict.x",
        "model.norm", "model.norm.weight.x", "a" * 1500,
    ],
)  # fmt: skip
def test_a_name_of_a_weight_that_would_break_out(name: str, folder: Path) -> None:
    """Everywhere where the weight is spoken of. One that lies within another weight's name would change that."""
    forger = Forger(folder)
    old = "model.layers.0.input_layernorm.weight"
    for rank in range(2):
        with forger.json(f"ranks/{rank}.json") as data:
            next(each for each in data["weights"] if each["name"] == old)["name"] = name
            for program in ("text", "prefill"):
                assert data["programs"][program]["weights"]
    for of in ("text", "prefill"):
        with forger.nodes(of=of) as nodes:
            next(node for node in nodes if node.get("of") == old)["of"] = name
    base = torch.fx.GraphModule.__dict__.get("forward")
    with pytest.raises(BundleError):
        use(folder)
    assert torch.fx.GraphModule.__dict__.get("forward") is base


def edit(**changes: Any) -> Callable[[Nodes], None]:
    """The first multiplication, changed."""

    def change(nodes: Nodes) -> None:
        named(nodes, "torch.mul").update(changes)

    return change


def args(*given: Any) -> Callable[[Nodes], None]:
    return edit(args=list(given))


def deep(levels: int) -> Any:
    found: Any = 1
    for _ in range(levels):
        found = [found]
    return found


def swap(nodes: Nodes) -> None:
    at = next(i for i, node in enumerate(nodes) if node["op"] == "torch.mul")
    nodes[at], nodes[-2] = nodes[-2], nodes[at]


def of_op(op: str, **changes: Any) -> Callable[[Nodes], None]:
    return lambda nodes: named(nodes, op).update(changes)


X = {"node": "input_ids"}
GRAPHS: dict[str, Callable[[Nodes], None]] = {
    "a node that comes later": lambda n: named(n, "torch.mul").update(args=[{"node": n[-2]["name"]}, 1]),
    "a node that is nowhere": args({"node": "nowhere"}, 1),
    "itself": lambda n: named(n, "torch.mul").update(args=[{"node": named(n, "torch.mul")["name"]}, 1]),
    "two nodes in the wrong order": swap,
    "a name twice": lambda n: n[-2].update(name=n[-3]["name"]),
    "no output": lambda n: n.pop(),
    "two outputs": lambda n: n.append(dict(n[-1])),
    "the output in the middle": lambda n: n.insert(5, n.pop()),
    "an output of nothing": lambda n: n[-1].update(args=[]),
    "an output of a number": lambda n: n[-1].update(args=[3]),
    "an output of two": lambda n: n[-1].update(args=n[-1]["args"] * 2),
    "an output with keywords": lambda n: n[-1].update(kwargs={"x": 1}),
    "an input too few": lambda n: n.pop(0),
    "an input too many": lambda n: n.insert(0, {"name": "more", "op": "input", "of": "more"}),
    "an input twice": lambda n: n.insert(1, dict(n[0])),
    "a weight that the rank has not": lambda n: named(n, "weight").update(of="no.such.weight"),
    "a weight that is code": lambda n: named(n, "weight").update(of="x'); " + CODE),
    "a field too many": edit(eval=CODE),
    "no arguments": lambda n: named(n, "torch.mul").pop("args"),
    "arguments that are none": edit(args={"0": X}),
    "keywords that are none": edit(kwargs=[1]),
    "an integer that is not there": args(X, {"local": 10_000}),
    "an integer before the first": args(X, {"local": -1}),
    "an integer that is a truth": args(X, {"local": True}),
    "an integer that is a fraction": args(X, {"local": 0.0}),
    "too deep": args(X, deep(30)),
    "much too deep": args(X, deep(800)),
    "an unknown kind": args(X, {"eval": CODE}),
    "two kinds at once": args(X, {"node": "input_ids", "local": 0}),
    "a kind of nothing": args(X, {}),
    "a dtype that is none": args(X, {"dtype": "float99"}),
    "a dtype that is a list": args(X, {"dtype": ["float32"]}),
    "a dtype that is code": args(X, {"dtype": CODE}),
    "a device": args(X, {"device": "cuda:0"}),
    "a device that is none": args(X, {"device": "meta"}),
    "a float that is none": args(X, {"float": CODE}),
    "a slice of two": args(X, {"slice": [1, 2]}),
    "a complex of texts": args(X, {"complex": ["1", "2"]}),
    "a complex of three": args(X, {"complex": [1.0, 2.0, 3.0]}),
    "an integer of 65 bits": args(X, 2**64),
    "a text too long": args(X, "a" * 20_000),
    "a text with an escape": args(X, "\x1b]0;x\x07"),
    "half a character": args(X, "\ud800"),
    "a keyword that is code": edit(kwargs={"x=" + CODE: 1}),
    "a keyword of Python": edit(kwargs={"class": 1}),
    "out=": edit(kwargs={"out": X}),
    "inplace=": of_op("torch.silu", kwargs={"inplace": True}),
    "an argument too few": args(X),
    "an argument too many": args(X, X, X, X),
    "an argument twice": edit(kwargs={"other": X}),
    "no argument": args(),
    "a method of a text": of_op("tensor.reshape", args=["text", [1]]),
    "a method of a number": of_op("tensor.reshape", args=[5, [1]]),
    "a method of a keyword": of_op("tensor.reshape", args=[], kwargs={"self": X, "shape": [1]}),
    "a text repeated": edit(op="int.mul", args=["a", 2**50]),
    "a text formatted": edit(op="int.mod", args=["%099999999999d", 5]),
    "integers with a keyword": edit(op="int.add", kwargs={"x": 1}),
    "three integers": edit(op="int.add", args=[1, 2, 3]),
    "attention of nothing": of_op("op.attention", args=[]),
    "attention with a keyword": of_op("op.attention", kwargs={"callback": 1}),
    "a reduction over nothing": of_op("op.all_reduce", args=[X]),
    "a path that is a list": edit(path=["x"]),
    "a reason with an escape": edit(why="\x1b[2J"),
    "a name that is a number": edit(name=5),
    "an op that is a list": edit(op=["torch.add"]),
}


@pytest.mark.parametrize("what", GRAPHS)
def test_a_forged_graph(what: str, folder: Path) -> None:
    with Forger(folder).nodes() as nodes:
        GRAPHS[what](nodes)
    with pytest.raises(BundleError):
        use(folder)


RUNS: dict[str, Callable[[Nodes], None]] = {
    "shapes that do not fit": args(X, {"node": "model_embed_tokens_weight"}),
    "a text for a tensor": args(X, "text"),
    "a size beyond memory": edit(op="aten.new_zeros.default", args=[X, [2**50]]),
    "a negative size": edit(op="aten.new_zeros.default", args=[X, [-5]]),
    "an index that is not there": edit(op="aten.select.int", args=[X, 0, 99]),
    "a dim that is not there": edit(op="torch.sum", args=[X, [99]]),
    "an axis that is none": of_op("op.all_reduce", args=[X, "nowhere"]),
    "an axis that is a list": of_op("op.all_reduce", args=[X, ["tp"]]),
    "a sum of no tensor": of_op("op.all_reduce", args=[3, "tp"]),
    "pieces of the wrong size": of_op("op.all_gather", kwargs={"dim": 2, "sizes": [3, 3]}),
    "a dim to gather that is none": of_op("op.all_gather", kwargs={"dim": "x"}),
    "infinity by zero": edit(op="int.floordiv", args=[1, 0]),
    "a method of what is no tensor": lambda n: n.insert(-1, {"name": "last", "op": "tensor.reshape", "args": [
        {"node": named(n, "tensor.size")["name"]}, [1]]}),
}  # fmt: skip


@pytest.mark.parametrize("what", RUNS)
def test_what_only_a_run_shows_is_blamed_on_the_bundle(what: str, folder: Path) -> None:
    with Forger(folder).nodes() as nodes:
        RUNS[what](nodes)
    bundle = partitioner.load(folder)
    with pytest.raises(PartitionerError) as caught:
        bundle.simulate(input_ids=IDS)
    if isinstance(caught.value, BundleError):
        assert f"a program of the bundle {folder} (rank " in str(caught.value)


def test_the_node_is_named(folder: Path) -> None:
    with Forger(folder).node("torch.silu") as node:
        node.update(op="torch.sum", args=[*node["args"], [99]])
    with pytest.raises(BundleError, match=r"run like this at node 'silu_default' of model.layers.0.*IndexError"):
        use(folder)


@pytest.mark.parametrize("state", ["nowhere", "", 5, None, ["x"]])
def test_a_state_that_the_rank_has_not(state: Any, folder: Path) -> None:
    with Forger(folder).node("op.cached_attention", of="prefill") as node:
        node["kwargs"]["state"] = state
    bundle = partitioner.load(folder)
    assert bundle.simulate(input_ids=IDS).isfinite().all()
    with pytest.raises(BundleError):
        bundle.generate(IDS, max_new_tokens=2)
