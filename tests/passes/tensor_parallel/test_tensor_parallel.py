"""The tensor-parallel pass on real architectures: equal in float64, split as it should be, no more collectives than
needed.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from partitioner.analysis.report.report import Report, WeightRow
from partitioner.errors import PlanError
from tests.support.layers import Gated, layered, layered_once, partitioned
from tests.support.partitioned import EXACT, compiled_once, error


def row(report: Report, part: str) -> WeightRow:
    found = [r for r in report.rows if any(part in name for name in r.names)]
    assert found, f"no weight has {part!r} in its name"
    return found[0]


def per_layer(report: Report) -> set[int]:
    return {count for layer, count in report.per_layer("all_reduce").items() if layer}


def plans(quick: dict[str, tuple[int, ...]], slow: list[str]) -> list[Any]:
    """Each model at tp=2, 3 and 4; `quick`: at which of them in the quick suite, one that no division suits."""
    names = [*quick, *slow]
    cases = [(name, tp) for name in names for tp in (2, 3, 4)]
    return [pytest.param(*case, marks=() if case[1] in quick.get(case[0], ()) else pytest.mark.slow) for case in cases]


SEQUENTIAL = plans(
    {
        "llama": (3, 4),  # two key heads: on four ranks each is on two
        "gpt2": (3,),
        "bloom": (3,),
        "gemma2": (3,),
        "mixtral": (3,),
        "deepseek_v3": (3,),
    },
    ["gpt_oss", "phi3", "qwen3", "minicpm3", "opt"],
)
PARALLEL = plans({"gptj": (3,), "falcon": (3, 4)}, ["cohere", "phi", "gpt_neox"])
ODD = plans({"llama": (4,), "phi3": (4,), "gpt_oss": (4,), "olmo2": (4,)}, ["bloom", "gpt2", "gpt_neox"])


@pytest.mark.parametrize(("name", "tp"), SEQUENTIAL)
def test_sequential_layers_reduce_twice(name: str, tp: int) -> None:
    parts = compiled_once(name, tp)
    assert per_layer(parts.report) == {2}
    assert parts.report.per_layer("all_reduce")[""] == 1  # the embedding's
    assert [c.op for c in parts.report.collectives].count("all_gather") == 1  # the logits'
    assert error(name, parts, 9) < EXACT


@pytest.mark.parametrize(("name", "tp"), PARALLEL)
def test_attention_and_mlp_side_by_side_share_one_reduction(name: str, tp: int) -> None:
    parts = compiled_once(name, tp)
    assert per_layer(parts.report) == {1}
    assert error(name, parts, 9) < EXACT


@pytest.mark.parametrize("length", [1, 2, 40])
@pytest.mark.parametrize("batch", [1, 3])
def test_one_graph_serves_every_length_and_batch(length: int, batch: int) -> None:
    assert error("llama", compiled_once("llama", 3), length, batch=batch) < EXACT


@pytest.mark.parametrize(("name", "tp"), ODD)
def test_sizes_that_divide_by_little(name: str, tp: int) -> None:
    assert error(name, compiled_once(name, tp, odd=True), 7, odd=True) < EXACT


def test_kv_heads_fewer_than_ranks_live_where_they_are_needed() -> None:
    report: Report = compiled_once("llama", 4).report
    assert row(report, "q_proj").split == "tp over dim 0 as 16/16/16/16"
    # two kv heads of 16 rows on four ranks: each on two, nothing else twice
    assert row(report, "k_proj").split == row(report, "v_proj").split == "tp over dim 0 as 16/16/16/16"
    assert "several ranks" in row(report, "k_proj").reason
    assert row(report, "up_proj").reason == row(report, "o_proj").reason == ""
    assert report.whole == ()


def test_one_kv_head_is_on_every_rank_and_its_query_heads_are_not() -> None:
    report: Report = compiled_once("falcon", 2).report
    # fused: four query heads, then one key and one value head, of 16 rows each
    assert row(report, "query_key_value").split == "tp over dim 0 as 64/64"


@pytest.mark.parametrize(
    ("name", "tp"),
    [
        ("gpt_bigcode", 2),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (("gpt_bigcode", 3), ("diffllama", 2), ("diffllama", 3))
        ),
    ],
)
def test_a_head_that_every_rank_needs_is_whole(name: str, tp: int) -> None:
    assert error(name, compiled_once(name, tp), 6) < EXACT


def test_six_heads_on_four_ranks() -> None:
    report: Report = compiled_once("llama", 4, odd=True).report
    assert row(report, "q_proj").split == "tp over dim 0 as 32/32/16/16"
    assert row(report, "down_proj").split == "tp over dim 1 as 25/25/25/25"
    assert row(report, "embed_tokens").split == "tp over dim 0 as 32/32/32/31"


def test_norm_across_heads_is_reduced_in_parts() -> None:
    report: Report = compiled_once("olmo2", 2).report
    assert report.whole == ()
    assert per_layer(report) == {4}  # two of them are one number per token
    small = [c for c in report.collectives if c.shape.endswith("sequence, 1]")]
    assert len(small) == 2 * 2


def test_norm_across_heads_is_reduced_in_parts_where_key_heads_are_shared() -> None:
    """Attention joins more of what meets there than the norm does; the norm is still what can be reduced in parts."""
    report: Report = compiled_once("olmo2", 3).report
    assert report.whole == ()
    assert row(report, "q_proj").split == "tp over dim 0 as 32/16/16"
    assert row(report, "k_proj").split == "tp over dim 0 as 16/16/16"


def test_low_rank_projections_are_kept_whole_and_the_rest_is_not() -> None:
    report: Report = compiled_once("deepseek_v3", 2).report
    whole = {r.pattern.rpartition("layers.")[2] for r in report.whole}
    assert whole == {
        "*.self_attn.q_a_proj.weight",
        "*.self_attn.kv_a_proj_with_mqa.weight",
        "1.mlp.gate.weight",
    }
    assert all("needs the whole row" in r.reason for r in report.whole)


def test_tied_embedding_is_split_once_for_both_uses() -> None:
    report: Report = compiled_once("gpt2", 3).report
    assert row(report, "wte").split == "tp over dim 0 as 43/43/42"
    assert error("gpt2", compiled_once("gpt2", 3), 5) < EXACT


def test_a_lone_linear_is_kept_whole_and_what_follows_stays_in_phase() -> None:
    report: Report = compiled_once("masked:bert", 2).report
    assert [r.names[0] for r in report.whole] == ["cls.predictions.transform.dense.weight"]
    assert per_layer(report) == {2}


def test_bias_of_a_row_parallel_linear_counts_once() -> None:
    parts = compiled_once("gpt2", 3)
    targets = [getattr(node.target, "__name__", "") for node in parts.program.graph.nodes]
    assert targets.count("once") == 2 * 2
    assert error("gpt2", parts, 5) < EXACT


def test_what_a_graph_says() -> None:
    parts = compiled_once("llama", 2)
    why = [node.meta.get("why", "") for node in parts.rank(1).graph.nodes]
    assert sum("column-parallel" in reason for reason in why) == 2 * 5 + 1
    assert sum("row-parallel" in reason for reason in why) == 2 * 2 + 1
    assert "all_reduce" in parts.rank(1).graph_module.print_readable(print_output=False)


def test_one_rank_is_left_alone() -> None:
    parts = compiled_once("llama", 1)
    assert parts.report.collectives == ()
    assert error("llama", parts, 5) < EXACT


def test_keep_whole() -> None:
    parts = compiled_once("llama", 2, keep_whole=("lm_head", "*.mlp"))
    assert {r.pattern for r in parts.report.whole} == {
        "lm_head.weight",
        "model.layers.*.mlp.gate_proj.weight",
        "model.layers.*.mlp.up_proj.weight",
        "model.layers.*.mlp.down_proj.weight",
    }
    assert all("by the plan" in r.reason for r in parts.report.whole)
    assert per_layer(parts.report) == {1}
    assert error("llama", parts, 5) < EXACT


@pytest.mark.parametrize("tp", [2, pytest.param(3, marks=pytest.mark.slow)])
@pytest.mark.parametrize("layer", [0, 2, 3])
@pytest.mark.parametrize("weight", ["gate", "up", "out"])
def test_keep_whole_of_one_layer_leaves_the_others_split(weight: str, layer: int, tp: int) -> None:
    name = f"layers.{layer}.{weight}"
    parts, error = partitioned(layered_once(Gated, count=4), tp, keep_whole=(name,))
    assert error < EXACT
    reasons = {row.names: row.reason for row in parts.report.whole}
    whole = ("gate", "up", "out") if weight == "out" else (weight,)  # a whole gate meets a split one in part
    assert set(reasons) == {(f"layers.{layer}.{each}.weight",) for each in whole}
    assert reasons[f"{name}.weight",] == f"kept whole by the plan ({name})"
    assert all(f"layers.{layer}." in reason for reason in reasons.values())
    split = {row.pattern: len(row.names) for row in parts.report.rows if row.split}
    assert {split[f"layers.*.{each}.weight"] for each in whole} == {3}


def test_keep_whole_that_matches_nothing() -> None:
    with pytest.raises(PlanError, match=r"keep_whole='lm_haed' matches no weight; near it: lm_head"):
        compiled_once("llama", 2, keep_whole=("lm_haed",))


def test_more_ranks_than_anything_can_be_split_over() -> None:
    parts = compiled_once("llama", 65)
    assert error("llama", parts, 3) < EXACT
    reasons = {r.pattern.rpartition(".")[0].rpartition(".")[2]: r.reason for r in parts.report.whole}
    assert reasons["q_proj"] == "64 indices are too few for 65 ranks"


class InChunks(nn.Module):
    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.q, self.out = nn.Linear(hidden, 8), nn.Linear(8, hidden)

    def forward(self, x: Tensor) -> Tensor:
        q, length = self.q(x), x.shape[1]
        chunks = [q[:, 20 * i : min(20 * i + 20, length)] for i in range((length + 19) // 20)]
        found: Tensor = self.out(torch.cat([(chunk @ chunk.mT) @ chunk for chunk in chunks], 1))
        return found


def test_a_trace_for_a_few_lengths_is_refused_with_what_to_do() -> None:
    with pytest.raises(PlanError, match=r"holds for sequence 21 to 40 only.*length=N\) compiles it"):
        partitioned(layered(InChunks), 2)


def test_keep_whole_is_a_list_of_globs() -> None:
    with pytest.raises(PlanError, match="must be a list or tuple of names"):
        compiled_once("llama", 2, keep_whole="lm_head")
