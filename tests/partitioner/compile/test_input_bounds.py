"""A value that exists in no table is refused, in the same words on every plan; what the model accepts is not."""

import pytest
import torch
from torch import Tensor, fx

from partitioner.compile.tracing.input_bounds import bound_inputs
from partitioner.errors import InputError
from partitioner.program.program import Input, Program, Value, Weight
from partitioner.sharding.mesh import Mesh
from runtime.program.rank_program import Bound
from tests.support import handmade, partitioned, reference, zoo

aten = torch.ops.aten
PLANS = [{"tp": 1}, {"tp": 2}, {"tp": 3, "keep_whole": ("model.embed_tokens",)}]


@pytest.mark.parametrize("plan", PLANS, ids=str)
@pytest.mark.parametrize("wrong", [zoo.VOCABULARY, -1])
def test_a_token_outside_the_vocabulary_is_refused_on_every_plan(plan: dict, wrong: int) -> None:
    parts = partitioned.compiled("llama", **plan)
    ids = torch.tensor([[5, 6], [7, wrong]])
    message = rf"'input_ids' holds {wrong} at \[1, 1\], .* from 0 to 127: .* 128 rows of 'model.embed_tokens.weight'"
    with pytest.raises(InputError, match=message):
        parts.simulate(input_ids=ids)
    assert parts.simulate(input_ids=ids.clamp(0, zoo.VOCABULARY - 1)).isfinite().all()


@pytest.mark.parametrize("tp", [1, 2])
def test_positions_end_with_their_table(tp: int) -> None:
    parts = partitioned.compiled("gpt2", tp)
    ids = partitioned.tokens("gpt2", 257, batch=1)
    assert partitioned.error("gpt2", parts, 256, batch=1) < partitioned.EXACT
    with pytest.raises(InputError, match=r"'input_ids' has sequence 257, .* at most 256: .* 256 rows of .*wpe"):
        parts.simulate(input_ids=ids)
    with pytest.raises(InputError, match=r"'position_ids' holds 256 at \[0, 4\].* from 0 to 255"):
        parts.simulate(input_ids=ids[:, :5], position_ids=torch.arange(252, 257)[None])
    # longer than the table, but with positions that it has
    again = torch.arange(257)[None] % 100
    assert parts.simulate(input_ids=ids, position_ids=again).isfinite().all()


@pytest.mark.parametrize(("name", "longest"), [("masked:roberta", 254), ("mvp", 256)])
def test_positions_that_the_model_counts_by_itself_limit_the_sequence(name: str, longest: int) -> None:
    model, program = partitioned.traced(name)
    assert program.limits == {"sequence": (1, longest)}
    assert any(f"sequence up to {longest}" in note for note in program.notes)
    parts = partitioned.compiled(name, 2)
    assert partitioned.error(name, parts, longest, batch=1) < partitioned.EXACT
    ids = partitioned.tokens(name, longest + 1, batch=1)
    with pytest.raises((IndexError, RuntimeError), match="out of"):
        reference.forward(model, lifted=True, input_ids=ids)
    with pytest.raises(InputError, match=f"compiled for sequence 1 to {longest}"):
        parts.simulate(input_ids=ids)


def bounds(*steps) -> list[Bound | None]:
    """Of one input that goes through `steps` (op, further arguments, shape) into a table of 7 rows."""
    graph, shape = fx.Graph(), (handmade.BATCH, handmade.SEQUENCE)
    value = graph.placeholder("input_ids")
    value.meta["val"] = Value(shape, torch.int64)
    for op, further, shape, dtype in steps:
        value = graph.call_function(op, (value, *further))
        value.meta["val"] = Value(shape, dtype)
    table = graph.create_node("get_attr", "table", name="table")
    table.meta["val"] = Value((7, 4), torch.float64)
    found = graph.call_function(aten.embedding.default, (table, value))
    found.meta["val"] = Value((*shape, 4), torch.float64)
    graph.output(found)
    inputs = (Input("input_ids", Value((handmade.BATCH, handmade.SEQUENCE), torch.int64), "required"),)
    weights = {"table": Weight("table", (7, 4), torch.float64, "checkpoint")}
    symbols = {"batch": handmade.BATCH, "sequence": handmade.SEQUENCE}
    program = Program(graph, inputs, weights, dict[str, Tensor](), symbols, Mesh.of())
    bound_inputs(program)
    return [given.bound for given in program.inputs]


def test_views_casts_and_sums_with_constants_are_followed() -> None:
    b, s, long, int32 = handmade.BATCH, handmade.SEQUENCE, torch.int64, torch.int32
    assert bounds() == [Bound(0, 6, 7, "table")]
    flat = (aten.reshape.default, ([-1],), (b * s,), long)
    cast = (aten.to.dtype, (int32,), (b * s,), int32)
    assert bounds(flat, cast) == [Bound(0, 6, 7, "table")]
    assert bounds((aten.add.Tensor, (2,), (b, s), long)) == [Bound(-2, 4, 7, "table")]
    assert bounds((aten.sub.Tensor, (1,), (b, s), long)) == [Bound(1, 7, 7, "table")]


def test_what_is_not_known_is_not_bounded() -> None:
    b, s, long = handmade.BATCH, handmade.SEQUENCE, torch.int64
    assert bounds((aten.clamp.default, (0, 6), (b, s), long)) == [None]
    assert bounds((aten.remainder.Scalar, (7,), (b, s), long)) == [None]
    assert bounds((aten.slice.Tensor, (1, 0, 1), (b, 1), long)) == [None]
    assert bounds((aten.mul.Tensor, (2,), (b, s), long)) == [None]
