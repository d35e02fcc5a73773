"""The pipeline pass: stages are chosen by cost, hold what they need, and are the whole together."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from partitioner import Parts, Plan, partition
from partitioner.analysis.stages import choose_cuts
from partitioner.analysis.tokens.token_mixing import why_rows_mix
from partitioner.errors import LayoutError, PlanError
from partitioner.program.stages import crossings, stages_of, table_of
from partitioner.proof.layouts import check_entries
from runtime.ops.attention import attention
from runtime.ops.mask import attention_mask
from tests.support import reference
from tests.support.partitioned import EXACT, compiled, error, sized, tokens, traced


def staged(name: str, pp: int, *, tp: int = 1, odd: bool = False, **options: Any) -> Parts[Any]:
    return compiled(name, tp, odd=odd, pp=pp, passes=[("pipeline", options)] if options else [])


@pytest.mark.parametrize(
    ("name", "pp"),
    [
        ("llama", 2),
        ("llama", 3),
        ("gpt2", 3),
        ("bloom", 2),
        ("gemma2", 3),
        *(
            pytest.param(name, pp, marks=pytest.mark.slow)
            for name, pp in (
                ("gpt2", 2), ("bloom", 3), ("gemma2", 2), ("mixtral", 2), ("mixtral", 3), ("masked:bert", 2),
                ("masked:bert", 3),
            )
        ),
    ],
)  # fmt: skip
def test_stages_together_are_the_whole(name: str, pp: int) -> None:
    parts = staged(name, pp)
    for length, batch in ((1, 1), (5, 3), (9, 2)):
        assert error(name, parts, length, batch=batch) < EXACT


@pytest.mark.parametrize(
    "name", [*(pytest.param(name, marks=pytest.mark.slow) for name in ("llama", "gpt2")), "mixtral"]
)
def test_stages_of_several_ranks_each(name: str) -> None:
    parts = staged(name, 2, tp=2, odd=True)
    assert error(name, parts, 7, batch=3, odd=True) < EXACT
    results = parts.simulate_ranks(input_ids=tokens(name, 3, odd=True))
    assert [result is None for result in results] == [True, True, False, False]


def test_a_wrong_stage_is_seen() -> None:
    parts = staged("llama", 2)
    last = parts.program.graph.output_node().all_input_nodes[0]
    last.meta["stages"] = frozenset({0})
    with pytest.raises(LayoutError, match="values go from a stage to later ones"):
        crossings(parts.program.graph, 2)


def test_a_tied_weight_is_on_every_stage_that_uses_it_and_reported() -> None:
    parts = staged("gpt2", 2)
    assert parts.program.stages is not None
    held = table_of(parts.program.graph, 2).of_weight
    shared = {name for name, stages in held.items() if len(stages) > 1}
    assert shared == {"transformer.wte.weight"}
    assert "transformer.wte.weight is on stages 0, 1" in str(parts.report)
    assert parts.report.stages.shared == (("transformer.wte.weight", (0, 1)),)


def test_prefill_and_decode_are_cut_between_the_same_weights_as_whole_texts() -> None:
    parts = staged("llama", 3)
    whole = table_of(parts.program.graph, 3).of_weight
    for entry in ("prefill", "decode"):
        assert table_of(parts.program_of(entry).graph, 3).of_weight == whole


def test_every_weight_is_held_once_and_bytes_are_counted_per_stage() -> None:
    parts = staged("llama", 3)
    names = [{weight.name for weight in parts.rank(rank).weights if weight.source == "checkpoint"} for rank in range(3)]
    assert all(names)
    assert sum(map(len, names)) == len(set().union(*names))
    assert sum(parts.report.bytes_per_rank) >= parts.report.bytes_whole
    assert max(parts.report.bytes_per_rank) < parts.report.bytes_whole / 2


def test_speeds_are_heeded() -> None:
    even, slow = staged("llama", 2), staged("llama", 2, stage_weights=(1.0, 0.25))
    assert slow.report.bytes_per_rank[1] < even.report.bytes_per_rank[1]
    assert error("llama", slow, 5) < EXACT


def test_stages_begin_where_they_are_told_to() -> None:
    parts = staged("llama", 2, stage_starts=("model.layers.1",))
    assert parts.program.stages is not None
    for name, stages in table_of(parts.program.graph, 2).of_weight.items():
        if name.startswith("model.layers."):
            assert stages == {int(name.split(".")[2])}
    (crossing,) = crossings(parts.program.graph, 2)
    assert len(crossing) == 1
    assert error("llama", parts, 5) < EXACT


def test_a_plan_in_words_is_the_same_plan() -> None:
    plan = Plan.parse("pp=2,pipeline.balance=prefill,pipeline.stage_weights=[1,0.5]")
    assert plan == Plan(pp=2, passes=[("pipeline", {"balance": "prefill", "stage_weights": (1, 0.5)})])
    assert Plan.parse(str(plan)) == plan


@pytest.mark.parametrize(
    ("pp", "options", "said"),
    [
        (64, {}, r"pp=64: .* can be cut at \d+ places, into at most \d+ stages"),
        (2, {"stage_weights": (1, 2, 3)}, "must be 2 numbers above 0"),
        (
            2,
            {"stage_starts": ("model.layer.1",)},
            "'model.layer.1', where .* reads no weight; near it: 'model.layers.1",
        ),
        (3, {"stage_starts": ("model.layers.1",)}, "where stages 1 to 2 begin, 2 in all"),
        (2, {"stage_starts": ("model.embed_tokens",)}, "in the model's order, none at its beginning"),
        (2, {"balance": "both"}, "balance must be one of prefill, decode"),
        (2, {"stage_weights": (1, 1), "stage_starts": ("model.layers.1",)}, "give one of them"),
    ],
)
def test_what_cannot_be_is_refused(pp: int, options: dict[str, Any], said: str) -> None:
    with pytest.raises(PlanError, match=said):
        staged("llama", pp, **options)


def test_a_stage_whose_only_weight_is_tied_to_the_next_ones_is_refused() -> None:
    model = sized("llama", num_hidden_layers=2, hidden_size=32, num_attention_heads=2, num_key_value_heads=1,
                  head_dim=16, intermediate_size=48, vocab_size=64)  # fmt: skip
    model.lm_head.weight = model.model.embed_tokens.weight
    starts = {"stage_starts": ("model.layers.0",)}
    with pytest.raises(PlanError, match="stage 0 of 2 would compute nothing that another needs"):
        partition(model, Plan(pp=2, passes=[("pipeline", starts)]))


@pytest.mark.parametrize(("tokens", "attentions"), [(choose_cuts.PREFILL_TOKENS, [0, 0, 1, 1]), (1024, [0, 0, 0, 0])])
def test_stages_for_prompts_share_out_attention(
    tokens: int, attentions: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A vocabulary that is read for the last token only weighs nothing in a long prompt; in a short one it does."""
    monkeypatch.setattr(choose_cuts, "PREFILL_TOKENS", tokens)
    config = LlamaConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=400_000, max_position_embeddings=65536,
    )  # fmt: skip
    with torch.device("meta"):
        model = LlamaForCausalLM(config).eval()
    parts = partition(model, Plan.parse("pp=2,pipeline.balance=prefill"))
    found = [min(stages_of(node)) for node in parts.program.graph.nodes if node.target is attention]
    assert found == attentions


def test_more_stages_than_one_model_of_many_layers_needs() -> None:
    model = sized("llama", num_hidden_layers=8, hidden_size=32, num_attention_heads=2, num_key_value_heads=1,
                  head_dim=16, intermediate_size=48, vocab_size=64)  # fmt: skip
    parts = partition(model, Plan(pp=4))
    assert parts.report.stages.evenness > 0.85
    with torch.no_grad():
        ids = torch.randint(0, 64, (5, 6))
        expected = model(input_ids=ids).logits
    torch.testing.assert_close(parts.simulate(input_ids=ids), expected, rtol=1e-5, atol=1e-5)


def test_a_state_that_two_entries_keep_on_different_stages_is_refused() -> None:
    parts = staged("llama", 2)
    prefill = parts.program_of("prefill")
    decode = prefill.copy()
    check_entries(prefill, decode)
    moved = next(n for n in decode.graph.nodes if "state" in n.kwargs)
    moved.meta["stages"] = frozenset({1 - min(moved.meta["stages"])})
    with pytest.raises(LayoutError, match=r"keep it on the stages \[0\] and \[1\]"):
        check_entries(prefill, decode)


def test_what_stages_remember_is_reported_and_what_they_do_is_recorded() -> None:
    parts = staged("llama", 2, stage_starts=("model.layers.1",))
    report = parts.generation_report
    assert report.bytes_per_token == (report.bytes_per_token[0],) * 2
    assert "one rank in each stage" in str(report)
    with parts.profile() as trace:
        parts.generate([[3, 4, 5], [6, 7]], max_new_tokens=3, eos_token_id=[])
    assert str(trace)


def test_an_encoder_runs_its_rows_in_pieces_each_with_its_own_mask() -> None:
    parts = staged("masked:bert", 2)
    assert parts.rank(0).stage.rows_apart
    model, program = traced("masked:bert")
    ids = tokens("masked:bert", 7, batch=5)
    mask = (torch.arange(7) < torch.tensor([[7], [3], [5], [1], [6]])).long()
    expected = reference.forward(model, lifted=True, input_ids=ids, attention_mask=mask)
    found = parts.simulate(input_ids=ids, attention_mask=mask)
    torch.testing.assert_close(found, expected, rtol=EXACT, atol=EXACT)
    # a mask that is made of other rows is seen
    turned = program.copy()
    (made,) = (node for node in turned.graph.nodes if node.target is attention_mask)
    padding = made.args[3]
    with turned.graph.inserting_before(made):
        flipped = turned.graph.call_function(torch.ops.aten.flip.default, (padding, [0]))
    flipped.meta = dict(padding.meta)
    made.replace_input_with(padding, flipped)
    assert why_rows_mix(turned) is not None
