"""What a plugin's author is offered: rules for ops of their own, weights made of others, the trial of a rule."""

from typing import Any

import pytest
import torch
from torch import Tensor, fx

from partitioner import PlanError
from partitioner.compile.partition import compile_program
from partitioner.errors import LayoutError, WeightError
from partitioner.plugin import (
    Layout,
    Notation,
    Operand,
    Program,
    add_made_weight,
    arguments,
    check_rule,
    drop_unused_weights,
    layout_rule,
    operation,
    weights_named,
)
from partitioner.program.plan import Plan
from tests.support import partitioned

aten = torch.ops.aten


def scaled(x: Tensor, w: Tensor, bias: Tensor | None = None) -> Tensor:
    y = torch.einsum("tk,nk->tn", x, w)
    return y if bias is None else y + bias


def rule_of(outputs: str = "tn", sums: str = "k", terms: Any = ((0, 1), (2,)), whole: str = "") -> Any:
    """An op of its own each time, with this rule; the right one by default."""

    def op(x: Tensor, w: Tensor, bias: Tensor) -> Tensor:
        return scaled(x, w, bias)

    @layout_rule(op)
    def _(node: fx.Node, a: dict[str, Any]) -> Notation:
        operands = (Operand(a["x"], ("t", "k")), Operand(a["w"], ("n", "k")), Operand(a["bias"], ("n",)))
        return Notation(operands, (tuple(outputs),), frozenset(whole), frozenset(sums), tuple(map(frozenset, terms)))

    return op


def operands() -> tuple[Tensor, ...]:
    return tuple(torch.rand(*shape, dtype=torch.float64) for shape in ((3, 4), (5, 4), (5,)))


def test_a_true_rule_is_accepted() -> None:
    rule = check_rule(rule_of(), *operands())
    assert rule.sums == {"k"}
    check_rule(rule_of(sums="", whole="k", terms=()), *operands())  # more careful than it needs to be


@pytest.mark.parametrize(
    ("claims", "message"),
    [
        ({"terms": ((0, 1), (0, 2))}, "differs from the whole result"),  # the bias counts on every rank
        ({"terms": ((0, 1, 2),)}, "differs from the whole result"),  # a product with the bias
        ({"sums": ""}, "does not say what becomes of 'k'"),
        ({"outputs": "nt"}, "its parts put together"),
        ({"sums": "kt"}, "has 't' in output 0 and says that it is summed"),
    ],
    ids=str,
)
def test_a_false_rule_is_found(claims: dict[str, Any], message: str) -> None:
    with pytest.raises(LayoutError, match=message):
        check_rule(rule_of(**claims), *operands())


def test_a_square_that_calls_itself_linear_is_found() -> None:
    def op(x: Tensor) -> Tensor:
        return x**2

    @layout_rule(op)
    def _(node: fx.Node, a: dict[str, Any]) -> Notation:
        return Notation((Operand(a["x"], ("a", "b")),), (("a", "b"),), terms=(frozenset((0,)),))

    with pytest.raises(LayoutError, match="given as a sum, the sum of the results differs"):
        check_rule(op, torch.rand(2, 3, dtype=torch.float64))


def test_a_softmax_that_calls_itself_elementwise_is_found() -> None:
    def op(x: Tensor) -> Tensor:
        return x.softmax(-1)

    @layout_rule(op)
    def _(node: fx.Node, a: dict[str, Any]) -> Notation:
        return Notation((Operand(a["x"], ("a", "b")),), (("a", "b"),))

    with pytest.raises(LayoutError, match="split along 'b', its parts put together differs"):
        check_rule(op, torch.rand(2, 3, dtype=torch.float64))


def test_built_in_rules_hold_by_the_same_trial() -> None:
    x, w, b = torch.rand(2, 3, 4).double(), torch.rand(6, 4).double(), torch.rand(6).double()
    check_rule(aten.linear.default, x, w, b)
    check_rule(aten.softmax.int, x, -1)
    check_rule(aten.mul.Tensor, x, x.clone())
    check_rule(aten.add.Tensor, x, x.clone())
    check_rule(aten.sum.dim_IntList, x, [-1])
    check_rule(aten.rms_norm.default, x, [4], torch.rand(4).double(), 1e-6)


def test_an_op_without_a_rule_is_said_to_be_opaque() -> None:
    def op(x: Tensor) -> Tensor:
        return x

    with pytest.raises(LayoutError, match="has no layout rule"):
        check_rule(op, torch.rand(2, 2))


@pytest.mark.parametrize("op", [aten.linear, aten.linear.default, aten.view.default, aten.clone], ids=str)
def test_an_op_keeps_the_rule_that_it_has(op: Any) -> None:
    with pytest.raises(PlanError, match="has a layout rule already: give yours to an op of your own"):
        layout_rule(op)(lambda node, a: None)
    with pytest.raises(PlanError, match="for functions"):
        layout_rule("linear")


def doubled(weight: Tensor) -> Tensor:
    return weight * 2


def narrowed(weight: Tensor) -> Tensor:
    return weight[:, :-1]


class Replaced:
    """Every linear reads a weight made of its own."""

    name = "replaced"

    def __init__(self, make: Any, *, sliced: bool = True) -> None:
        self.make, self.sliced = make, sliced

    def run(self, program: Program) -> Program:
        for node in list(program.graph.nodes):
            if node.op == "call_function" and operation(node) is aten.linear:
                of = program.weights[arguments(node)["weight"].target]
                layout = program.weight_layouts.get(of.name) if self.sliced else None
                with program.graph.inserting_before(node):
                    new = add_made_weight(
                        program, of, f"{of.name}_made", self.make, shape=of.shape, dtype=of.dtype, layout=layout
                    )
                node.args = (node.args[0], new, *node.args[2:])
        drop_unused_weights(program)
        return program


@pytest.mark.parametrize("tp", [1, 2, 3])
def test_weights_made_of_others(tp: int) -> None:
    ids = partitioned.tokens("llama", 5)
    parts = compile_program(partitioned.traced("llama")[1], Plan(tp=tp, passes=[Replaced(doubled)]))
    plain = partitioned.compiled("llama", tp)
    made = parts.simulate(input_ids=ids)
    assert not torch.allclose(made, plain.simulate(input_ids=ids))
    alone = compile_program(partitioned.traced("llama")[1], Plan(passes=[Replaced(doubled)]))
    assert torch.allclose(made, alone.simulate(input_ids=ids), rtol=1e-10, atol=1e-12)
    assert not [weight.name for weight in parts.rank(0).weights if weight.name.endswith("q_proj.weight")]
    assert parts.report.bytes_whole == plain.report.bytes_whole


def test_a_made_weight_that_is_not_split_as_its_linear_is_refused() -> None:
    plan = Plan(tp=2, passes=[Replaced(doubled, sliced=False)])
    with pytest.raises(
        PlanError, match=r"'replaced' \(.*, in the plan\) leaves a program that does not pass the check"
    ):
        compile_program(partitioned.traced("llama")[1], plan)


def test_what_is_made_must_have_the_shape_that_was_said() -> None:
    parts = compile_program(partitioned.traced("llama")[1], Plan(tp=2, passes=[Replaced(narrowed)]))
    with pytest.raises(
        WeightError, match=r"must be torch.float64 \[64, 64\]; what narrowed makes of '.*' is .* \[64, 63\]"
    ):
        parts.simulate(input_ids=partitioned.tokens("llama", 5))


def test_names_of_weights() -> None:
    program = partitioned.traced("llama")[1].copy()
    every = [name for name in program.weights if name.endswith("_proj.weight")]
    assert len(weights_named(program, ["*.mlp", "*.mlp.up_proj"], among=every)) == 6
    with pytest.raises(PlanError, match="'lm_heat' selects no weight that this pass can take; near it: lm_head"):
        weights_named(program, ["lm_heat"], among=[*every, "lm_head.weight"])
    of = program.weights["lm_head.weight"]
    with pytest.raises(PlanError, match="as if it were inside another weight"):
        add_made_weight(program, of, "lm_head.weight.made", doubled, shape=of.shape, dtype=of.dtype)
    with pytest.raises(PlanError, match="the program has another weight"):
        add_made_weight(program, of, "lm_head.weight", doubled, shape=of.shape, dtype=of.dtype)
    with pytest.raises(PlanError, match="cannot have the layout"):
        add_made_weight(program, of, "made", doubled, shape=of.shape, dtype=of.dtype, layout=Layout((None,)))
