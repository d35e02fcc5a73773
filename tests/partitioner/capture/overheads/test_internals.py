"""Where a version of torch or transformers lacks what is left out of a trace, the trace is the same without it."""

from __future__ import annotations

import ast
import pkgutil
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental import sym_node
from torch.fx.experimental.proxy_tensor import make_fx

import partitioner
from partitioner.capture.overheads import internals, shapes_once, size_arithmetic, source_lines, unread
from partitioner.capture.overheads.internals import internal

OF_SIZES = [f"_{name}" for name in ("NODE", "SIZES", "PROXY", "RECORDING", "RECORDING_EARLY")]
LOOKED_UP = [
    *((size_arithmetic, name) for name in OF_SIZES),
    *((unread, f"_{name}") for name in ("METADATA", "PACKED", "LAZY_CODE", "GRAD_MODE", "UNWATCHED")),
    *((shapes_once, f"_{name}") for name in ("DISPATCH", "KERNEL", "UNGUARDED", "TORCHS_OWN")),
    (source_lines, "_STACKS"),
]
"""The constants that hold the paths."""
NEEDED = {
    "torch._C._distributed_c10d.FileStore", "torch._C._distributed_c10d.TCPStore", "torch._dynamo.config",
    "torch._ops.HigherOrderOperator", "torch._ops.OpOverload", "torch._subclasses.fake_tensor.FakeTensor",
    "torch._C.DisableTorchFunction", "torch._subclasses.fake_tensor.FakeTensorMode",
    "torch.fx.experimental.proxy_tensor.make_fx", "torch.fx.experimental.symbolic_shapes.ShapeEnv",
    "torch.ops._c10d_functional", "torch.ops.aten._flash_attention_forward",
    "torch.ops.aten._scaled_dot_product_cudnn_attention", "torch.ops.aten._scaled_dot_product_efficient_attention",
    "torch.ops.aten._scaled_dot_product_flash_attention_for_cpu", "torch.utils._python_dispatch.TorchDispatchMode",
    "torch.utils._pytree", "torch.utils._pytree.tree_leaves", "torch.utils._pytree.tree_map",
    "torch.utils._pytree.tree_map_only",
}  # fmt: skip
"""Without these nothing is traced, or run, at all. Each is in every torch that is supported."""
DONE_WITHOUT = {
    "torch._C._cuda_getCurrentRawStream": "runtime/ops/kernels/triton_needs.py",
    "torch._C._distributed_c10d._SymmetricMemory.set_group_info": "runtime/communication/peer_memory/mapped_memory.py",
    "torch._C._distributed_c10d._register_process_group": "runtime/communication/peer_memory/mapped_memory.py",
    "torch.distributed._symmetric_memory": "runtime/communication/peer_memory/mapped_memory.py",
    "torch._grouped_mm": "runtime/ops/experts.py",
}
"""Without these other code does it, which stands where they are used; all else is looked up by `internal`."""


_PRIVATE = re.compile(r"torch.*(\._|\.experimental)")
"""In all text that reads such parts."""


def paths_of(module: Any) -> set[str]:
    """All paths that stand in a module."""
    constants = (each.value for each in ast.walk(ast.parse(Path(module.__file__).read_text())) if _is_text(each))
    return {text for text in constants if text.startswith(("torch.", "transformers.")) and " " not in text}


def _is_text(node: ast.AST) -> Any:
    return isinstance(node, ast.Constant) and isinstance(node.value, str)


def private_parts(source: str) -> set[str]:
    """All that a text reads of torch under a name that is nobody's interface."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Import(names=names):
                found |= {each.name for each in names}
            case ast.ImportFrom(module=str(module), names=names):
                found |= {f"{module}.{each.name}" for each in names}
            case ast.Attribute():
                found.add(ast.unparse(node))
    parts = {each: each.split(".")[1:] for each in found if re.fullmatch(r"torch(\.\w+)+", each)}
    private = {each for each, names in parts.items() if any(_is_private(name) for name in names)}
    return {each for each in private if not any(other.startswith(f"{each}.") for other in private)}


def _is_private(name: str) -> bool:
    return name == "experimental" or (name.startswith("_") and not name.startswith("__"))


def test_nothing_else_of_torchs_own_is_read() -> None:
    root = Path(partitioner.__file__).parents[1]
    for folder in ("partitioner", "passes", "runtime"):
        for path in (root / folder).rglob("*.py"):
            place = path.relative_to(root).as_posix()
            source = path.read_text()
            known = NEEDED | {name for name, where in DONE_WITHOUT.items() if where == place}
            assert not _PRIVATE.search(source) or private_parts(source) <= known, (
                f"{place}: look it up by `internal`, or do without it"
            )


def test_what_is_read_of_torchs_own_is_found() -> None:
    source = (
        "import torch\nfrom torch.fx.experimental import sym_node\ntorch._C.made(torch.fx._lazy.x, torch.nn.Linear)"
    )
    assert private_parts(source) == {"torch.fx.experimental.sym_node", "torch._C.made", "torch.fx._lazy.x"}


class Growing(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            return torch.cat([x + x, x.new_zeros(x.shape[0] + 1)])


def traced() -> list[str]:
    made = make_fx(Growing(), tracing_mode="symbolic")(torch.ones(3))
    assert made(torch.ones(2)).tolist() == [2, 2, 0, 0, 0]
    return [str(node.target) for node in made.graph.nodes if "set_grad" not in str(node.target)]


def test_every_path_is_among_these() -> None:
    assert {vars(module)[name] for module, name in LOOKED_UP} == set.union(
        *(paths_of(module) for module in (shapes_once, size_arithmetic, source_lines, unread))
    )


@pytest.mark.parametrize(("module", "name"), LOOKED_UP, ids=lambda each: str(each).rpartition(".")[2])
def test_a_trace_is_the_same_without(module: Any, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    path = vars(module)[name]
    plain, own, sizes, ops = traced(), internal(path), dict(vars(sym_node.SymNode)), FakeTensorMode.dispatch
    assert own is not None
    resolve = pkgutil.resolve_name

    def without(asked: str) -> Any:
        if asked == path:
            raise AttributeError(asked)
        return resolve(asked)

    monkeypatch.setattr(internals.pkgutil, "resolve_name", without)
    assert internal(path) is None
    with unread.unread_left_out(Growing(), lambda: True), size_arithmetic.asked_once(), shapes_once.shapes_found_once():
        for _ in _opened(source_lines.innermost_lines()):
            assert traced() == plain
            assert resolve(path) is own  # and not one of ours
            assert (dict(vars(sym_node.SymNode)) == sizes) is (module is size_arithmetic)
            assert (FakeTensorMode.dispatch is ops) is (module is shapes_once or name in ("_NODE", "_SIZES"))
    assert resolve(path) is own


def _opened(context: Any) -> Iterator[None]:
    with context:
        yield
