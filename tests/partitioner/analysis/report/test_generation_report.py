"""The report of generation: what ranks remember, split or whole and why, in bytes that are those of the caches."""

from __future__ import annotations

import json

import pytest

from partitioner import Parts, Plan
from partitioner.compile.generation import compile_steps
from tests.support import stepping
from tests.support.partitioned import compiled_once


def stepped(name: str, tp: int, **plan: object) -> Parts[None]:
    """Parts made of a model's steps alone: what runs the whole text is the same program."""
    if not plan:
        return stepping.compiled(name, tp)
    return stepping.parts_of(*compile_steps(stepping.traced(name)[1], Plan(tp=tp, **plan)))


@pytest.mark.parametrize("tp", [pytest.param(1, marks=pytest.mark.slow), 2, pytest.param(4, marks=pytest.mark.slow)])
def test_keys_and_values_are_split_by_heads(tp: int) -> None:
    parts = compiled_once("gemma2", tp)
    report = parts.generation_report
    assert report.way == "attention that reads keys and values from a cache"
    assert {row.sees for row in report.states} == {None, 8}
    for row in report.states:
        assert row.split == {1: "", 2: "tp over dim 0 as 1/1", 4: "tp over dim 0 as 1/1/1/1"}[tp]
        assert row.reason == {1: "one rank", 2: "", 4: "some of it is needed, and kept, by several ranks"}[tp]
    assert "128 B of 256 B per token, of the last 8 tokens only: tp over" in str(report) or tp == 1
    # one more token, while the window is not full
    more, less = (parts.cache_bytes(max_batch=1, max_length=length) for length in (6, 5))
    assert list(report.bytes_per_token) == [a - b for a, b in zip(more, less, strict=True)]
    assert sum(report.bytes_per_sequence) == sum(report.further_weights) == 0


@pytest.mark.slow
def test_a_whole_state_is_reported_with_what_keeps_it_whole() -> None:
    report = stepped("deepseek_v32", 2).generation_report
    found = {row.pattern: row.reason for row in report.whole}
    assert found["cache.*.indexer"] == (
        "made with model.layers.*.self_attn.indexer.wk.weight, which is whole: "
        "layer_norm in model.layers.0.self_attn.indexer.k_norm needs the whole row (not reduced in parts: all-reduces "
        "in each layer, 1 more of one number per token, for 4.1 KB less on each rank)"
    )
    assert found["cache.*.key"].startswith("made with model.layers.*.self_attn.kv_a_proj_with_mqa.weight, which is")
    assert "remembered, split:\n  nothing\n" in str(report)


def test_a_state_that_the_plan_keeps_whole_says_so() -> None:
    parts = stepped("lfm2_moe", 2, keep_whole=("model.layers.0.conv",))
    (row,) = (row for row in parts.generation_report.whole if row.names == ("cache.0.conv.0",))
    assert row.reason.endswith("which is whole: kept whole by the plan (model.layers.0.conv)")


def test_states_of_sequences_are_counted_by_themselves() -> None:
    parts = stepped("lfm2_moe", 2)
    report = parts.generation_report
    assert report.way == "the model's own use of a cache"
    assert report.tokens_at_a_time is None
    assert "prompts run as many tokens at a time as wanted" in str(report)
    assert {row.pattern: row.per_token for row in report.states}["cache.*.conv.0"] is False
    per_token, per_sequence = report.bytes_per_token, report.bytes_per_sequence
    expected = [a * 9 + b for a, b in zip(per_token, per_sequence, strict=True)]
    assert parts.cache_bytes(max_batch=1, max_length=9) == expected
    assert report.notes == tuple(parts.program_of("decode").notes)


def test_it_is_plain_data() -> None:
    report = compiled_once("gemma2", 2).generation_report
    read = json.loads(json.dumps(report.to_dict()))
    assert read["states"][0]["bytes_per_rank"] == [128, 128]
    assert read["longest_text"] == report.longest_text
    assert json.loads(json.dumps(compiled_once("gemma2", 2).report.to_dict()))["model"] == report.model
