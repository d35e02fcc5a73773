"""Generation over pipeline stages: what one rank says, with every option, in every order of ends."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from partitioner import Plan
from partitioner.errors import InputError
from runtime.generation.generation_request import Generated
from runtime.pipeline.message import Message, MessageReader, MessageWriter, message_bytes
from runtime.pipeline.schedule import groups_of
from runtime.program.rank_program import Crossing
from tests.support import generated
from tests.support.generated import prompts
from tests.support.partitioned import EXACT, compiled_once

PLANS = ("pp=2", "pp=3", "tp=2,pp=2")


def parts(name: str, plan: str) -> Any:
    given = Plan.parse(plan)
    return compiled_once(name, given.tp, pp=given.pp)


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("batch", [1, pytest.param(2, marks=pytest.mark.slow), 4])
def test_stages_say_what_the_model_says(plan: str, batch: int) -> None:
    texts = prompts("llama")[:batch]
    assert generated.error("llama", parts("llama", plan), texts, prefill_step=4) < EXACT


@pytest.mark.parametrize(
    "options",
    [
        {"do_sample": True, "seed": 3, "top_k": 20},
        {"repetition_penalty": 1.3},
        {"no_repeat_ngram_size": 2, "min_new_tokens": 3},
        {"logprobs": True, "do_sample": True, "temperature": 1.5},
    ],
)
def test_options_mean_the_same(options: dict[str, Any]) -> None:
    texts = prompts("llama", (4, 7, 2))
    said = []
    for plan in ("tp=1", "pp=2", "pp=3"):
        found = parts("llama", plan).generate(texts, max_new_tokens=9, eos_token_id=[], **options)
        said.append(found.sequences if isinstance(found, Generated) else found)
    assert torch.equal(said[0], said[1])
    assert torch.equal(said[0], said[2])


@pytest.mark.parametrize("plan", PLANS)
def test_sequences_end_at_different_times(plan: str) -> None:
    texts = prompts("llama", (4, 7, 2))
    free = parts("llama", "tp=1").generate(texts, max_new_tokens=12, eos_token_id=[])
    for ends in ([int(free[0, -12])], [int(free[1, -9])], [int(free[0, -7]), int(free[2, -10])]):
        one, many = (
            parts("llama", each).generate(texts, max_new_tokens=12, eos_token_id=ends, pad_token_id=0)
            for each in ("tp=1", plan)
        )
        assert torch.equal(one, many)


@pytest.mark.parametrize("plan", PLANS)
def test_one_new_token_and_two(plan: str) -> None:
    texts = prompts("llama", (4, 7))
    for new in (1, 2):
        one, many = (
            parts("llama", each).generate(texts, max_new_tokens=new, eos_token_id=[]) for each in ("tp=1", plan)
        )
        assert torch.equal(one, many)


def test_streams_come_in_order_and_can_be_left() -> None:
    staged = parts("llama", "pp=3")
    texts = prompts("llama", (4, 7, 2))
    whole = staged.generate(texts, max_new_tokens=6, eos_token_id=[])
    steps = [step.tokens for step in staged.stream(texts, max_new_tokens=6, eos_token_id=[])]
    assert torch.equal(torch.tensor(steps).t(), whole[:, -6:])
    left = staged.stream(texts, max_new_tokens=6, eos_token_id=[])
    next(left)
    next(left)
    left.close()
    assert torch.equal(staged.generate(texts, max_new_tokens=6, eos_token_id=[]), whole)


def test_every_rank_may_leave_its_stream_after_the_same_step() -> None:
    staged = parts("llama", "pp=3")
    texts = prompts("llama", (4, 7, 2))

    def three(engine: Any) -> list[Any]:
        stream = engine.stream(texts, max_new_tokens=9, eos_token_id=[])
        found = [next(stream).tokens for _ in range(3)]
        stream.close()
        return found

    first, second, third = staged._simulator.run(three)
    assert first == second == third
    assert torch.equal(torch.tensor(first).t(), staged.generate(texts, max_new_tokens=3, eos_token_id=[])[:, -3:])


def test_a_message_comes_out_as_it_went_in() -> None:
    crossings = (
        Crossing("hidden", ("batch", "sequence", 3), torch.float32),
        Crossing("residual", ("batch", "sequence", 5), torch.float64),
    )
    values = (torch.rand(2, 1, 3), torch.rand(2, 1, 5, dtype=torch.float64))
    given = Message(7, (5, 2**40), (-0.5, -1.25), values)
    writer = MessageWriter(message_bytes(crossings, 4), 4, torch.device("cpu"))
    reader = MessageReader(4, crossings, scored=True)
    for _ in range(2):
        writer.write(*given)
        found = reader.read(writer.packed, 2)
        assert (found.step, found.tokens, found.logprobs) == (given.step, given.tokens, given.logprobs)
        assert all(torch.equal(a, b) for a, b in zip(found.values, values, strict=True))
        writer.write(8, (1, 2, 3), None, ())
        assert reader.read(writer.packed, 3)[:2] == (8, (1, 2, 3))
        assert reader.read(writer.packed, 3).values == ()
        given = Message(9, (2**60, 0), (-2.5, 0.0), values := tuple(value + 1 for value in values))
    with pytest.raises(InputError, match="grows with the slots"):
        message_bytes((Crossing("mask", ("batch", "slots"), torch.float32),), 1)


def test_groups_are_as_many_as_stages() -> None:
    assert [(group.start, group.stop) for group in groups_of(5, 2)] == [(0, 2), (2, 5)]
    assert [(group.start, group.stop) for group in groups_of(2, 3)] == [(0, 1), (1, 2), (2, 2)]
