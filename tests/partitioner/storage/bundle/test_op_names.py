"""What a graph in a bundle may call: nothing that writes, nothing that reaches out, and all that is needed."""

from __future__ import annotations

import importlib
import pkgutil

import pytest
import torch

import runtime.ops
from partitioner import BundleError
from partitioner.program.torch_calls import FUNCTIONS, METHODS
from partitioner.storage.bundle.format.op_names import _CALLS, _METHODS, ATEN, name_of, op_named

NOT_IN_GRAPHS = {
    "allowed",
    "arriving",
    "filling",
    "kept_choices",
    "multiplies_at_once",
    "per_query_head",
    "products",
    "receive_from_experts",
    "row_counts",
    "send_to_experts",
    "unbound",
}


def test_every_packet_is_there_and_has_an_overload_that_only_computes() -> None:
    for packet in ATEN:
        overloads = getattr(torch.ops.aten, packet).overloads()
        found = [name for name in overloads if _named(f"aten.{packet}.{name}")]
        assert found, packet
        for name in found:
            schema = getattr(getattr(torch.ops.aten, packet), name)._schema
            assert not schema.is_mutable
            assert not any(str(argument.type) in ("Generator", "Storage", "Stream") for argument in schema.arguments)


def _named(name: str) -> bool:
    try:
        return bool(op_named(name))
    except KeyError:
        return False


@pytest.mark.parametrize("word", ["from_file", "as_strided", "set_", "_reshape_alias", "bernoulli", "rand", "resize_"])
def test_what_reaches_beyond_its_arguments_is_not(word: str) -> None:
    assert word not in ATEN
    assert not any(word in name for name in _CALLS)


def test_names_and_what_they_stand_for() -> None:
    graph = torch.fx.Graph()
    for name, target in _CALLS.items():
        assert op_named(name) == ("call_function", target)
        assert name_of(graph.call_function(target)) == name
    for name, method in _METHODS.items():
        assert op_named(name) == ("call_method", method)
        assert name_of(graph.call_method(method)) == name
    assert len(_METHODS) == len(METHODS)
    assert {_CALLS[f"torch.{op.overloadpacket.__name__}"] for op in FUNCTIONS} == set(FUNCTIONS.values())


def test_all_ops_of_ours_are_in_the_list() -> None:
    for info in pkgutil.iter_modules(runtime.ops.__path__):
        if info.ispkg or info.name == "communicating":
            continue  # what ops are made of on a GPU; the table of ops, and what reads it
        module = importlib.import_module(f"runtime.ops.{info.name}")
        for name in set(module.__all__) - NOT_IN_GRAPHS:
            if not name.isupper():
                assert f"op.{name}" in _CALLS, name


def test_an_op_that_is_not_in_the_list_is_not_written() -> None:
    node = torch.fx.Graph().call_function(torch.ops.aten.add_.Tensor)
    with pytest.raises(BundleError, match=r"cannot hold aten.add_.Tensor \(node 'add__tensor', in the graph\)"):
        name_of(node)
