"""Steps that requests share: closed forms where there are some, and a simulation by nothing but steps."""

import random
from collections.abc import Sequence
from dataclasses import replace

import pytest

from partitioner.planning.pricing.batching import Curve, FrontEnd, Load, Scheduler, Served, StepSeconds, play

PROMPT, TOKEN = 1.0, 0.01
FLAT = StepSeconds(Curve((1.0,), (TOKEN,)), Curve((1.0,), (0.0,)), Curve((1.0,), (PROMPT,)))
"""Each step with prompts takes a second, each step of tokens 10 ms."""


def served(requests: int, *, new: int = 100, slots: int = 1000, waves: int = 200, **rule: object) -> Served:
    scheduler = replace(Scheduler(budget=10 + requests), **rule)  # type: ignore[arg-type]
    return play(FLAT, 10, new, requests, slots, scheduler=scheduler, load=Load(waves=waves))


def test_one_request_waits_for_nobody() -> None:
    found = served(1)
    assert found.ttft_s == pytest.approx(PROMPT)
    assert found.tpot_s == pytest.approx(TOKEN)


@pytest.mark.parametrize("ahead", [0, 1])
@pytest.mark.parametrize("requests", [4, 9, 30])
def test_requests_of_one_length_wait_for_the_steps_that_are_made_up(requests: int, ahead: int) -> None:
    """The first wave waits for half of itself. Later ones come one a step: the first waits for steps of tokens and its
    own, each next one for one more prompt's step, until these are the one that runs, those made up ahead, and its own.
    """
    waves = 200
    found = served(requests, waves=waves, ahead=ahead)
    first = PROMPT * (requests + 1) / 2
    later = PROMPT * sum(min(place, 2 + ahead) for place in range(1, requests + 1)) / requests
    assert found.ttft_s == pytest.approx((first + (waves - 1) * later) / waves, rel=0.02)


@pytest.mark.parametrize("requests", [4, 9, 30])
def test_where_prompts_go_first_all_end_together(requests: int) -> None:
    found = served(requests, mixed=False, budget=10)
    assert found.ttft_s == pytest.approx(PROMPT * (requests + 1) / 2, rel=0.02)
    assert found.tpot_s == pytest.approx(TOKEN + PROMPT * (requests - 1) / 2 / 99, rel=0.02)


@pytest.mark.parametrize(("most", "steps"), [(None, "112233"), (30, "111222"), (25, "112223")])
def test_a_step_takes_prompts_until_they_reach_its_budget_and_no_more_than_its_most(
    most: int | None, steps: str
) -> None:
    """Six prompts of 10 tokens come at once, and end in these steps: with 25 at most, the third is cut."""
    found = served(6, mixed=False, waves=1, budget=21 if most else 20, most=most)
    assert found.ttft_s == pytest.approx(PROMPT * sum(map(int, steps)) / 6, rel=0.02)


def test_who_finds_no_room_waits_as_little_says() -> None:
    found = served(12, slots=8, new=400, waves=400)
    rate = 8 / (PROMPT + 399 * found.tpot_s)  # of requests that end
    waiting = 12 - 8
    assert rate * (found.ttft_s - PROMPT) == pytest.approx(waiting, rel=0.05)
    assert found.running == 8


def test_faster_kernels_and_launches() -> None:
    rule, load = Scheduler(), Load(waves=3, turn_s=0.0)
    plain = play(FLAT, 10, 50, 6, 6, scheduler=rule, load=load)
    fast = play(FLAT.at_speed(2.0, 0.0), 10, 50, 6, 6, scheduler=rule, load=load)
    assert (fast.ttft_s, fast.tpot_s) == pytest.approx((plain.ttft_s / 2, plain.tpot_s / 2))
    launched = play(FLAT.at_speed(1.0, 1.5), 10, 50, 1, 1, scheduler=rule, load=load)
    assert launched.ttft_s == pytest.approx(1.5)


def test_prompts_that_wait_for_a_fuller_step() -> None:
    """Alone in the system but for one that writes, a prompt waits for all the steps it may."""
    patient, hasty = (
        play(FLAT, 10, 100, 2, 2, scheduler=Scheduler(budget=100, patience=each), load=Load(waves=50, shortest=0.5))
        for each in (20, 0)
    )
    assert patient.ttft_s > hasty.ttft_s + 5 * TOKEN


def one_step_after_the_other(
    seconds: StepSeconds,
    lengths: Sequence[tuple[int, int]],
    requests: int,
    slots: int,
    rule: Scheduler,
    turn_s: float,
    token_s: float = 0.0,
) -> Served:
    """What `play` says, by nothing but steps: each one looks at all requests."""
    waiting = [[0.0, *each, each[0]] for each in lengths[:requests]]
    unsent = list(lengths[requests:])
    running: list[list[float]] = []
    begun: list[list[float]] = []
    now = before = sent_out = 0.0
    firsts, paces = [], []
    while waiting or begun or running:
        if not running and not begun and waiting[0][0] > now:
            now = before = waiting[0][0]
        made_up = before if rule.ahead and (running or begun) else now
        room = rule.budget - (len(running) if rule.mixed else 0)
        taken, finished = 0, []
        while len(running) + len(begun) < slots and waiting and waiting[0][0] <= made_up:
            if sum(each[3] for each in begun) >= room:
                break
            begun.append(waiting.pop(0))
        while begun and (taken < room):
            if not rule.chunked and taken and begun[0][3] > room - taken:
                break
            size = min(begun[0][3], room - taken) if rule.chunked else begun[0][3]
            begun[0][3] -= size
            taken += int(size)
            if begun[0][3]:
                break
            finished.append(begun.pop(0))
        if not taken:
            took = seconds.tokens(len(running), 0)
        else:
            took = seconds.mixed(taken, len(running), 0) if rule.mixed else seconds.prompts(taken)
        before, now = now, now + took
        write = not taken or rule.mixed
        sent_out = max(sent_out, now) + token_s * (len(running) * write + len(finished))
        for each in running if write else ():
            each[3] += 1
        for each in finished:
            firsts.append(sent_out - each[0])
            running.append([sent_out, each[1], each[2], 1])
        for each in [each for each in running if each[3] >= each[2]]:
            running.remove(each)
            paces.append((sent_out - each[0]) / (each[2] - 1))
            if unsent:
                prompt, new = unsent.pop(0)
                waiting.append([sent_out + turn_s, prompt, new, prompt])
    return Served(sum(firsts) / len(firsts), sum(paces) / len(paces), min(slots, requests))


@pytest.mark.parametrize("seed", range(12))
def test_the_same_as_one_step_after_the_other(seed: int) -> None:
    draw = random.Random(seed)
    rule = Scheduler(
        budget=draw.choice((40, 100, 300)),
        mixed=draw.random() < 0.7,
        chunked=draw.random() < 0.5,
        ahead=draw.randint(0, 1),
    )
    requests, slots, waves = draw.randint(2, 12), draw.randint(2, 14), 4
    steps = StepSeconds(Curve((1.0, 12.0), (0.01, 0.02)), Curve((1.0,), (0.0,)), Curve((1.0, 300.0), (0.02, 0.9)))
    prompt, new = draw.randint(5, 30), draw.randint(20, 60)
    token_s = draw.choice((0.0, 0.0005, 0.003))  # of which the last holds all up where many run
    load, front_end = Load(waves=waves, turn_s=0.004), FrontEnd(token_s)
    found = play(steps, prompt, new, requests, slots, scheduler=rule, load=load, front_end=front_end)
    lengths = [(prompt, new)] * (waves * requests)
    slow = one_step_after_the_other(steps, lengths, requests, slots, rule, 0.004, token_s)
    assert (found.ttft_s, found.tpot_s) == pytest.approx((slow.ttft_s, slow.tpot_s), rel=1e-6)


def test_another_rule_is_told_apart() -> None:
    """What the comparison above would miss otherwise."""
    rule = Scheduler(budget=20)
    lengths = [(10, 30)] * 24
    steps = StepSeconds(Curve((1.0, 12.0), (0.01, 0.02)), Curve((1.0,), (0.0,)), Curve((1.0, 300.0), (0.02, 0.9)))
    found = play(steps, 10, 30, 6, 6, scheduler=rule, load=Load(waves=4, turn_s=0.004))
    for other in (replace(rule, mixed=False), replace(rule, ahead=0), replace(rule, budget=11)):
        slow = one_step_after_the_other(steps, lengths, 6, 6, other, 0.004)
        assert (found.ttft_s, found.tpot_s) != pytest.approx((slow.ttft_s, slow.tpot_s), rel=1e-3)
    slow = one_step_after_the_other(steps, lengths, 6, 6, rule, 0.004, 0.003)
    assert (found.ttft_s, found.tpot_s) != pytest.approx((slow.ttft_s, slow.tpot_s), rel=1e-3)


def test_a_front_end_that_is_slower_than_the_engine_sets_the_pace() -> None:
    """Half as fast as the engine, it sends a token of each request every 20 ms; what it has no time for waits."""
    requests, rule, load = 10, Scheduler(budget=20), Load(waves=20, turn_s=0.0)
    seconds = StepSeconds(FLAT.decode, FLAT.past, Curve((1.0,), (TOKEN,)))
    slow = play(seconds, 10, 400, requests, requests, scheduler=rule, load=load, front_end=FrontEnd(0.002))
    free = play(seconds, 10, 400, requests, requests, scheduler=rule, load=load)
    cycle = slow.ttft_s + 399 * slow.tpot_s
    assert cycle == pytest.approx(requests * 400 * 0.002, rel=0.05)
    assert free.ttft_s + 399 * free.tpot_s == pytest.approx(400 * TOKEN, rel=0.05)


def test_requests_are_taken_in_one_after_the_other() -> None:
    rule, load = Scheduler(budget=1000, ahead=0), Load(waves=100, turn_s=0.0)
    alone = play(FLAT, 10, 100, 1, 1, scheduler=rule, load=load, front_end=FrontEnd(request_s=0.25))
    assert alone.ttft_s == pytest.approx(PROMPT + 0.25)
    first = replace(load, waves=1)
    none, some = (
        play(FLAT, 10, 100, 8, 8, scheduler=rule, load=first, front_end=FrontEnd(request_s=each)) for each in (0.0, 0.1)
    )
    assert none.ttft_s == pytest.approx(PROMPT)  # all eight in one step
    assert some.ttft_s > PROMPT + 0.1


def test_lengths_that_differ_spread_the_requests_out() -> None:
    rule = Scheduler(budget=20)
    alike, spread = (
        play(FLAT, 10, 2000, 8, 8, scheduler=rule, load=Load(waves=40, shortest=each)) for each in (1.0, 0.8)
    )
    assert spread.ttft_s < 0.7 * alike.ttft_s
