"""The cost of real models against torch's own counter on their own forward, and over ranks against the whole."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from partitioner import Plan
from partitioner.analysis.cost.program_cost import ProgramCost, program_cost
from partitioner.compile.generation import compile_steps
from partitioner.program.program import Program
from tests.support import partitioned, stepping, zoo

BATCH, LENGTH = 2, 7
SIZES = {"batch": BATCH, "sequence": LENGTH}
TOKENS = BATCH * LENGTH
LAYERS, HIDDEN, FFN, HEADS, HEAD_DIM = zoo.LAYERS, zoo.HIDDEN, zoo.FFN, zoo.HEADS, zoo.HEAD_DIM
ITEM = 8  # bytes of float64


@contextmanager
def written_out(model: Any) -> Iterator[None]:
    """Attention as two products, and experts one by one: what torch's counter knows in float64 on this device."""
    config = model.config
    before = config._attn_implementation, config._experts_implementation
    model.set_attn_implementation("eager")
    model.set_experts_implementation("eager")
    try:
        yield
    finally:
        model.set_attn_implementation(before[0])
        model.set_experts_implementation(before[1])


def counted(model: Any, **inputs: Any) -> int:
    """But for rotary angles, which transformers 5.17 makes by a matmul that sums nothing."""
    with written_out(model), FlopCounterMode(display=False) as counter, torch.no_grad():
        model(**inputs)
    angles = [ops for path, ops in counter.get_flop_counts().items() if path.endswith(".rotary_emb")]
    return counter.get_total_flops() - sum(flops for ops in angles for flops in ops.values())


def decoding(name: str, tp: int = 1) -> Program:
    return compile_steps(stepping.traced(name)[1], Plan(tp=tp))[1]


def flops_of(cost: ProgramCost, op: str) -> int:
    return sum(node.flops for node in cost.nodes if node.op == op)


def all_pairs(queries: int, keys: int) -> int:
    """Attention of all layers as torch counts it: every query with every key."""
    return LAYERS * 2 * BATCH * HEADS * queries * keys * 2 * HEAD_DIM


@pytest.mark.parametrize("name", [pytest.param("llama", marks=pytest.mark.slow), "gpt2", "mixtral"])
def test_products_of_a_text_are_those_that_torch_counts(name: str) -> None:
    """But for attention: of a causal text the pairs up to the diagonal, (s + 1) / 2s of what torch counts."""
    model, program = partitioned.traced(name)
    cost = program_cost(program, {}, SIZES)
    expected = counted(model, input_ids=partitioned.tokens(name, LENGTH))
    full = all_pairs(LENGTH, LENGTH)
    assert cost.flops - flops_of(cost, "attention") == expected - full
    assert flops_of(cost, "attention") * 2 * LENGTH == full * (LENGTH + 1)
    assert not cost.unsure
    longer = program_cost(program, {}, {**SIZES, "sequence": LENGTH + 1})
    assert longer.flops != cost.flops


@pytest.mark.parametrize(
    "name", [*(pytest.param(name, marks=pytest.mark.slow) for name in ("llama", "gpt2")), "mixtral"]
)
def test_products_of_one_token_after_a_cache_are_those_that_torch_counts(name: str) -> None:
    model, program = stepping.traced(name)[0], decoding(name)
    ids = partitioned.tokens(name, LENGTH)
    with written_out(model), torch.no_grad():
        past = model(input_ids=ids, use_cache=True).past_key_values
    expected = counted(model, input_ids=ids[:, :1], past_key_values=past)
    cost = program_cost(program, {}, {"batch": BATCH, "sequence": 1, "past": LENGTH})
    assert cost.flops == expected
    assert flops_of(cost, "cached_attention") == all_pairs(1, LENGTH + 1)


def test_a_decoded_token_reads_every_weight_once_and_the_cache() -> None:
    program = decoding("llama")
    near, far = (program_cost(program, {}, {"batch": BATCH, "sequence": 1, "past": past}) for past in (10, 110))
    assert far.bytes_read - near.bytes_read == LAYERS * BATCH * 100 * 2 * zoo.KV_HEADS * HEAD_DIM * ITEM
    linears = sum(node.bytes_read for node in near.nodes if node.op == "linear")
    matrices = sum(w.bytes for w in program.weights.values() if len(w.shape) == 2 and "embed" not in w.name)
    per_layer = 3 * HIDDEN + HEADS * HEAD_DIM + 2 * HIDDEN + FFN  # what the seven linears of a layer take
    assert linears - matrices == BATCH * (LAYERS * per_layer + HIDDEN) * ITEM


def test_experts_work_on_the_rows_that_are_routed_to_them() -> None:
    _, program = partitioned.traced("mixtral")
    top_k = 2
    for batch, experts_read in ((1, 2), (BATCH, 4)):
        cost = program_cost(program, {}, {"batch": batch, "sequence": 1})
        rows = top_k * batch
        nodes = [node for node in cost.nodes if node.op == "grouped_linear"]
        assert sum(node.flops for node in nodes) == LAYERS * 2 * rows * 3 * HIDDEN * FFN
        first = nodes[0]  # gate and up in one; of the weights no more experts than rows
        counts = zoo.EXPERTS * 8
        assert first.bytes_read == experts_read * HIDDEN * 2 * FFN * ITEM + rows * HIDDEN * ITEM + counts
        assert first.bytes_written == rows * 2 * FFN * ITEM


def of_ranks(program: Program, sizes: dict[str, int] = SIZES) -> list[ProgramCost]:
    return [program_cost(program, coordinates, sizes) for coordinates in program.mesh]


@pytest.mark.parametrize(
    ("name", "tp", "twice"),
    [
        ("llama", 2, 0),
        # 2 kv heads over 3 ranks: two of them compute the same keys and values
        ("llama", 3, LAYERS * 2 * (2 * TOKENS * HIDDEN * HEAD_DIM)),
        # every rank chooses the experts
        ("mixtral", 2, LAYERS * 2 * TOKENS * HIDDEN * zoo.EXPERTS),
    ],
)
def test_ranks_together_do_the_products_of_one_and_what_is_replicated_again(name: str, tp: int, twice: int) -> None:
    whole = program_cost(partitioned.traced(name)[1], {}, SIZES).flops
    ranks = of_ranks(partitioned.compiled(name, tp).program)
    assert sum(cost.flops for cost in ranks) == whole + twice
    assert not any(cost.unsure for cost in ranks)


def test_without_a_split_every_rank_does_it_all() -> None:
    """The negative control of the sums over ranks."""
    whole = partitioned.traced("llama")[1]
    program = partitioned.compiled("llama", 2, keep_whole=["*"]).program
    assert [cost.flops for cost in of_ranks(program)] == [program_cost(whole, {}, SIZES).flops] * 2


def test_all_reduces_carry_the_hidden_state_of_every_token() -> None:
    (cost, _) = of_ranks(partitioned.compiled("llama", 2).program)
    reduces = [meeting for node in cost.nodes for meeting in node.meetings if meeting.kind == "all_reduce"]
    assert [meeting.bytes for meeting in reduces] == [TOKENS * HIDDEN * ITEM] * (1 + 2 * LAYERS)
    assert all(meeting.ranks == (0, 1) for meeting in reduces)
    layers = cost.per_layer()
    assert layers["model.layers.0"].meeting_bytes == 2 * TOKENS * HIDDEN * ITEM
    assert sum(layer.flops for layer in layers.values()) == cost.flops
    assert layers["model.layers.0"].flops == layers["model.layers.1"].flops > 0


def test_a_decoded_token_at_two_ranks() -> None:
    sizes = {"batch": BATCH, "sequence": 1, "past": LENGTH}
    ranks = of_ranks(decoding("llama", 2), sizes)
    assert sum(cost.flops for cost in ranks) == program_cost(decoding("llama"), {}, sizes).flops
    reduces = [m.bytes for node in ranks[0].nodes for m in node.meetings if m.kind == "all_reduce"]
    assert reduces == [BATCH * HIDDEN * ITEM] * (1 + 2 * LAYERS)
