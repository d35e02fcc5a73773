"""Steps of many requests that choose their tokens themselves tell each what it is told alone, whatever others ask.

What a GPU captures runs here as it is, step by step: the same ops on the same tensors.
"""

from __future__ import annotations

import random
from collections import Counter
from typing import Any

import pytest
import torch

from partitioner.sharding.mesh import Mesh
from runtime.communication.thread_communicator import ThreadGroup
from runtime.generation.batching import chosen_steps, places
from runtime.generation.batching.batch_loop import BatchLoop
from runtime.generation.batching.choose_rows import RowChooser
from runtime.generation.decode_graphs.decoder import Decoder
from runtime.generation.generation_request import GenerationRequest
from runtime.kv_cache.cache_size import CacheSize
from runtime.sampling import row_sampler
from tests.runtime.generation.batching import many_requests
from tests.runtime.generation.batching.many_requests import Case, assert_as_alone, mixed, on_all_ranks
from tests.support.partitioned import compiled, compiled_for

ROOMY = CacheSize(max_batch=8, max_length=96, prefill_step=16)
PENALTIES: list[dict[str, Any]] = [
    {"presence_penalty": 0.8, "frequency_penalty": 0.4, "do_sample": True},
    {"logit_bias": {7: 4.0, 100: -3.0}, "suppress_tokens": [9, 10]},
    {"repetition_penalty": 1.5, "logprobs": True},
    {"do_sample": True, "top_k": 0, "typical_p": 0.8, "repetition_penalty": 0.8},
]


@pytest.fixture
def in_steps(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Has loops choose in steps, once it is told to; counts such steps, and rows that are chosen behind any step."""
    counts: Counter[str] = Counter()
    chosen, choose = Decoder._chosen, RowChooser.choose

    def counted(decoder: Decoder, *args: Any, **kwargs: Any) -> Any:
        counts["steps"] += 1
        return chosen(decoder, *args, **kwargs)

    def behind(chooser: RowChooser, logits: Any, asked: Any) -> Any:
        counts["behind"] += len(asked)
        return choose(chooser, logits, asked)

    # prompts in steps of their own, so that many steps are of single tokens
    monkeypatch.setattr(places, "why_not_packed", lambda *given: "not here")
    monkeypatch.setattr(Decoder, "_chosen", counted)
    monkeypatch.setattr(RowChooser, "choose", behind)
    monkeypatch.setattr(BatchLoop, "chooses_in_step", lambda loop, run: counts["on"] > 0 and run.work.decode)
    return counts


@pytest.mark.parametrize("tp", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_each_is_told_what_it_is_told_alone(tp: int, in_steps: Counter[str]) -> None:
    cases = mixed(14, longest=40, new=8)
    cases += [Case([4 + n, 7], {"max_new_tokens": 9, **options}, n) for n, options in enumerate(PENALTIES)]
    parts = compiled("llama", tp)
    alone = many_requests.alone(parts, cases)
    plain = on_all_ranks(parts, cases, ROOMY)
    assert not in_steps["steps"]
    before = in_steps["behind"]
    in_steps["on"] = 1
    found = on_all_ranks(parts, cases, ROOMY)
    assert_as_alone(cases, found, alone)
    assert in_steps["steps"] > 10
    assert in_steps["behind"] - before < before / 2  # first tokens, and those of rules that the host applies
    assert found.status["why_chosen_behind"] == "no_repeat_ngram_size"
    assert plain.status["why_chosen_behind"] == ""
    for number, scores in plain.logprobs.items():
        assert found.logprobs[number] == pytest.approx(scores, abs=1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("plan", ["ep=2", "tp=2,ep=4"])
def test_ranks_with_sequences_of_their_own(plan: str, in_steps: Counter[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """All of them take steps of the same kind at the same time, whatever their own rows ask for."""
    kinds: dict[tuple[int, int], list[Any]] = {}
    chosen = Decoder._chosen

    def watched(decoder: Decoder, seen: int, kind: Any, **options: Any) -> Any:
        kinds.setdefault((decoder._program.rank, decoder.batch), []).append(kind)
        return chosen(decoder, seen, kind, **options)

    monkeypatch.setattr(Decoder, "_chosen", watched)
    cases = mixed(10, longest=30, new=6)
    whole = compiled_for("qwen3_moe", "tp=1")
    alone = many_requests.alone(whole, cases)
    in_steps["on"] = 1
    found = on_all_ranks(compiled_for("qwen3_moe", plan), cases, ROOMY)
    assert_as_alone(cases, found, alone)
    assert len(kinds) > 2
    for (_, batch), said in kinds.items():
        assert said == kinds[0, batch]
    assert in_steps["steps"] > 10


def test_rows_that_are_not_certain_are_asked_again(monkeypatch: pytest.MonkeyPatch, in_steps: Counter[str]) -> None:
    drawn = {"max_new_tokens": 8, "do_sample": True, "top_k": 0, "top_p": 0.95, "eos_token_id": []}
    cases = [Case([3 + n, 5], {**drawn, "seed": n, "top_p": 0.95 if n % 2 else 1e-6}) for n in range(4)]
    parts = compiled("llama", 1)
    alone = many_requests.alone(parts, cases)
    monkeypatch.setattr(row_sampler, "_LOOK", 4)
    monkeypatch.setattr(row_sampler, "_LEAST", 2)
    in_steps["on"] = 1
    found = on_all_ranks(parts, cases, ROOMY)
    assert_as_alone(cases, found, alone)
    assert 4 < in_steps["behind"] < 4 * 8
    assert found.status["why_chosen_behind"] == ""


def test_logits_that_are_no_numbers_are_those_of_one_row(
    monkeypatch: pytest.MonkeyPatch, in_steps: Counter[str]
) -> None:
    cases = [Case([3 + n, 5], {"max_new_tokens": 6, "eos_token_id": [], "do_sample": n == 1}) for n in range(3)]
    parts = compiled("llama", 1)
    alone = many_requests.alone(parts, cases)
    run = Decoder._run

    def broken(decoder: Decoder, seen: int) -> Any:
        logits = run(decoder, seen)
        if decoder.batch == 4 and not in_steps["broken"]:
            in_steps["broken"] += 1
            logits[1] = float("nan")
        return logits

    monkeypatch.setattr(Decoder, "_run", broken)
    in_steps["on"] = 1
    found = on_all_ranks(parts, cases, ROOMY)
    assert "no token can be chosen" in str(found.errors[1])
    assert [found.tokens[0], found.tokens[2]] == [alone[0], alone[2]]


@pytest.mark.parametrize("prefill_step", [1, 16])
def test_first_tokens_that_steps_of_single_tokens_choose(prefill_step: int, in_steps: Counter[str]) -> None:
    """Of prompts whose last piece is one token: what is said of the first token alone holds there as well."""
    whole = compiled("llama", 1)
    options: dict[str, Any] = {"max_new_tokens": 3, "eos_token_id": [], "prefill_step": prefill_step}
    prompts = [[9], [4, 7, 5], [11, 8]]
    likeliest = many_requests.alone(whole, [Case(prompt, options) for prompt in prompts])
    cases = [
        Case(prompt, {**options, "begin_suppress_tokens": [said[0]]})
        for prompt, said in zip(prompts, likeliest, strict=True)
    ]
    expected = many_requests.alone(whole, cases)
    assert all(said[0] != other[0] for said, other in zip(expected, likeliest, strict=True))
    in_steps["on"] = 1
    assert_as_alone(cases, on_all_ranks(whole, cases, ROOMY), expected)
    assert in_steps["steps"] > 1


def test_tokens_that_are_given_are_not_chosen(in_steps: Counter[str]) -> None:
    """Log-probabilities of texts, where ranks have sequences of their own."""
    texts = [[5 + 7 * row, 9, 60 - row, 4, 33 + row, 8] for row in range(3)]
    held = compiled_for("qwen3_moe", "ep=2")
    expected = held.log_probabilities(texts)
    in_steps["on"] = 1
    assert torch.allclose(held.log_probabilities(texts), expected, atol=1e-9, rtol=0)
    assert in_steps["steps"] > 4


@pytest.fixture
def ahead(monkeypatch: pytest.MonkeyPatch, in_steps: Counter[str]) -> Counter[str]:
    """`in_steps`, each begun before the one before it is read; counts those."""
    again = Decoder.again

    def counted(decoder: Decoder, *args: Any, **kwargs: Any) -> Any:
        in_steps["ahead"] += 1
        return again(decoder, *args, **kwargs)

    monkeypatch.setattr(Decoder, "again", counted)
    in_steps["on"] = 1
    return in_steps


def ending_early(cases: list[Case], alone: list[list[int]]) -> list[Case]:
    """Every other one ends with a token that it is told on its way."""
    return [
        Case(case.prompt, {**case.options, "eos_token_id": [told[len(told) // 2]]}, case.arrival, case.cancelled)
        if number % 2 and len(told) > 3
        else case
        for number, (case, told) in enumerate(zip(cases, alone, strict=True))
    ]


@pytest.mark.parametrize("tp", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_step_that_begins_before_the_latest_is_read_tells_the_same(tp: int, ahead: Counter[str]) -> None:
    """Rows that end, come, are cancelled, or are chosen by the host meanwhile; in a cache that is full now and then."""
    drawn = {"max_new_tokens": 14, "do_sample": True, "seed": 3, "eos_token_id": []}
    cases = [Case([3 + n, 5, 7 + n % 3], {**drawn, **PENALTIES[n % 4], "logprobs": True}, 3 * n) for n in range(8)]
    cases += [
        Case(list(range(2, 12 + n)), {"max_new_tokens": 16, "eos_token_id": []}, n, cancelled=(None, 7)[n % 2])
        for n in range(4)
    ]
    cases.append(Case([4, 4], {"max_new_tokens": 9, "no_repeat_ngram_size": 2, "eos_token_id": []}, 12))
    parts = compiled("llama", tp)
    cases = ending_early(cases, many_requests.alone(parts, cases))
    alone = many_requests.alone(parts, cases)
    for size in (ROOMY, CacheSize(max_batch=1, max_length=64, prefill_step=16)):
        before = ahead["ahead"]
        found = on_all_ranks(parts, cases, size)
        assert_as_alone(cases, found, alone)
        assert ahead["ahead"] > before + 5


def test_rows_that_were_not_certain_are_run_again(monkeypatch: pytest.MonkeyPatch, ahead: Counter[str]) -> None:
    drawn = {"max_new_tokens": 12, "do_sample": True, "top_k": 0, "top_p": 0.95, "eos_token_id": []}
    cases = [Case([3 + n, 5], {**drawn, "seed": n, "top_p": 0.95 if n % 2 else 1e-6}) for n in range(4)]
    parts = compiled("llama", 1)
    alone = many_requests.alone(parts, cases)
    monkeypatch.setattr(row_sampler, "_LOOK", 4)
    monkeypatch.setattr(row_sampler, "_LEAST", 2)
    assert_as_alone(cases, on_all_ranks(parts, cases, ROOMY), alone)
    assert ahead["ahead"] > 4
    assert ahead["behind"] > 4
    # what began with another token has to count for nothing
    monkeypatch.setattr(chosen_steps.UnderWay, "void", property(lambda _: set(), lambda *_: None), raising=False)
    with pytest.raises(AssertionError):
        assert_as_alone(cases, on_all_ranks(parts, cases, ROOMY), alone)


class Replayed:
    """A graph that runs its ops again, into what they yielded when it was captured."""

    def __init__(self, run: Any) -> None:
        self._run, self.result = run, run()

    def replay(self) -> None:
        for held, new in zip(self.result, self._run(), strict=True):
            held.copy_(new)

    def reset(self) -> None:
        pass


def test_steps_are_captured_before_requests_come(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a few numbers of rows; 200 requests of ever new lengths then capture nothing."""
    captures: Counter[int] = Counter()

    def capture(decoder: Decoder, run: Any, seen: int) -> Any:
        captures[decoder.batch] += 1
        graph = Replayed(lambda: run(seen))
        return graph, graph.result

    monkeypatch.setattr(Decoder, "_capture", capture)
    monkeypatch.setattr(Decoder, "_captures", property(lambda _: True, lambda *_: None), raising=False)
    parts = compiled("llama", 1)
    engine = parts.engine(0, ThreadGroup(Mesh.of()).communicator(0))
    loop = engine.batching(CacheSize(max_batch=1, max_length=400, prefill_step=64), rows=12)
    loop._decoding["cuda_graph"] = True
    loop.reserve(CacheSize(max_batch=1, max_length=400, prefill_step=64))
    assert captures == {1: 1, 4: 1, 12: 1}
    draw = random.Random(0)
    lengths = [(draw.randrange(1, 16), draw.randrange(1, 4)) for _ in range(200)]
    prompts = [[draw.randrange(3, 100) for _ in range(length)] for length, _ in lengths]
    told: dict[int, list[int]] = {number: [] for number in range(200)}
    for number, (prompt, (_, new)) in enumerate(zip(prompts, lengths, strict=True)):
        options = {"max_new_tokens": new, "eos_token_id": []}
        loop.add(number, GenerationRequest.of([prompt], None, options, eos_token_id=()))
    while loop.status()["running"] + loop.status()["waiting"]:
        for each in loop.step():
            told[each.number].append(each.token)
    assert sum(captures.values()) == 3
    for number in range(0, 200, 40):
        step = parts.stream([prompts[number]], max_new_tokens=lengths[number][1], eos_token_id=[])
        assert told[number] == [each.tokens[0] for each in step]
