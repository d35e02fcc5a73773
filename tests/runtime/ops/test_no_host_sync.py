"""Single tokens come to experts by fixed shapes, and the host reads no number: such a step can be captured.

What runs on the meta device has no numbers: whoever asks for one is told so, `item`, `tolist` and `nonzero` alike.
"""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import Tensor, fx

from partitioner import Plan
from partitioner.compile.partition import compile_program
from runtime.ops import experts
from runtime.ops.cached_attention import cached_attention
from runtime.ops.collectives import all_reduce
from runtime.ops.communicating import COMMUNICATING
from runtime.ops.experts import expert_dispatch, grouped_linear
from runtime.ops.rows import collect_rows, scatter_rows
from tests.support.partitioned import traced

META = torch.device("meta")


class OnMeta(fx.Interpreter):
    """The graph of a rank without data; what others bring has the shape of its own."""

    def __init__(self, program: Any, ranks: int) -> None:
        super().__init__(program.graph_module)
        self.ranks, self.met = ranks, 0

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        if target is cached_attention:
            q, _, v = args[:3]
            return q.new_empty(*q.shape[:3], v.shape[-1])
        if target not in COMMUNICATING:
            return super().call_function(target, args, kwargs)
        self.met += 1
        x = args[0]
        if target is all_reduce:
            return x
        if target is collect_rows:
            assert args[1] == self.ranks * x.shape[kwargs["dim"]]
            return torch.cat([x] * self.ranks, kwargs["dim"])
        if target is scatter_rows:
            return x.narrow(kwargs["dim"], 0, x.shape[kwargs["dim"]] // self.ranks)
        raise AssertionError(f"{target} counts what it sends")


def step(plan: str, ranks: int, *, kind: type[OnMeta] = OnMeta) -> OnMeta:
    program = compile_program(traced("qwen3_moe")[1], Plan.parse(plan)).entry("decode", 0)
    run = kind(program, ranks)
    given = {"input_ids": torch.zeros(3, 1), "position_ids": torch.zeros(3, 1), "last": torch.zeros(3)}
    logits = run.run(*(given[wanted.name].long().to(META) for wanted in program.inputs))
    assert logits.shape[:2] == (3, 1)
    return run


def as_captured(
    rows: Tensor, weight: Tensor, counts: Tensor, bias: Tensor | None = None, *, transposed: bool = False
) -> Tensor:
    return experts._by_every_expert(rows, weight if transposed else weight.transpose(-2, -1), counts, bias)


class Captured(OnMeta):
    """With products as they are where a step is captured and there is no grouped kernel."""

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        return super().call_function(as_captured if target is grouped_linear else target, args, kwargs)


@pytest.mark.parametrize(
    ("plan", "ranks"), [pytest.param("ep=2", 2, marks=pytest.mark.slow), ("tp=2,ep=4", 2), ("tp=2,ep=2", 1)]
)
def test_a_step_reads_no_number(plan: str, ranks: int) -> None:
    assert step(plan, ranks, kind=Captured).met > 0


def test_whoever_reads_one_is_noticed() -> None:
    """The control: products that ask how many rows are whose, rows that are cut to those of somebody, an exchange."""
    with pytest.raises((RuntimeError, NotImplementedError), match="meta"):
        step("ep=2", 2)
    index = torch.zeros(3, 2, dtype=torch.int64, device=META)
    hidden = torch.zeros(3, 4, device=META)
    assert len(expert_dispatch(hidden, index, 2)) == 3
    with pytest.raises((RuntimeError, NotImplementedError), match="meta"):
        expert_dispatch(hidden, index, 2, trim=True)


def test_an_exchange_is_not_for_captured_steps() -> None:
    with pytest.raises(AssertionError, match="counts what it sends"):
        step("ep=2,expert-parallel.exchange=exchange", 2, kind=Captured)


@functools.cache
def case(with_bias: bool) -> tuple[Any, ...]:
    generator = torch.Generator().manual_seed(1)
    rows, weight = (torch.rand(*shape, generator=generator).double() for shape in ((11, 5), (4, 3, 5)))
    bias = torch.rand(4, 3, generator=generator).double() if with_bias else None
    return rows, weight, torch.tensor([3, 0, 6, 1]), bias


@pytest.mark.parametrize("with_bias", [True, False])
def test_products_of_all_rows_with_each_expert_are_the_same(with_bias: bool) -> None:
    """The last row is nobody's."""
    rows, weight, counts, bias = case(with_bias)
    expected = grouped_linear(rows, weight, counts, bias)
    assert not expected[-1].any()
    assert torch.allclose(as_captured(rows, weight, counts, bias), expected, rtol=1e-14, atol=0)
    assert torch.allclose(
        as_captured(rows, weight.transpose(1, 2).contiguous(), counts, bias, transposed=True), expected, rtol=1e-14
    )


def test_compiled_experts_are_one_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where there is no grouped kernel: what is captured later must not be compiled anew then."""
    rows, weight = torch.randn(6, 16, dtype=torch.float64), torch.randn(4, 8, 16, dtype=torch.float64)
    counts = torch.tensor([2, 0, 3, 0])
    expected = grouped_linear(rows, weight, counts)
    compiled = torch.compile(grouped_linear, fullgraph=True, backend="eager")
    with pytest.raises(RuntimeError, match="data-dependent"):  # the control: on a CPU the host reads how many are whose
        compiled(rows, weight, counts)
    monkeypatch.setattr(experts, "_must_not_wait", lambda rows: torch.compiler.is_compiling())
    torch._dynamo.reset()
    found = compiled(rows, weight, counts)
    assert torch.allclose(found, expected, rtol=1e-14, atol=0)
