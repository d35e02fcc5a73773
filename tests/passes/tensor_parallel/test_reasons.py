"""Why a weight is whole: the report gives the cause, not what the analysis happened to notice."""

from __future__ import annotations

import re

import pytest
from torch import Tensor, nn
from torch.nn import functional

from partitioner import Plan, PlanError
from partitioner.analysis.report.explain import explain
from partitioner.analysis.report.report import split_text
from partitioner.compile.partition import compile_program
from partitioner.compile.tracing.trace import trace
from partitioner.sharding.index_set import IndexSet
from partitioner.sharding.layout import Layout, Split
from runtime.kv_cache.device_memory import readable
from tests.support.layers import layered, layered_once, partitioned
from tests.support.partitioned import EXACT


class OneKeyHead(nn.Module):
    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.q, self.k, self.v = nn.Linear(hidden, 24), nn.Linear(hidden, 4), nn.Linear(hidden, 4)
        self.o = nn.Linear(24, hidden)

    def forward(self, x: Tensor) -> Tensor:
        q = self.q(x).unflatten(-1, (6, 4)).transpose(1, 2)
        k, v = self.k(x), self.v(x)
        k = (k + k.flip(-1)).unsqueeze(1)  # mixes the indices of the head, as a rotary embedding does
        found = functional.scaled_dot_product_attention(
            q, k.expand(-1, 6, -1, -1), v.unsqueeze(1).expand(-1, 6, -1, -1), is_causal=True
        )
        return self.o(found.transpose(1, 2).flatten(2))


class MergedWeights(nn.Module):
    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.low, self.high = nn.Linear(hidden, 4, bias=False), nn.Linear(4, hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return functional.linear(x, self.high.weight @ self.low.weight).relu()


class NormThenDown(nn.Module):
    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(hidden, 18), nn.Linear(18, hidden)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.up(x).softmax(-1))


class SmallNorm(nn.Module):
    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(hidden, 600), nn.Linear(600, hidden)
        self.small, self.back = nn.Linear(hidden, 4), nn.Linear(4, hidden)

    def forward(self, x: Tensor) -> Tensor:
        normed = functional.rms_norm(self.small(x), (4,), eps=1e-6)
        return self.down(self.up(x).relu()) + self.back(normed)


def reasons(layer: type[nn.Module], tp: int = 2, **plan: object) -> dict[str, str]:
    parts, error = partitioned(layered_once(layer, count=3), tp, **plan)
    assert error < EXACT
    return {row.pattern.removeprefix("layers.*.").removesuffix(".weight"): row.reason for row in parts.report.whole}


@pytest.mark.parametrize("tp", [2, 3])
def test_one_key_head_is_needed_by_every_rank(tp: int) -> None:
    found = reasons(OneKeyHead, tp)
    assert set(found) == {"k", "v"}
    assert set(found.values()) == {"all of it is needed by every rank's part of layers.0.o.weight"}


def test_weights_that_meet_only_each_other() -> None:
    found = reasons(MergedWeights)
    cause = "could neither start nor end a split: it meets other weights and constants there, no activation"
    assert found["high"].endswith(cause)
    assert found["low"].endswith(cause)


def test_what_feeds_a_whole_weight() -> None:
    found = reasons(NormThenDown, keep_whole=("layers.*.down",))
    assert found["up"] == "softmax in layers.0 needs the whole row"
    assert found["down"] == "kept whole by the plan (layers.*.down)"


class GatedNorm(nn.Module):
    """Two values that every head contracts come out of the same weight as the heads, whose norm is over all of them."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.into, self.out = nn.Linear(hidden, 24 + 24 + 8, bias=False), nn.Linear(24, hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, heads, b, c = self.into(x).split([24, 24, 4, 4], dim=-1)
        heads = heads.unflatten(-1, (6, 4)) * (b * c).sum(-1)[..., None, None]
        found = heads.flatten(-2) * functional.silu(gate)
        return self.out(found * (found.pow(2).mean(-1, keepdim=True) + 1e-6).rsqrt())


def test_the_norm_is_the_cause_and_not_the_contraction_before_it() -> None:
    """So that it is reduced in parts, and the weights are split."""
    parts, error = partitioned(layered(GatedNorm, count=3), 2)
    assert error < EXACT
    assert parts.report.matrix_share < 0.65
    split = {row.pattern for row in parts.report.rows if row.split}
    assert {"layers.*.into.weight", "layers.*.out.weight"} <= split


class GateAfterNorm(nn.Module):
    """Every rank's part of the gated product needs all of the heads, for their norm; the gate it does not."""

    def __init__(self, hidden: int, others: int) -> None:
        super().__init__()
        self.into, self.out = nn.Linear(hidden, 48, bias=False), nn.Linear(24, hidden, bias=False)
        self.up, self.down = nn.Linear(hidden, others), nn.Linear(others, hidden)

    def forward(self, x: Tensor) -> Tensor:
        gate, heads = self.into(x).split([24, 24], dim=-1)
        normed = heads * (heads.pow(2).mean(-1, keepdim=True) + 1e-6).rsqrt()
        return self.out(normed * functional.silu(gate)) + self.down(self.up(x).relu())


def test_a_weight_that_is_shared_for_a_norm_is_split_by_reducing_it_in_parts() -> None:
    parts, error = partitioned(layered(lambda hidden: GateAfterNorm(hidden, 8), count=3), 2)
    assert error < EXACT
    (row,) = [row for row in parts.report.rows if row.pattern == "layers.*.into.weight"]
    assert row.split.endswith("24/24")
    assert not row.reason


def test_a_weight_that_is_shared_for_a_norm_says_what_parts_would_have_cost() -> None:
    """Beside a large layer, where that is not worth it."""
    parts, error = partitioned(layered(lambda hidden: GateAfterNorm(hidden, 3000), count=3), 2)
    assert error < EXACT
    (row,) = [row for row in parts.report.rows if row.pattern == "layers.*.into.weight"]
    assert row.split.endswith("36/36")
    assert row.reason.startswith("some of it is needed, and held, by several ranks: mean in layers.0 needs the whole ")
    assert "not reduced in parts: all-reduces in each layer, 1 more of one number per token, for " in row.reason


class SixHeads(nn.Module):
    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.qkv, self.o = nn.Linear(hidden, 72), nn.Linear(24, hidden)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 6, 4)).permute(2, 0, 3, 1, 4)
        found = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.o(found.transpose(1, 2).flatten(2))


def test_fewer_heads_than_ranks_are_the_reason() -> None:
    found = reasons(SixHeads, 8)
    cause = "6 heads do not divide over 8 ranks: attention in layers.0 needs the whole row of each; at most 6 ranks"
    assert found["qkv"].startswith(cause)
    assert found["o"].startswith(f"what it contracts stays whole: {cause}")


def test_what_a_reduction_in_parts_would_have_cost() -> None:
    """Where it is worth less than its all-reduces: a norm of a few numbers beside a large layer."""
    found = reasons(SmallNorm)
    assert found["small"].startswith("rms_norm in layers.0 needs the whole row (")
    assert "not reduced in parts: all-reduces in each layer, " in found["small"]
    assert found["small"].count("more of one number per token, for ") == 1
    assert found["small"].endswith("less on each rank)")


def test_many_ranks_are_warned_of_and_stand_in_a_line() -> None:
    parts = compile_program(trace(layered(SixHeads, count=2)), Plan(tp=500))
    (note,) = [note for note in parts.report.notes if note.startswith("500 ranks are far more than this model divides")]
    assert "0.2% would be even" in note
    assert max(map(len, str(parts.report).splitlines())) < 400
    assert "72 indices are too few for 500 ranks" in str(parts.report)


def test_sizes_of_many_ranks_are_counted() -> None:
    def text(*sizes: int) -> str:
        starts = [sum(sizes[:i]) for i in range(len(sizes))]
        owned = tuple(IndexSet(((a, a + size),)) for a, size in zip(starts, sizes, strict=True))
        return split_text(Layout((Split(("tp",), owned), None)))

    assert text(3, 2, 2) == "tp over dim 0 as 3/2/2"
    assert text(*[23] * 8, *[22] * 492) == "tp over dim 0 as 8 x 23, 492 x 22"


def test_a_weight_is_explained_up_to_the_op_that_decides() -> None:
    parts, _ = partitioned(layered(NormThenDown, count=3), 2, keep_whole=("layers.*.down",))
    said = explain(parts.program, "layers.*.up")
    size = parts.program.weights["layers.0.up.weight"].bytes
    assert said.splitlines()[0].startswith("layers.0.up.weight [18, ")
    assert f"lost: {readable(size // 2)} on each of 2 ranks" in said
    assert "because: softmax in layers.0 needs the whole row" in said
    assert re.search(r"\n  linear in layers.0.up.*\n  softmax in layers.0 \(test_reasons.py:\d+\)", said)
    with pytest.raises(PlanError, match=r"no weight is named 'layers.0.upp'; near it: layers.0.up"):
        explain(parts.program, "layers.0.upp")


def test_what_is_replicated_is_added_up() -> None:
    parts, _ = partitioned(layered(SixHeads, count=2), 8)
    report = parts.report
    whole = sum(row.bytes * len(row.names) for row in report.rows if not row.split)
    assert report.replicated_per_rank == (whole,) * 8
    assert f"replicated: {readable(whole)} of {readable(max(report.bytes_per_rank))} per rank" in str(report)
    assert any(note.startswith("8 ranks are far more than this model divides into") for note in report.notes)
    assert "weights, float64: " in str(report)


def test_a_collective_says_its_bytes() -> None:
    parts, _ = partitioned(layered(SixHeads, count=2), 2)
    first = parts.report.collectives[0]
    assert first.op == "all_reduce"
    assert first.bytes_per_token == parts.program.weights["layers.0.o.weight"].shape[0] * 8
    assert f"{readable(first.bytes_per_token)} per token each" in str(parts.report)
    assert not [note for note in parts.report.notes if "far more" in note]
