import pytest
import torch

from partitioner import Plan, partition
from partitioner.compile.compare import difference, first_divergence, tolerance
from partitioner.compile.parts import Parts
from partitioner.errors import LayoutError
from partitioner.program.program import Program
from partitioner.sharding.index_set import IndexSet
from partitioner.sharding.layout import Layout, Split
from tests.support import handmade, zoo


def find(program: Program, probes: int = 256, **inputs: torch.Tensor):
    parts = Parts(program, None, traced=handmade.traced())
    return first_divergence(parts, probes=probes, **(inputs or {"input_ids": handmade.input_ids()}))


def node(program: Program, name: str):
    return next(node for node in program.graph.nodes if node.name == name)


@pytest.mark.parametrize("n", [1, 2, 3, 4])
def test_equal_programs_have_no_divergence(n: int) -> None:
    assert find(handmade.partitioned(n)) is None


@pytest.mark.parametrize("probes", [256, 3, 1])
def test_a_missing_all_reduce_is_found_where_its_value_is_used(probes: int) -> None:
    program = handmade.partitioned(2)
    node(program, "reduced").replace_all_uses_with(node(program, "down"))
    found = find(program, probes)
    assert found is not None
    assert (found.node, found.path, found.op) == ("back", "model", "reshape.default")
    assert found.error > 0.01
    assert "node 'back' in model, reshape.default, layout [*, *, *]: relative error" in str(found)


@pytest.mark.parametrize("probes", [256, 2])
def test_swapped_rows_are_found_at_the_linear(probes: int) -> None:
    program = handmade.partitioned(2)
    rows = program.weight_layouts["model.up.weight"].dims[0]
    program.weight_layouts["model.up.weight"] = Layout((Split(rows.axes, rows.owned[::-1]), None))
    found = find(program, probes)
    assert found is not None
    assert found.node == "up"


def test_a_wrong_integer_is_found_at_the_node_that_fails() -> None:
    program = handmade.partitioned(2)
    node(program, "flat").args = (node(program, "up"), [-1, 1, 7])
    found = find(program)
    assert found is not None
    assert found.node == "flat"
    assert "invalid for input of size" in str(found)


def test_what_went_wrong_before_the_failure_comes_first() -> None:
    program = handmade.partitioned(2)
    columns = Split(("tp",), (IndexSet.range(0, 4), IndexSet.range(4, 10)))
    program.weight_layouts["model.up.weight"] = Layout((columns, None))
    found = find(program)
    assert found is not None
    assert found.node == "up"
    assert "shape [2, 3, 4] where the layout says [2, 3, 5]" in str(found)


def test_without_the_traced_program_there_is_nothing_to_compare() -> None:
    with pytest.raises(LayoutError, match="do not hold the traced program"):
        first_divergence(Parts(handmade.partitioned(2), None), input_ids=handmade.input_ids())


@pytest.mark.parametrize("name", ["olmo2", pytest.param("deepseek_v2", marks=pytest.mark.slow)])
def test_rounding_in_bfloat16_is_no_divergence(name: str) -> None:
    """In its own dtypes a sum in another order grows past any limit: it flips the choice of an expert, say."""
    parts = partition(zoo.tiny(name)[0].bfloat16(), Plan(tp=2))
    ids = torch.randint(3, zoo.VOCABULARY, (2, 20), generator=torch.Generator().manual_seed(0))
    assert first_divergence(parts, input_ids=ids) is None
    assert first_divergence(parts, limit=1e-4, input_ids=ids) is not None
    reduction = [node for node in parts.program.graph.nodes if "all_reduce" in str(node.target)][-1]
    reduction.replace_all_uses_with(reduction.args[0])
    found = first_divergence(parts, input_ids=ids)
    assert found is not None
    assert found.node in {user.name for user in reduction.args[0].users}


def test_difference() -> None:
    one = torch.tensor([1.0, 2.0])
    assert difference(one, one) == 0
    assert difference(torch.tensor([1.0, 2.5]), one) == 0.25
    assert difference(torch.ones(1), one) == float("inf")
    assert difference(torch.tensor([1.0, float("nan")]), one) == float("inf")
    masked = torch.tensor([1.0, float("-inf")])
    assert difference(torch.tensor([1.5, float("-inf")]), masked) == 0.5
    assert difference(torch.tensor([True]), torch.tensor([False])) == float("inf")
    assert difference(torch.ones(0), torch.ones(0)) == 0
    assert difference(torch.tensor([1 + 2j]), torch.tensor([1 + 1j])) == pytest.approx(0.5**0.5)
    assert tolerance(torch.float64) < tolerance(torch.float32) < tolerance(torch.bfloat16)
