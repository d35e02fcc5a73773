"""The last-token pass: one row of logits per sequence, in the parts that the ranks hold."""

from __future__ import annotations

import pytest

from partitioner.program.node_arguments import operation
from partitioner.sharding.index_set import IndexSet
from runtime.ops.cached_attention import last_token
from runtime.ops.collectives import all_gather
from tests.support.partitioned import compiled


@pytest.mark.parametrize("name", ["llama", "gemma2", pytest.param("cohere", marks=pytest.mark.slow), "gpt2"])
@pytest.mark.parametrize("tp", [pytest.param(1, marks=pytest.mark.slow), 3])
def test_only_the_last_hidden_state_reaches_the_vocabulary(name: str, tp: int) -> None:
    graph = compiled(name, tp).program_of("decode").graph
    (picked,) = [node for node in graph.nodes if node.target is last_token]
    hidden = picked.meta["val"].shape[-1]
    (logits,) = graph.output_node().all_input_nodes
    assert logits.meta["val"].shape[1] == picked.meta["val"].shape[1] == 1
    assert hidden < logits.meta["val"].shape[-1]  # picked before the linear, not after


def test_each_rank_keeps_its_part_of_the_vocabulary() -> None:
    parts = compiled("llama", 3)
    assert [node.target for node in parts.program.graph.nodes].count(all_gather) == 1
    assert [node.target for node in parts.program_of("decode").graph.nodes].count(all_gather) == 0
    rank = parts.entry("decode", 1)
    assert rank.vocabulary is not None
    assert IndexSet.of(i for owned in rank.vocabulary for i in owned.indices()) == IndexSet.range(0, rank.vocab_size)


def test_a_head_that_stays_whole_is_not_gathered_either() -> None:
    parts = compiled("llama", 2, keep_whole=("lm_head", "model.embed_tokens"))
    assert parts.entry("decode", 0).vocabulary is None
    assert parts.generate([[3, 4, 5]], max_new_tokens=2).shape == (1, 5)
    assert "linear" in {
        operation(node).__name__ for node in parts.program_of("decode").graph.nodes if node.op == "call_function"
    }
