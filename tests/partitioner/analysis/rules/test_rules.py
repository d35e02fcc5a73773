"""Rules tried on numbers: each claim of a rule against the op itself. A new rule is one more line in CASES."""

from collections.abc import Callable
from typing import Any

import pytest
import sympy
import torch
from torch import Tensor, fx

from partitioner.analysis.rules import RULES, along_dims, contractions, elementwise, indexed, notation
from partitioner.analysis.rules.data_movement import IDENTITIES, MOVES
from partitioner.analysis.rules.notation import Notation, Operand, Rules
from partitioner.errors import LayoutError
from partitioner.program.program import Value
from partitioner.proof.try_rule import check_rule
from runtime.ops.attention import attention

aten = torch.ops.aten


def real(*shape: int) -> Tensor:
    return torch.rand(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(sum(shape)))


def whole_numbers(high: int, *shape: int) -> Tensor:
    return torch.randint(high, shape, generator=torch.Generator().manual_seed(high))


# table, op, operands, letters summed, letters needed whole
CASES: list[tuple[Rules, Any, tuple[Any, ...], int, int]] = [
    (elementwise.RULES, aten.add.Tensor, (real(2, 3), real(3)), 0, 0),
    (elementwise.RULES, aten.mul.Tensor, (real(2, 3), real(2, 1)), 0, 0),
    (elementwise.RULES, aten.div.Tensor, (real(2, 3), real(2, 3)), 0, 0),
    (elementwise.RULES, aten.masked_fill.Scalar, (real(2, 3), real(2, 3) > 0.5, 1.0), 0, 0),
    (along_dims.RULES, aten.softmax.int, (real(2, 3), -1), 0, 1),
    (along_dims.RULES, aten.cumsum.default, (real(2, 3), 0), 0, 1),
    (along_dims.RULES, aten.sum.dim_IntList, (real(2, 3, 4), [1]), 1, 0),
    (along_dims.RULES, aten.mean.dim, (real(2, 3, 4), [1]), 1, 0),
    (along_dims.RULES, aten.mean.dim, (real(2, 3, 5), [1, 2], True), 2, 0),
    (along_dims.RULES, aten.amax.default, (real(2, 3, 4), [1, 2]), 0, 2),
    (along_dims.RULES, aten.layer_norm.default, (real(2, 3), [3], real(3), real(3)), 0, 1),
    (along_dims.RULES, aten.rms_norm.default, (real(2, 3), [3], real(3), 1e-6), 0, 1),
    (contractions.RULES, aten.linear.default, (real(2, 3, 4), real(5, 4), real(5)), 1, 0),
    (contractions.RULES, aten.matmul.default, (real(2, 3, 4), real(4, 5)), 1, 0),
    (contractions.RULES, aten.addmm.default, (real(5), real(3, 4), real(4, 5)), 1, 0),
    (indexed.RULES, aten.index_select.default, (real(4, 3), 0, whole_numbers(4, 2)), 0, 1),
    (indexed.RULES, aten.gather.default, (real(2, 4), 1, whole_numbers(4, 2, 3)), 0, 1),
]


@pytest.mark.parametrize(
    ("table", "op", "operands", "num_summed", "num_whole"), CASES, ids=[str(case[1]) for case in CASES]
)
def test_the_op_does_what_its_rule_says(
    table: Rules, op: Any, operands: tuple[Any, ...], num_summed: int, num_whole: int
) -> None:
    assert op.overloadpacket in table
    rule = check_rule(op, *operands)
    assert not rule.opaque
    assert (len(rule.sums), len(rule.whole)) == (num_summed, num_whole)


def node_of(op: Any, *operands: Tensor) -> fx.Node:
    """A node of `op` in a graph of its own."""
    graph = fx.Graph()
    places = [graph.placeholder(f"operand_{i}") for i in range(len(operands))]
    for place, operand in zip(places, operands, strict=True):
        place.meta["val"] = Value(tuple(operand.shape), operand.dtype)
    node = graph.call_function(op, tuple(places))
    result = op(*operands)
    node.meta["val"] = Value(tuple(result.shape), result.dtype)
    return node


@pytest.mark.parametrize("op", [aten.tanh.default, aten.erfinv.default, aten.hypot.default])
def test_an_op_that_is_tagged_pointwise_needs_no_rule(op: Any) -> None:
    assert op.overloadpacket not in RULES
    operands = [real(2, 3) for argument in op._schema.arguments]
    assert not notation(node_of(op, *operands)).opaque
    check_rule(op, *operands)


def test_an_op_without_a_rule_is_opaque() -> None:
    assert aten.kron not in RULES
    found = notation(node_of(aten.kron.default, real(2, 3), real(2, 2)))
    assert found.opaque
    assert len(found.whole) == 4


def test_an_op_that_only_moves_data_stands_in_no_rule_table() -> None:
    assert not (MOVES.keys() | IDENTITIES) & RULES.keys()


@pytest.mark.parametrize(
    ("op", "operands"),
    [
        (aten.linalg_vector_norm.default, (real(2, 3), 2, [1])),
        (aten.layer_norm.default, (real(2, 3), [3], real(3), real(3))),
        (aten.rms_norm.default, (real(2, 3), [3], real(3), 1e-6)),
    ],
)
def test_in_parts_is_what_can_be_decomposed_to_sums(op: Any, operands: tuple[Any, ...]) -> None:
    rule = check_rule(op, *operands)
    assert rule.in_parts == rule.whole == {"1"}


@pytest.mark.parametrize(
    ("op", "operands"),
    [
        (aten.linalg_vector_norm.default, (real(2, 3), 1, [1])),  # of another order
        (aten.rms_norm.default, (real(2, 3), [3], real(3))),  # its eps depends on the dtype
        (aten.softmax.int, (real(2, 3), 1)),
    ],
)
def test_what_cannot_be_decomposed_is_whole(op: Any, operands: tuple[Any, ...]) -> None:
    rule = check_rule(op, *operands)
    assert rule.whole == {"1"}
    assert not rule.in_parts


def addmv(sums: str, terms: tuple[tuple[int, ...], ...]) -> Callable[[fx.Node, dict[str, Any]], Notation]:
    def rule(node: fx.Node, a: dict[str, Any]) -> Notation:
        operands = (Operand(a["mat"], ("m", "k")), Operand(a["vec"], ("k",)), Operand(a["self"], ("m",)))
        return Notation(operands, (("m",),), sums=frozenset(sums), terms=tuple(map(frozenset, terms)))

    return rule


@pytest.mark.parametrize(
    ("rule", "complaint"),
    [
        (addmv("k", ((0, 1), (2,))), None),
        (addmv("", ((0, 1), (2,))), "does not say what becomes of 'k'"),
        (addmv("k", ((0, 1),)), "split along 'k', the sum of its parts differs"),  # the bias counts once per rank
        (addmv("k", ((0, 1, 2),)), "split along 'k', the sum of its parts differs"),
    ],
)
def test_a_wrong_rule_is_found(rule: Any, complaint: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(RULES, aten.addmv, rule)
    if complaint is None:
        check_rule(aten.addmv.default, real(5), real(5, 4), real(4))
        return
    with pytest.raises(LayoutError, match=complaint):
        check_rule(aten.addmv.default, real(5), real(5, 4), real(4))


def last_dim_summed(averages: bool) -> Callable[[fx.Node, dict[str, Any]], Notation]:
    def rule(node: fx.Node, a: dict[str, Any]) -> Notation:
        operands = (Operand(a["self"], ("m", "k")),)
        return Notation(operands, (("m",),), sums=frozenset("k"), terms=(frozenset({0}),), averages=averages)

    return rule


@pytest.mark.parametrize("size", [4, 5])
@pytest.mark.parametrize(("op", "averages"), [(aten.mean, True), (aten.sum, False)])
def test_what_a_rule_says_of_averages_is_tried(
    op: Any, averages: bool, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    overload = op.dim if averages else op.dim_IntList
    monkeypatch.setitem(RULES, op, last_dim_summed(averages))
    check_rule(overload, real(3, size), [1])
    monkeypatch.setitem(RULES, op, last_dim_summed(not averages))
    wrong = "the sum of its parts" if averages else "the average of its parts"
    with pytest.raises(LayoutError, match=f"split along 'k', {wrong} differs"):
        check_rule(overload, real(3, size), [1])


@pytest.mark.parametrize("op", [attention, aten.scaled_dot_product_attention.default])
@pytest.mark.parametrize(("heads", "known"), [(4, True), (sympy.Symbol("batch", integer=True), False)])
def test_attention_over_heads_whose_number_follows_from_the_inputs_has_no_rule(
    op: Any, heads: Any, known: bool
) -> None:
    graph = fx.Graph()
    q, k, v = (graph.placeholder(name) for name in "qkv")
    node = graph.call_function(op, (q, k, v))
    for each in (q, k, v, node):
        each.meta["val"] = Value((1, heads, 5, 8), torch.float64)
    assert notation(node).opaque is not known
