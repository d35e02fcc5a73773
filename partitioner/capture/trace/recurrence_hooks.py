"""Recurrences over tokens that a model's own functions compute, as one op each while it is traced.

    a function of query, key, value, g, beta, chunk_size, initial_state     gated_delta_rule
    a function of hidden_states, dt, A, B, C, chunk_size, initial_states    gated_linear_attention
    a function of hidden_states, dt, A, B, C, return_last_state             selective_scan

transformers lets kernels take the place of such functions, so that they stand beside the modules that call them, with
the parameters of those kernels. A trace would hold for one number of tokens, or of chunks, where they loop in Python;
the op holds for any. A function is recognised by its parameters, and replaced only once it has been run on random
numbers, and yielded what the op yields. What calls it with more than is known here calls the function itself.
"""

from __future__ import annotations

import contextlib
import dis
import functools
import inspect
import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional

from partitioner.capture.trace.transformers_hooks import ONE_CAPTURE_AT_A_TIME
from runtime.ops.state import gated_delta_rule, gated_linear_attention, selective_scan

__all__ = ["OPS", "recurrences_installed", "rename_recurrences"]

_NAMESPACE = "partitioner_recurrences"
_SCHEMAS = {
    "gated_delta_rule": "(Tensor q, Tensor k, Tensor v, Tensor decay, Tensor beta, Tensor? state) -> (Tensor, Tensor)",
    "gated_linear_attention": "(Tensor q, Tensor k, Tensor v, Tensor decay, Tensor? state) -> (Tensor, Tensor)",
    "selective_scan": "(Tensor x, Tensor dt, Tensor a, Tensor b, Tensor c, Tensor? state) -> (Tensor, Tensor)",
}
_library: Any = torch.library.Library(_NAMESPACE, "DEF")  # type: ignore[no-untyped-call]
for _name, _schema in _SCHEMAS.items():
    _library.define(_name + _schema)


def _of_heads(q: Tensor, k: Tensor, v: Tensor, *others: Tensor | None) -> tuple[Tensor, Tensor]:
    dtype = torch.promote_types(q.dtype, torch.float32)
    batch, _, heads, width = q.shape
    state = q.new_empty((batch, heads, width, v.shape[3]), dtype=dtype)
    return q.new_empty((*q.shape[:3], v.shape[3]), dtype=dtype), state


def _of_channels(x: Tensor, dt: Tensor, a: Tensor, *others: Tensor | None) -> tuple[Tensor, Tensor]:
    dtype = torch.promote_types(x.dtype, torch.float32)
    return x.new_empty(x.shape, dtype=dtype), x.new_empty((x.shape[0], *a.shape), dtype=dtype)


_register: Any = torch.library.register_fake
for _name in _SCHEMAS:
    _register(f"{_NAMESPACE}::{_name}", _of_channels if _name == "selective_scan" else _of_heads)

_ops = getattr(torch.ops, _NAMESPACE)
OPS: dict[Any, Callable[..., tuple[Tensor, Tensor]]] = {
    _ops.gated_delta_rule.default: gated_delta_rule,
    _ops.gated_linear_attention.default: gated_linear_attention,
    _ops.selective_scan.default: selective_scan,
}
"""By op of the trace: the function of our runtime that it stands for."""


def rename_recurrences(graph: fx.Graph) -> list[fx.Node]:
    """From ops of the trace to those of our runtime; returns them, the state before the first token as last operand."""
    found = []
    for node in graph.nodes:
        if node.target in OPS:
            operands = len(node.target._schema.arguments)
            node.target, node.args = OPS[node.target], (*node.args, *[None] * (operands - len(node.args)))
            found.append(node)
    return found


Op = Callable[..., tuple[Tensor, Tensor]]


# -- what the functions compute, by the ops, with the parameters of those functions ------------------------------------


def _delta_rule(
    op: Op,
    *,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    g: Tensor,
    beta: Tensor,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    chunk_size: int = 0,
) -> tuple[Tensor, Tensor | None]:
    dtype = query.dtype
    query, key = (_to_heads(x, value.shape[2]).to(torch.float32) for x in (query, key))
    if use_qk_l2norm_in_kernel:
        query, key = (x * torch.rsqrt((x * x).sum(dim=-1, keepdim=True) + 1e-6) for x in (query, key))
    query = query * query.shape[-1] ** -0.5
    value, g, beta = (x.to(torch.float32) for x in (value, g, beta))
    out, state = op(query, key, value, g, beta, initial_state)
    return out.to(dtype), state if output_final_state else None


def _linear_attention(
    op: Op,
    *,
    hidden_states: Tensor,
    dt: Tensor,
    A: Tensor,  # noqa: N803
    B: Tensor,  # noqa: N803
    C: Tensor,  # noqa: N803
    D: Tensor | None = None,  # noqa: N803
    dt_bias: Tensor | None = None,
    initial_states: Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, math.inf),
    return_final_states: bool = False,
    chunk_size: int = 0,
) -> Any:
    if dt_bias is not None:
        dt = dt + dt_bias.to(dt.dtype)
    if dt_softplus:
        dt = functional.softplus(dt)
    dt = torch.clamp(dt, min=dt_limit[0], max=dt_limit[1])
    x = hidden_states.to(torch.float32)
    keys, queries = (_to_heads(each.to(torch.float32), x.shape[2]) for each in (B, C))
    dt = dt.to(torch.float32)
    before = None if initial_states is None else initial_states.to(torch.float32).transpose(2, 3)
    out, state = op(queries, keys, x * dt[..., None], A.to(torch.float32) * dt, before)
    if D is not None:
        out = out + x * D[..., None]
    return (out, state.transpose(2, 3)) if return_final_states else out


def _scan(
    op: Op,
    *,
    hidden_states: Tensor,
    dt: Tensor,
    A: Tensor,  # noqa: N803
    B: Tensor,  # noqa: N803
    C: Tensor,  # noqa: N803
    D: Tensor | None = None,  # noqa: N803
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    return_last_state: bool = False,
    use_mambapy: bool = False,
    use_associative_scan: bool = False,
) -> Any:
    if delta_bias is not None:
        dt = dt + delta_bias.to(dt.dtype)[..., None]
    if delta_softplus:
        dt = functional.softplus(dt)
    out, state = op(hidden_states, dt, A, B, C, None)
    if D is not None:
        out = out + hidden_states * D[None, :, None]
    if z is not None:
        out = out * functional.silu(z)
    return (out, state) if return_last_state else out


def _to_heads(x: Tensor, count: int) -> Tensor:
    """[B, S, G, D] -> [B, S, H, D], each group for as many heads as share it."""
    batch, size, groups, width = x.shape
    if groups == count:
        return x
    return x[:, :, :, None].expand(batch, size, groups, count // groups, width).reshape(batch, size, count, width)


# -- which functions these are -----------------------------------------------------------------------------------------


def _heads_example(draw: Callable[..., Tensor], size: int, *, known: bool) -> dict[str, Any]:
    state = draw(2, 4, 6, 5) if known else None
    given: dict[str, Any] = {"query": draw(2, size, 2, 6), "key": draw(2, size, 2, 6), "value": draw(2, size, 4, 5)}
    given |= {"g": -draw(2, size, 4).abs(), "beta": draw(2, size, 4).sigmoid(), "initial_state": state}
    return given | {"output_final_state": True, "use_qk_l2norm_in_kernel": True, "chunk_size": 8}


def _groups_example(draw: Callable[..., Tensor], size: int, *, known: bool) -> dict[str, Any]:
    given: dict[str, Any] = {"hidden_states": draw(2, size, 4, 5), "dt": draw(2, size, 4), "A": -draw(4).abs()}
    given |= {"B": draw(2, size, 2, 3), "C": draw(2, size, 2, 3), "D": draw(4), "dt_bias": draw(4)}
    given |= {"initial_states": draw(2, 4, 5, 3) if known else None, "dt_softplus": True, "dt_limit": (0.1, 2.0)}
    return given | {"return_final_states": True, "chunk_size": 8}


def _channels_example(draw: Callable[..., Tensor], size: int, *, known: bool) -> dict[str, Any]:
    given: dict[str, Any] = {"hidden_states": draw(2, 4, size), "dt": draw(2, 4, size), "A": -draw(4, 3).abs()}
    given |= {"B": draw(2, 3, size), "C": draw(2, 3, size), "D": draw(4), "z": draw(2, 4, size)}
    return given | {"delta_bias": draw(4), "delta_softplus": True, "return_last_state": True}


def _alike_example(draw: Callable[..., Tensor], size: int, *, known: bool) -> dict[str, Any]:
    """Of as many heads of keys as of values, where the module repeats them."""
    given = _heads_example(draw, size, known=known)
    return given | {name: draw(2, size, 4, 6) for name in ("query", "key")}


def _rows_example(draw: Callable[..., Tensor], size: int, *, known: bool) -> dict[str, Any]:
    """With a decay for each row of the state, of as many heads as there are keys."""
    return _alike_example(draw, size, known=known) | {"g": -draw(2, size, 4, 6).abs()}


@dataclass(frozen=True)
class _Recurrence:
    """op: of the trace. run: what the function computes, by an op. example: what to try it on."""

    op: Any
    run: Callable[..., Any]
    example: Callable[..., dict[str, Any]]

    @property
    def parameters(self) -> set[str]:
        return set(inspect.signature(self.run).parameters) - {"op"}


_RECURRENCES = (
    _Recurrence(_ops.gated_delta_rule.default, _delta_rule, _heads_example),
    _Recurrence(_ops.gated_delta_rule.default, _delta_rule, _alike_example),
    _Recurrence(_ops.gated_delta_rule.default, _delta_rule, _rows_example),
    _Recurrence(_ops.gated_linear_attention.default, _linear_attention, _groups_example),
    _Recurrence(_ops.selective_scan.default, _scan, _channels_example),
)
_LENGTHS = (1, 7, 21)
_CLOSE = 1e-4
"""Of numbers around 1 in float32."""


@functools.cache
def _recognised(function: FunctionType) -> _Recurrence | None:
    """The recurrence that a function computes, tried on numbers; None where it computes another, or none."""
    taken = set(inspect.signature(function).parameters)
    for recurrence in _RECURRENCES:
        if recurrence.parameters <= taken and _computes(function, recurrence):
            return recurrence
    return None


def _computes(function: FunctionType, recurrence: _Recurrence) -> bool:
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    for size in _LENGTHS:
        for known in (False, True):
            given = recurrence.example(draw, size, known=known)
            try:
                with torch.no_grad():
                    found = function(**given)
            except Exception:  # whatever it is, it is another function
                return False
            wanted = recurrence.run(OPS[recurrence.op], **given)
            if not isinstance(found, tuple) or len(found) != len(wanted):
                return False
            for one, other in zip(found, wanted, strict=True):
                if one.shape != other.shape or not torch.allclose(one.float(), other.float(), atol=_CLOSE, rtol=_CLOSE):
                    return False
    return True


@contextlib.contextmanager
def recurrences_installed(model: nn.Module) -> Iterator[None]:
    """Within this context, the functions of the model's own modules that compute a recurrence are ops of the trace."""
    replaced: list[tuple[dict[str, Any], str, FunctionType]] = []
    with ONE_CAPTURE_AT_A_TIME:
        files = [vars(sys.modules[name]) for name in dict.fromkeys(type(each).__module__ for each in model.modules())]
        try:
            for beside in files:
                for name, function in list(beside.items()):
                    found = _recognised(function) if isinstance(function, FunctionType) else None
                    if found is not None:
                        replaced.append((beside, name, function))
                        beside[name] = _by_op(function, found)
            yield
        finally:
            for beside, name, function in replaced:
                beside[name] = function


def _by_op(function: FunctionType, recurrence: _Recurrence) -> Callable[..., Any]:
    signature, known, ignores = inspect.signature(function), recurrence.parameters, _ignores_rest(function)

    def run(*args: Any, **kwargs: Any) -> Any:
        given = dict(signature.bind(*args, **kwargs).arguments)
        rest = given.pop(_rest(signature), {})
        given |= {name: rest.pop(name) for name in known & rest.keys()}
        more = [value for name, value in given.items() if name not in known and value is not None]
        more += [value for value in rest.values() if isinstance(value, Tensor) or not ignores]
        if more:
            return function(*args, **kwargs)
        return recurrence.run(recurrence.op, **{name: value for name, value in given.items() if name in known})

    return run


def _rest(signature: inspect.Signature) -> str:
    """The parameter that takes keywords of any name; "" where there is none."""
    kinds = {parameter.kind: name for name, parameter in signature.parameters.items()}
    return kinds.get(inspect.Parameter.VAR_KEYWORD, "")


def _ignores_rest(function: FunctionType) -> bool:
    """Whether a function's own code never reads the keywords of any name that it takes."""
    inner = inspect.unwrap(function)
    name = _rest(inspect.signature(inner))
    return all(step.argval != name for step in dis.get_instructions(inner))
