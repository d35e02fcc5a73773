"""Requests of all kinds, what each is told alone, and what they are told together on simulated ranks."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from partitioner.program.ranks import Ranks
from runtime.engine.engine import Engine
from runtime.generation.batching.batch_loop import BatchLoop
from runtime.generation.batching.own_batches import DealtScheduler
from runtime.generation.generation_request import GenerationRequest
from runtime.kv_cache.cache_size import CacheSize

VOCABULARY = 128
KINDS: tuple[dict[str, Any], ...] = (
    {},
    {"do_sample": True, "top_k": 20},
    {"do_sample": True, "temperature": 1.7, "top_p": 0.9, "top_k": 0},
    {"repetition_penalty": 1.3},
    {"do_sample": True, "top_k": 0, "logprobs": True},
    {"no_repeat_ngram_size": 2, "min_new_tokens": 3},
    {"prefill_step": 5},
)


class Letters:
    """A tokenizer of one letter per token."""

    def decode(self, ids: Sequence[int]) -> str:
        return "".join(chr(ord("A") + each) for each in ids)


@dataclass(frozen=True)
class Case:
    """prompt and options; after how many steps of all it comes, and after how many tokens it is cancelled, if it is."""

    prompt: list[int]
    options: dict[str, Any]
    arrival: int = 0
    cancelled: int | None = None


@dataclass
class Outcome:
    """What came of many requests on one rank."""

    tokens: dict[int, list[int]] = field(default_factory=dict)
    logprobs: dict[int, list[float]] = field(default_factory=dict)
    tops: dict[int, list[Any]] = field(default_factory=dict)
    errors: dict[int, Exception] = field(default_factory=dict)
    status: dict[str, Any] = field(default_factory=dict)
    decode_steps: int = 0


def mixed(count: int, *, longest: int, new: int, seed: int = 0) -> list[Case]:
    """Greedy and drawn, with rules and stop strings, short and long, some of which nobody waits for to the end."""
    draw = random.Random(seed)
    cases = []
    for number in range(count):
        length = draw.choice((1, 2, draw.randint(1, longest), draw.randint(1, longest)))
        options = {"max_new_tokens": draw.randint(1, new), "seed": draw.randint(0, 3), "eos_token_id": []}
        options |= KINDS[number % len(KINDS)]
        if draw.random() < 0.3:
            options |= {"stop_strings": [chr(ord("A") + draw.randrange(VOCABULARY)) for _ in range(12)]}
            options |= {"tokenizer": Letters()}
        if draw.random() < 0.3:
            options["eos_token_id"] = [draw.randrange(VOCABULARY) for _ in range(6)]
        cancelled = draw.randint(0, new // 2) if draw.random() < 0.15 else None
        prompt = [draw.randrange(3, VOCABULARY) for _ in range(length)]
        cases.append(Case(prompt, options, draw.randint(0, count // 2), cancelled))
    return cases


def alone(parts: Ranks, cases: Sequence[Case]) -> list[list[int]]:
    """What each is told, one after the other; without what fills up the end."""
    found = []
    for case in cases:
        steps = list(parts.stream([case.prompt], **case.options))
        found.append([step.tokens[0] for step in steps])
    return found  # type: ignore[return-value]


def request(case: Case) -> GenerationRequest:
    return GenerationRequest.of([case.prompt], None, case.options, eos_token_id=())


def serve(
    engine: Engine, cases: Sequence[Case], size: CacheSize, *, block_size: int = 4, vocabulary: str | None = None
) -> Outcome:
    """One rank's part."""
    made = engine.batching(size, vocabulary=vocabulary)
    made._block_size = block_size
    found = Outcome({number: [] for number in range(len(cases))}, {number: [] for number in range(len(cases))})
    waiting = sorted(range(len(cases)), key=lambda number: cases[number].arrival)
    there: set[int] = set()
    step = 0
    while waiting or there:
        assert step < 20000, "requests that never end"
        while waiting and cases[waiting[0]].arrival <= step:
            number = waiting.pop(0)
            made.add(number, request(cases[number]))
            there.add(number)
        for told in made.step():
            if told.error is not None:
                found.errors[told.number] = told.error
            else:
                found.tokens[told.number].append(told.token)
                if told.top is not None:
                    found.tops.setdefault(told.number, []).append(told.top)
                if told.logprob is not None:
                    found.logprobs[told.number].append(told.logprob)
            if told.is_over:
                there.discard(told.number)
        for number in list(there):
            cancelled = cases[number].cancelled
            if cancelled is not None and len(found.tokens[number]) >= cancelled:
                made.cancel(number)
                there.discard(number)
        step += 1
    found.status, found.decode_steps = made.status(), step
    for _ in range(4):  # what is still on its way through stages
        assert made.step() == []
    assert_empty(made)
    made.release()
    return found


def assert_empty(loop: BatchLoop) -> None:
    """Nothing is left of requests that are over."""
    assert not loop._asked
    several = loop.scheduler.each if isinstance(loop.scheduler, DealtScheduler) else [loop.scheduler]
    for scheduler in several:
        assert (scheduler.running, scheduler.waiting) == (0, 0)
        assert scheduler.pool.free == scheduler.limits.blocks
        assert not scheduler._pending


def on_all_ranks(parts: Any, cases: Sequence[Case], size: CacheSize, **options: Any) -> Outcome:
    """The same on every simulated rank; rank 0's outcome."""
    first, *others = parts._simulator.run(lambda engine: serve(engine, cases, size, **options))
    for other in others:
        assert other.tokens == first.tokens
        assert other.status == first.status
    return first  # type: ignore[no-any-return]


def assert_as_alone(cases: Sequence[Case], found: Outcome, expected: Sequence[Sequence[int]]) -> None:
    for number, case in enumerate(cases):
        said, wanted = found.tokens[number], list(expected[number])
        if case.cancelled is not None:
            wanted = wanted[: len(said)]
        assert said == wanted, f"request {number}: {case}"


def float64(parts: Any) -> bool:
    return all(weight.dtype == torch.float64 for weight in parts.rank(0).weights)
