"""The vocabulary head whose rows all pipeline stages share out: the same logits and tokens, and when it is chosen."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

import partitioner
from partitioner import Parts, Plan, partition
from partitioner.compile.compare import first_divergence
from partitioner.compile.partition import compile_program
from partitioner.compile.tracing.trace import trace
from partitioner.errors import LayoutError, PlanError, RankMismatch
from partitioner.proof.layouts import check
from partitioner.proof.schedules import boundaries_of, play_schedule
from partitioner.sharding.layout import Split
from runtime.communication.channels import Channel
from runtime.generation.generation_request import Generated
from runtime.pipeline.schedule import chain, ring
from tests.support import generated, zoo
from tests.support.generated import prompts
from tests.support.partitioned import EXACT, compiled, error, tokens, traced

SHARED = [("pipeline", {"share_head": True})]
PLANS = ("pp=2", "pp=3", "tp=2,pp=2")


@functools.cache
def parts(name: str, plan: str, *, odd: bool = False) -> Parts[Any]:
    given = Plan.parse(plan)
    found = compiled(name, given.tp, odd=odd, pp=given.pp, passes=SHARED if given.pp > 1 else [])
    assert given.pp == 1 or found.program.stages.shares_head
    return found


@pytest.mark.parametrize(
    ("name", "plan"),
    [
        ("llama", "pp=2"),
        ("llama", "tp=2,pp=2"),
        pytest.param("gpt2", "pp=2", marks=pytest.mark.slow),
        ("gpt2", "tp=2,pp=2"),  # its table is the embedding's too
        ("gemma2", "pp=2"),  # caps its logits
        ("phi", "pp=2"),  # a bias
        *(
            pytest.param(name, plan, marks=pytest.mark.slow)
            for name in ("llama", "gpt2", "gemma2", "phi", "cohere", "mixtral", "bloom")
            for plan in ("pp=3", "tp=3,pp=2")
        ),
    ],
)
def test_logits_are_those_of_the_whole(name: str, plan: str) -> None:
    found = parts(name, plan)
    for length, batch in ((1, 1), (5, 3)):
        assert error(name, found, length, batch=batch) < EXACT
    everywhere = found.simulate_ranks(input_ids=tokens(name, 3))
    assert all(torch.equal(result, everywhere[0]) for result in everywhere)


@pytest.mark.parametrize("name", ["llama", pytest.param("gpt2", marks=pytest.mark.slow)])
def test_each_rank_has_its_rows_and_no_more(name: str) -> None:
    """Of a vocabulary that no number of ranks divides."""
    found = parts(name, "tp=2,pp=3", odd=True)
    assert error(name, found, 7, batch=3, odd=True) < EXACT
    prefill = [found.entry("prefill", rank) for rank in range(6)]
    owned = prefill[0].vocabulary
    assert prefill[0].vocabulary_axes == ("pp", "tp")
    assert [i for each in owned for i in each.indices()] == list(range(prefill[0].vocab_size))
    assert {each.size for each in owned} <= {prefill[0].vocab_size // 6, prefill[0].vocab_size // 6 + 1}
    for program in prefill:
        (head,) = (weight for weight in program.weights if weight.name == "lm_head.weight")
        assert head.local_shape[0] == owned[program.rank].size


@pytest.mark.parametrize(
    ("plan", "batch"),
    [
        ("pp=2", 1),
        ("pp=3", 4),
        *(pytest.param(plan, batch, marks=pytest.mark.slow) for plan in PLANS for batch in (1, 2, 3, 4)),
    ],
)
def test_tokens_and_log_probabilities_are_those_of_the_model(plan: str, batch: int) -> None:
    texts = prompts("llama")[:batch]
    assert generated.error("llama", parts("llama", plan), texts, prefill_step=4) < EXACT


@pytest.mark.parametrize(
    "options",
    [
        {"do_sample": True, "seed": 3, "logprobs": True},
        pytest.param({"do_sample": True, "seed": 3, "top_k": 20, "logprobs": True}, marks=pytest.mark.slow),
        pytest.param({"repetition_penalty": 1.3}, marks=pytest.mark.slow),
        pytest.param({"no_repeat_ngram_size": 2, "min_new_tokens": 3}, marks=pytest.mark.slow),
        pytest.param({"logprobs": True}, marks=pytest.mark.slow),
    ],
)
def test_options_mean_the_same(options: dict[str, Any]) -> None:
    texts = prompts("llama", (4, 7, 2))
    said: list[tuple[Tensor, Any]] = []
    for plan in ("tp=1", *PLANS):
        found = parts("llama", plan).generate(texts, max_new_tokens=9, eos_token_id=[], **options)
        said.append((found.sequences, found.logprobs) if isinstance(found, Generated) else (found, None))
    for sequences, logprobs in said[1:]:
        assert torch.equal(sequences, said[0][0])
        if logprobs is not None:
            torch.testing.assert_close(logprobs, said[0][1], rtol=EXACT, atol=EXACT)


def test_sequences_end_at_different_times() -> None:
    texts = prompts("llama", (4, 7, 2))
    free = parts("llama", "tp=1").generate(texts, max_new_tokens=12, eos_token_id=[])
    for ends in ([int(free[0, -12])], [int(free[1, -9])], [int(free[0, -7]), int(free[2, -10])]):
        said = [
            parts("llama", plan).generate(texts, max_new_tokens=12, eos_token_id=ends, pad_token_id=0)
            for plan in ("tp=1", *PLANS)
        ]
        assert all(torch.equal(each, said[0]) for each in said)


def test_streams_come_in_order_and_can_be_left() -> None:
    staged, texts = parts("llama", "pp=3"), prompts("llama", (4, 7, 2))
    whole = staged.generate(texts, max_new_tokens=6, eos_token_id=[])

    def three(engine: Any) -> list[Any]:
        stream = engine.stream(texts, max_new_tokens=6, eos_token_id=[])
        found = [next(stream).tokens for _ in range(3)]
        stream.close()
        return found

    first, *others = staged._simulator.run(three)
    assert all(each == first for each in others)
    assert torch.equal(torch.tensor(first).t(), whole[:, -6:-3])
    assert torch.equal(staged.generate(texts, max_new_tokens=6, eos_token_id=[]), whole)


@pytest.mark.slow
def test_a_model_that_runs_by_its_own_cache() -> None:
    """Mamba-2's graph for single tokens is another one; its head is found in both."""
    model, ids = zoo.tiny("mamba2")
    alone, shared = partition(model, Plan(tp=1)), partition(model, Plan(pp=2, passes=SHARED))
    texts = [row[:n].tolist() for row, n in zip(ids, (5, 3), strict=False)]
    one, other = (each.generate(texts, max_new_tokens=5, eos_token_id=[]) for each in (alone, shared))
    assert torch.equal(one, other)


def test_speeds_say_how_many_rows_each_stage_has() -> None:
    found = compiled("llama", 1, pp=2, passes=[("pipeline", {"share_head": True, "stage_weights": (1.0, 0.25)})])
    first, second = found.entry("decode", 0).vocabulary or ()
    assert abs(first.size - 4 * second.size) <= 4
    assert error("llama", found, 5) < EXACT


def test_what_is_saved_runs_the_same(tmp_path: Path) -> None:
    model, ids = zoo.tiny("gpt2")
    found = partition(model, Plan(pp=2, tp=2, passes=SHARED))
    found.save(tmp_path / "bundle")
    bundle = partitioner.load(tmp_path / "bundle")
    bundle.verify()
    assert torch.equal(bundle.simulate(input_ids=ids), found.simulate(input_ids=ids))
    one, other = (each.generate(ids[:, :5], max_new_tokens=4) for each in (found, bundle))
    assert torch.equal(one, other)
    anew = partition(tmp_path / "bundle", Plan(pp=3, passes=SHARED))
    torch.testing.assert_close(anew.simulate(input_ids=ids), found.simulate(input_ids=ids), rtol=1e-5, atol=1e-5)


def test_it_is_compared_with_the_model_and_recorded() -> None:
    found = parts("gpt2", "pp=2")
    assert first_divergence(found, input_ids=tokens("gpt2", 5)) is None
    with found.profile() as trace:
        found.generate([[3, 4, 5], [6, 7]], max_new_tokens=3, eos_token_id=[])
    assert str(trace)


# -- when --------------------------------------------------------------------------------------------------------------


def large(vocabulary: int) -> Parts[Any]:
    """Four layers of 50 million parameters each, on the meta device."""
    config = LlamaConfig(
        num_hidden_layers=4, hidden_size=2048, num_attention_heads=16, intermediate_size=5632, vocab_size=vocabulary
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    return compile_program(trace(model.eval()), Plan(pp=4))


def test_it_is_chosen_where_the_slowest_stage_gains() -> None:
    shared = large(128_000)
    assert shared.program.stages.shares_head
    assert shared.report.stages.evenness > 0.97
    assert shared.report.stages.evenness_alone < 0.6
    assert "all stages share out the rows of lm_head.weight, 32000, 32000, 32000, 32000; mean over slowest 5" in str(
        shared.report
    )
    alone = large(2_000)
    assert not alone.program.stages.shares_head
    assert "the last stage has all of the vocabulary head: shared out, a step would be" in str(alone.report)


@pytest.mark.parametrize(
    ("name", "plan", "said"),
    [
        ("llama", {"pp": 2, "sp": 2}, "collect_rows in lm_head stands between the head and the result"),
        ("masked:bert", {"pp": 2, "base": True}, "no vocabulary head"),
    ],
)
def test_what_cannot_be_shared_out_is_refused(name: str, plan: dict[str, Any], said: str) -> None:
    program = traced(name)[1]
    if plan.pop("base", False):
        program = program.copy()
        program.has_head = False
    with pytest.raises(PlanError, match=said):
        compile_program(program, Plan(**plan, passes=SHARED))


# -- negative controls -------------------------------------------------------------------------------------------------


def test_rows_that_change_places_are_seen() -> None:
    program = parts("llama", "pp=2").program.copy()
    layout = program.weight_layouts["lm_head.weight"]
    split = layout.dims[0]
    assert isinstance(split, Split)
    program.weight_layouts["lm_head.weight"] = layout.with_dim(0, Split(split.axes, split.owned[::-1]))
    with pytest.raises(LayoutError):
        check(program)


def test_a_hidden_state_that_reaches_the_last_stage_only_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    found = compiled("llama", 1, pp=2, passes=SHARED)
    ids = tokens("llama", 3)
    whole = found.simulate(input_ids=ids)

    def kept(channel: Channel, x: Tensor) -> Tensor:
        return x if channel.node in names else original(channel, x)

    names = {crossing.name for crossing in found.rank(0).shared_head.receives}
    original = Channel.all_reduce
    monkeypatch.setattr(Channel, "all_reduce", kept)
    wrong = found._simulator(input_ids=ids)[0]
    assert not torch.allclose(wrong, whole)


def test_a_stage_that_leaves_the_head_out_waits_for_ever() -> None:
    boundaries = boundaries_of(parts("llama", "pp=3").program)
    for right, without in (
        (chain(3, 2, heads=(0, 1)), chain(3, 2)),
        (ring(3, 3, 9, shares_head=True), ring(3, 3, 9)),
    ):
        play_schedule(right, boundaries)
        with pytest.raises(RankMismatch):
            play_schedule((*right[:2], without[2]), boundaries)
