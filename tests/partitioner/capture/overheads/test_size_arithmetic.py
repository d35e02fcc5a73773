"""Arithmetic on sizes is done once, and gives what it gives when it is done anew."""

from __future__ import annotations

import operator
from typing import Any

import pytest
import torch
from torch.fx.experimental import sym_node
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

from partitioner.capture.overheads import size_arithmetic
from partitioner.capture.overheads.size_arithmetic import asked_once

OPERATIONS: list[Any] = [
    operator.add, operator.sub, operator.mul, operator.floordiv, operator.mod, operator.eq, operator.lt, operator.ge,
    torch.sym_max, torch.sym_min,
]  # fmt: skip


def sizes(environment: ShapeEnv, *values: int) -> list[Any]:
    mode = torch._subclasses.fake_tensor.FakeTensorMode(shape_env=environment)
    context: Any = StatelessSymbolicContext(dynamic_sizes=[DimDynamic.DYNAMIC] * len(values))
    return list(mode.from_tensor(torch.empty(values), symbolic_context=context).shape)


@pytest.fixture
def done(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The operations that torch itself does."""
    found: list[str] = []
    for name in ("add", "mul", "eq", "sym_max"):
        own = vars(sym_node.SymNode)[name]

        def operation(self: Any, other: Any, own: Any = own, name: str = name) -> Any:
            found.append(name)
            return own(self, other)

        monkeypatch.setattr(sym_node.SymNode, name, operation)
    return found


def test_a_question_is_answered_once_for_each_of_its_operands(done: list[str]) -> None:
    first, second = sizes(ShapeEnv(), 5, 7)
    done.clear()
    with asked_once():
        for _ in range(3):
            for given in (first, second):
                assert (given + 2) * first == (given + 2) * first
    assert sorted(set(done)) == ["add", "eq", "mul"]
    assert len(done) == 6
    done.clear()
    assert (first + 2) * first == (first + 2) * first
    assert len(done) == 5


@pytest.mark.parametrize("lacking", ["_hint", "_version_counter"])
def test_a_torch_that_keeps_sizes_in_another_way_does_all_arithmetic_itself(
    done: list[str], monkeypatch: pytest.MonkeyPatch, lacking: str
) -> None:
    first = sizes(ShapeEnv(), 5)[0]
    done.clear()
    size_arithmetic._version_of_equal_sizes.cache_clear()
    monkeypatch.setattr(size_arithmetic, "hasattr", lambda holder, name: not name.endswith(lacking), raising=False)
    with asked_once():
        for _ in range(3):
            assert first + 2 == first + 2
    size_arithmetic._version_of_equal_sizes.cache_clear()
    assert len(done) == 9


@pytest.mark.parametrize("operation", OPERATIONS, ids=lambda each: each.__name__)
def test_answers_are_those_of_torch(operation: Any) -> None:
    """Whole and fractional numbers that are equal, and sizes of another trace, are different operands."""
    environments = ShapeEnv(), ShapeEnv()
    own = [each for environment in environments for each in sizes(environment, 5, 7)]
    given = [(own[0], own[1]), (own[2], own[3]), (own[0], own[0]), (own[0], 1), (own[0], 1.0), (own[0], 5)]

    def answers() -> list[Any]:
        found = [operation(one, other) for one, other in given]
        return [(type(each), str(each), each.node.hint if hasattr(each, "node") else each) for each in found]

    plain = answers()
    with asked_once():
        assert answers() == plain
        assert answers() == plain
        found = [operation(own[i], own[i + 1]) for i in (0, 2)]
    assert [each.node.shape_env for each in found if hasattr(each, "node")] == [
        environment for each, environment in zip(found, environments, strict=True) if hasattr(each, "node")
    ]


def test_sizes_that_are_found_to_be_equal_are_from_then_on() -> None:
    first, second = sizes(ShapeEnv(), 6, 6)
    with asked_once():
        before = first - second
        torch._check(first == second)
        after = first - second
    assert str(after.node._expr) == "0" != str(before.node._expr)


def test_what_is_recorded_computes_the_same() -> None:
    """Of a size that is asked for twice, what was recorded first is used twice."""

    def twice(x: torch.Tensor) -> torch.Tensor:
        return x.new_zeros(x.shape[0] + 1) + x.new_ones(x.shape[0] + 1)

    with asked_once():
        made = make_fx(twice, tracing_mode="symbolic")(torch.empty(5))
    assert made(torch.empty(7)).tolist() == [1] * 8
    assert [node.target for node in made.graph.nodes].count(operator.add) == 1


def test_torch_has_its_own_back() -> None:
    before = dict(vars(sym_node.SymNode))
    with asked_once():
        assert dict(vars(sym_node.SymNode)) != before
    assert dict(vars(sym_node.SymNode)) == before
