"""Many requests at once: each is told what it is told alone, whatever else runs."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest

from partitioner import Plan
from partitioner.errors import InputError, SamplingError
from runtime.generation.generation_request import GenerationRequest
from runtime.kv_cache.cache_size import CacheSize, WhatIsKept
from tests.runtime.generation.batching import many_requests
from tests.runtime.generation.batching.many_requests import Case, assert_as_alone, mixed, on_all_ranks
from tests.support import stepping
from tests.support.partitioned import compiled
from tests.support.zoo import WINDOW

ROOMY = CacheSize(max_batch=8, max_length=96, prefill_step=16)
TIGHT = CacheSize(max_batch=3, max_length=40, prefill_step=16)


def parts(plan: str, name: str = "llama") -> Any:
    given = Plan.parse(plan)
    return compiled(name, given.tp, pp=given.pp, sp=given.sp, passes=given.passes)


@functools.cache
def expected(count: int, longest: int, new: int) -> tuple[list[Case], list[list[int]]]:
    cases = mixed(count, longest=longest, new=new)
    return cases, many_requests.alone(parts("tp=1"), cases)


SHARED_HEAD = "pp=2,pipeline.share_head=true"


@pytest.mark.parametrize("plan", ["tp=1", "tp=2", "pp=2", "sp=2", SHARED_HEAD])
def test_each_is_told_what_it_is_told_alone(plan: str) -> None:
    cases, alone = expected(14, 40, 8)
    found = on_all_ranks(parts(plan), cases, ROOMY)
    assert_as_alone(cases, found, alone)
    assert found.status["preemptions"] == 0
    assert found.decode_steps < sum(map(len, alone)), "they ran at the same time"


@pytest.mark.parametrize("plan", ["pp=2", *(pytest.param(p, marks=pytest.mark.slow) for p in ("pp=3", "tp=2,pp=2"))])
def test_the_most_probable_tokens_are_named_over_stages(plan: str) -> None:
    """Of rows side by side, of which some want none, and none but their own token."""
    wanted = (None, 3, 0, 1, None, 20)
    cases = [
        Case([5 + n, 7, 9][: 1 + n % 3], {"max_new_tokens": 4 + n, "top_logprobs": most, "do_sample": n % 2 == 1})
        for n, most in enumerate(wanted)
    ]
    whole, found = on_all_ranks(parts("tp=1"), cases, ROOMY), on_all_ranks(parts(plan), cases, ROOMY)
    assert found.tokens == whole.tokens
    assert found.tops.keys() == {n for n, most in enumerate(wanted) if most is not None}
    for number, tops in found.tops.items():
        assert [len(top) for top in tops] == [1 + (wanted[number] or 0)] * len(found.tokens[number])
        assert [top[0][0] for top in tops] == found.tokens[number]
        for mine, other in zip(tops, whole.tops[number], strict=True):
            assert [token for token, _ in mine] == [token for token, _ in other]
            assert [value for _, value in mine] == pytest.approx([value for _, value in other], abs=1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("plan", ["tp=1", "tp=2", "pp=2", "pp=3", "tp=2,pp=2", "sp=2", f"tp=2,{SHARED_HEAD}"])
def test_64_requests(plan: str) -> None:
    cases, alone = expected(64, 200, 30)
    found = on_all_ranks(parts(plan), cases, CacheSize(max_batch=8, max_length=232, prefill_step=64))
    assert_as_alone(cases, found, alone)


@pytest.mark.parametrize("plan", ["tp=1", "pp=2"])
def test_a_full_cache_costs_time_and_no_request(plan: str) -> None:
    cases = [Case([5 + n, 7, 9][: 1 + n % 3], {"max_new_tokens": 20, "eos_token_id": []}) for n in range(8)]
    found = on_all_ranks(parts(plan), cases, CacheSize(max_batch=6, max_length=10, prefill_step=16))
    assert_as_alone(cases, found, many_requests.alone(parts("tp=1"), cases))
    assert found.status["preemptions"] > 0


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("plan", ["tp=2", "pp=3"])
def test_whatever_comes_goes_and_does_not_fit(plan: str, seed: int) -> None:
    cases = mixed(24, longest=20, new=14, seed=seed)
    alone = many_requests.alone(parts("tp=1"), cases)
    found = on_all_ranks(parts(plan), cases, CacheSize(max_batch=5, max_length=8, prefill_step=8))
    assert_as_alone(cases, found, alone)
    assert found.status["preemptions"] > 0
    assert any(case.cancelled is not None for case in cases)


def test_states_per_sequence() -> None:
    held = stepping.compiled("mamba2", 1)
    cases = mixed(6, longest=12, new=5)
    found = on_all_ranks(held, cases, CacheSize(max_batch=3, max_length=40))
    assert_as_alone(cases, found, many_requests.alone(held, cases))
    assert found.status["prefix_hits"] == 0
    assert "state per sequence" in found.status["why_not_kept"]


def test_equal_prefixes_are_run_once() -> None:
    prefix = [3 + number % 50 for number in range(61)]
    cases = [
        Case(prefix + [60 + number] * (1 + number % 5), {"max_new_tokens": 4, "eos_token_id": []}, arrival=number % 3)
        for number in range(32)
    ]
    tails = sum(len(case.prompt) - len(prefix) for case in cases)
    held = parts("tp=1")
    found = on_all_ranks(held, cases, ROOMY, block_size=1)
    assert_as_alone(cases, found, many_requests.alone(held, cases))
    assert found.status["prefill_tokens"] <= 1.1 * len(prefix) + tails
    assert found.status["prefix_hits"] == 31 * len(prefix)
    # with longer blocks, what is left of the prefix behind the last full one is run by each
    found = on_all_ranks(held, cases, ROOMY, block_size=4)
    assert found.status["prefill_tokens"] == len(prefix) + tails + 31 * (len(prefix) % 4)


def test_a_long_prompt_holds_nobody_up() -> None:
    """While its pieces run, the other gets a token after each of them."""
    order: list[tuple[int, bool]] = []

    def work(engine: Any) -> None:
        loop = engine.batching(CacheSize(max_batch=2, max_length=90, prefill_step=8))
        run = loop.run

        def noted(given: Any, received: Any = ()) -> Any:
            order.extend((turn.number, given.work.decode) for turn in given.work.turns)
            return run(given, received)

        loop.run = noted
        loop.add(0, many_requests.request(Case([5, 6], {"max_new_tokens": 20, "eos_token_id": []})))
        loop.step()
        loop.add(1, many_requests.request(Case([7] * 80, {"max_new_tokens": 1, "eos_token_id": []})))
        for _ in range(40):
            loop.step()

    parts("tp=1")._simulator.run(work)
    pieces = [at for at, (number, _) in enumerate(order) if number == 1]
    assert len(pieces) == 10
    assert all(later - earlier == 2 for earlier, later in itertools.pairwise(pieces))


@pytest.mark.parametrize("plan", [*(pytest.param(plan, marks=pytest.mark.slow) for plan in ("tp=1", "tp=2")), "pp=2"])
def test_blocks_behind_the_windows_of_all_layers_are_given_back(plan: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Texts of more tokens than the window, with a prefix in common; the control has layers without one."""
    prefix = [3 + n % 50 for n in range(30)]
    cases = [Case([*prefix[: 30 - n], 60 + n], {"max_new_tokens": 12, "eos_token_id": []}, n) for n in range(5)]
    size = CacheSize(max_batch=3, max_length=48, prefill_step=8)
    made = parts(plan, "mistral")
    found = on_all_ranks(made, cases, size)
    alone = many_requests.alone(parts("tp=1", "mistral"), cases)
    assert_as_alone(cases, found, alone)
    assert found.status["blocks_behind"] >= 5 * (38 - WINDOW) // 4 - 5
    plain = on_all_ranks(parts(plan), cases, size)
    assert plain.status["blocks_behind"] == 0
    agreed = WhatIsKept.agreed
    monkeypatch.setattr(WhatIsKept, "agreed", lambda *given: replace(agreed(*given), sees=1))
    wrong = on_all_ranks(made, cases, size)  # a control: given back while they are seen still
    assert [wrong.tokens[number] for number in range(len(cases))] != alone


@pytest.mark.parametrize(
    ("name", "plan", "why"),
    [
        ("llama", "tp=1", "not the kernel's in all layers"),
        ("mamba2", "tp=1", "states per sequence"),
        ("llama", "sp=2", "sp"),
    ],
)
def test_why_steps_run_node_by_node_is_said(name: str, plan: str, why: str, caplog: pytest.LogCaptureFixture) -> None:
    """Where steps were to be compiled, which no kernel for single tokens here allows; not where nobody asked."""

    def status(engine: Any, *, compile: bool) -> dict[str, Any]:
        with decoding(engine, compile=compile):
            loop = engine.batching(CacheSize(max_batch=2, max_length=16, prefill_step=8))
            loop.add(0, many_requests.request(Case([5], {"max_new_tokens": 2})))
            found: dict[str, Any] = loop.status()
            return found

    def said() -> list[str]:
        return [record.getMessage() for record in caplog.records if record.name == "partitioner"]

    made = stepping.compiled(name, 1) if name == "mamba2" else parts(plan, name)
    assert made._simulator.run(functools.partial(status, compile=False))[0]["why_eager"] == ""
    assert not said()
    found = made._simulator.run(functools.partial(status, compile=True))[0]["why_eager"]
    assert found.startswith("compile: ")
    assert why in found
    assert said() == [f"decode steps run node by node, in spite of {found}"]


@contextmanager
def decoding(engine: Any, *, compile: bool) -> Iterator[None]:
    """A simulated rank as if it had been connected so."""
    before = engine.__dict__.pop("_generate_loop", None)
    engine._decoding["compile"] = compile
    try:
        yield
    finally:
        engine._decoding["compile"] = False
        engine.__dict__.pop("_generate_loop", None)
        if before is not None:
            engine._generate_loop = before


def test_what_never_fits_is_refused_in_words() -> None:
    def work(engine: Any) -> None:
        loop = engine.batching(TIGHT)
        with pytest.raises(InputError, match="room for 144 of one request"):
            loop.add(0, many_requests.request(Case([5] * 100, {"max_new_tokens": 60})))
        longest = loop.status()["longest_that_fits"]
        assert longest == 145  # the last token is not run
        with pytest.raises(InputError, match="room for 144 of one request"):
            loop.add(0, many_requests.request(Case([5] * 100, {"max_new_tokens": longest - 99})))
        loop.add(0, many_requests.request(Case([5] * 100, {"max_new_tokens": longest - 100})))
        loop.cancel(0)
        with pytest.raises(InputError, match="out of range"):
            loop.add(1, many_requests.request(Case([5000], {"max_new_tokens": 4})))
        with pytest.raises(InputError, match="one row"):
            loop.add(2, GenerationRequest.of([[3], [4]], None, {}, eos_token_id=()))
        assert loop.step() == []

    parts("tp=1")._simulator.run(work)


def test_one_that_has_no_token_left_is_refused_alone() -> None:
    held = parts("tp=1")
    every = list(range(many_requests.VOCABULARY))
    good = Case([5, 6], {"max_new_tokens": 6, "eos_token_id": []})
    bad = Case([9], {"max_new_tokens": 6, "suppress_tokens": every, "eos_token_id": []})
    found = on_all_ranks(held, [good, bad, good], ROOMY)
    assert found.tokens[0] == found.tokens[2] == many_requests.alone(held, [good])[0]
    assert isinstance(found.errors[1], (InputError, SamplingError))
    assert found.tokens[1] == []


def test_another_cache_in_the_middle_changes_no_token() -> None:
    held = parts("tp=2")
    cases = [Case([5 + n] * (3 + n), {"max_new_tokens": 12, "eos_token_id": [], "seed": n}) for n in range(4)]

    def work(engine: Any) -> tuple[dict[int, list[int]], dict[int, str]]:
        loop = engine.batching(ROOMY)
        said: dict[int, list[int]] = {number: [] for number in range(len(cases))}
        errors: dict[int, str] = {}
        for number, case in enumerate(cases):
            loop.add(number, many_requests.request(case))
        for step in range(60):
            if step == 6:
                loop.reserve(CacheSize(max_batch=2, max_length=17))
            for told in loop.step():
                if told.error is None:
                    said[told.number].append(told.token)
                else:
                    errors[told.number] = str(told.error)
        return said, errors

    (said, errors), other = held._simulator.run(work)
    assert (said, errors) == other
    assert errors == {}
    assert list(said.values()) == many_requests.alone(held, cases)
