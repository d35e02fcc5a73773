"""Positions that models count by themselves, made an input."""

from __future__ import annotations

import pytest
import torch
from transformers import CONFIG_MAPPING

from partitioner.analysis.tokens.token_mixing import why_tokens_mix
from partitioner.capture.inputs.explicit_positions import explicit_positions
from tests.support.generated import error, prompts
from tests.support.partitioned import EXACT, compiled, traced

aten = torch.ops.aten


@pytest.mark.parametrize("name", ["bart", pytest.param("moss_transcribe_diarize", marks=pytest.mark.slow), "whisper"])
def test_what_counts_from_the_start_counts_by_position(name: str) -> None:
    if name == "moss_transcribe_diarize" and name not in CONFIG_MAPPING:
        pytest.skip("transformers 5.17 has no such model yet")
    program = traced(name)[1]
    assert "counts tokens from the start" in str(why_tokens_mix(program))
    explicit = explicit_positions(program)
    assert why_tokens_mix(explicit) is None
    assert [given.name for given in explicit.inputs][-1] == "position_ids"
    assert not [node for node in explicit.graph.nodes if node.target is aten.arange.default]
    assert [given.name for given in program.inputs] == ["input_ids"]  # and that one is as it was


@pytest.mark.parametrize("tp", [pytest.param(1, marks=pytest.mark.slow), 3])
def test_prompts_of_any_lengths_are_continued_as_each_alone(tp: int) -> None:
    assert error("bart", compiled("bart", tp), prompts("bart"), prefill_step=7) < EXACT


def test_a_text_longer_than_the_table_is_refused() -> None:
    with pytest.raises(ValueError, match="up to 256"):
        compiled("bart", 1).generate([[3, 4, 5]], max_new_tokens=10_000)


@pytest.mark.parametrize("name", [pytest.param("llama", marks=pytest.mark.slow), "gpt2"])
def test_a_program_that_takes_positions_stays_itself(name: str) -> None:
    program = traced(name)[1]
    assert explicit_positions(program) is program
