"""`partitioner serve` when something goes wrong: every request is answered or refused in OpenAI's form, nothing hangs,
and nothing is left behind.
"""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import httpx2
import openai
import pytest
import torch
from transformers import AutoTokenizer

from partitioner import Plan, partition
from partitioner.serving.text.answer_text import AnswerText
from partitioner.storage.example import EXAMPLE_MODEL
from tests.partitioner.serving.served import Served, served

pytestmark = [pytest.mark.processes, pytest.mark.slow]
MODEL = "example_model"
TOKENIZER: Any = AutoTokenizer.from_pretrained(EXAMPLE_MODEL)


def gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


def until(done: Callable[[], bool], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def run(server: Served, work: Callable[[openai.AsyncOpenAI], Awaitable[Any]], seconds: float = 240) -> Any:
    async def connected() -> Any:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
            return await asyncio.wait_for(work(client), seconds)

    return asyncio.run(connected())


async def until_all_run(server: Served) -> None:
    """Until each replica has rows that run."""
    async with httpx2.AsyncClient() as looking:
        while True:
            lines = (await looking.get(f"{server.url}/metrics")).text.splitlines()
            running = [float(line.split()[-1]) for line in lines if line.startswith("partitioner_replica_running{")]
            if running and all(running):
                return
            await asyncio.sleep(0.01)


async def outcome(client: openai.AsyncOpenAI, number: int, **asked: Any) -> str:
    """The text of an answer, or how it was refused; anything else is raised."""
    given = {"model": MODEL, "prompt": "The value of the"[: 4 + number % 12], "max_tokens": 60, "seed": number, **asked}
    try:
        if number % 2:
            return str((await client.completions.create(**given)).choices[0].text)
        async with await client.completions.create(**given, stream=True) as events:
            parts = [event.choices[0].text async for event in events]
        return "".join(parts)
    except openai.APIStatusError as error:
        if error.code not in ("replica_lost", "shutting_down"):
            raise
        return f"refused {error.status_code} {error.code}"
    except openai.APIConnectionError:
        return "not connected"
    except openai.APIError as error:  # an event in a stream
        if error.code not in ("replica_lost", "shutting_down"):
            raise
        return f"ended {error.code}"


@pytest.mark.parametrize("plan", ["tp=1", "tp=2", "dp=2"])
def test_64_mixed_requests_are_answered_with_the_tokens_of_one_by_one(plan: str, tmp_path: Path) -> None:
    alone = partition(EXAMPLE_MODEL, Plan(), dtype=torch.float64)

    def asked(number: int) -> tuple[dict[str, Any], dict[str, Any]]:
        options: dict[str, Any] = {"max_tokens": 5 + number * 7 % 40, "temperature": (0, 0.8, 1.2)[number % 3]}
        own: dict[str, Any] = {"do_sample": options["temperature"] > 0, "top_k": 0}
        if number % 5 == 0:
            options["top_p"] = own["top_p"] = 0.8
        if number % 7 == 0:
            options["frequency_penalty"] = own["frequency_penalty"] = 0.9
        if own["do_sample"]:
            own["temperature"] = options["temperature"]
        else:
            own = {name: value for name, value in own.items() if name == "frequency_penalty"}
        return options, {**own, "max_new_tokens": options["max_tokens"]}

    def expected(number: int) -> str:
        prompt = TOKENIZER("The value of the"[: 4 + number % 12])["input_ids"]
        new = alone.generate([prompt], seed=number, **asked(number)[1])[0, len(prompt) :].tolist()  # type: ignore[index]
        text = AnswerText(TOKENIZER, prompt)
        for token in new:
            text.add(token)
        text.end()
        return text.text

    async def all_of_them(client: openai.AsyncOpenAI) -> list[str]:
        return await asyncio.gather(*(outcome(client, number, **asked(number)[0]) for number in range(64)))

    with served(tmp_path, ["--plan", plan, "--dtype", "float64"]) as server:
        found = run(server, all_of_them)
        ranks = server.ranks()
        assert server.end() == 0
    assert all(map(gone, ranks))
    assert found == [expected(number) for number in range(64)]


def test_a_killed_rank_is_told_and_the_other_replica_goes_on(tmp_path: Path) -> None:
    async def meanwhile(client: openai.AsyncOpenAI) -> list[str]:
        asking = [asyncio.create_task(outcome(client, number, max_tokens=150)) for number in range(16)]
        await until_all_run(server)
        os.kill(ranks[0], signal.SIGKILL)
        return await asyncio.gather(*asking)

    with served(tmp_path, ["--plan", "dp=2"]) as server:
        ranks = server.ranks()
        found = run(server, meanwhile)
        lost = [text for text in found if text in ("refused 503 replica_lost", "ended replica_lost")]
        assert 0 < len(lost) < 16
        health = httpx2.get(f"{server.url}/health")
        assert (health.status_code, health.json()["status"]) == (200, "degraded")
        assert httpx2.get(f"{server.url}/health?every=1").status_code == 503
        again = run(server, lambda client: asyncio.gather(*(outcome(client, number) for number in range(4))))
        assert not [text for text in again if text.startswith(("refused", "ended", "not connected"))]
        os.kill(ranks[1], signal.SIGKILL)
        until(lambda: httpx2.get(f"{server.url}/health").status_code == 503, 5)
        assert run(server, lambda client: outcome(client, 1)) == "refused 503 replica_lost"
        assert server.end() == 0
    assert all(map(gone, ranks))


def test_a_lost_replica_comes_back_while_the_other_serves(tmp_path: Path) -> None:
    with served(tmp_path, ["--plan", "dp=2", "--restart"]) as server:
        before = server.ranks()
        os.kill(before[0], signal.SIGKILL)
        until(lambda: httpx2.get(f"{server.url}/health").json()["status"] == "degraded", 5)
        found = run(server, lambda client: asyncio.gather(*(outcome(client, number) for number in range(8))))
        assert not [text for text in found if text.startswith(("refused", "ended", "not connected"))]
        until(lambda: httpx2.get(f"{server.url}/health?every=1").status_code == 200, 120)
        assert len(set(server.ranks()) - set(before)) == 1
        again = run(server, lambda client: asyncio.gather(*(outcome(client, number) for number in range(8))))
        assert again == found
        killed = server.ranks()[0]
        os.kill(killed, signal.SIGKILL)
        # while it is being started again, the server ends
        until(lambda: len(set(server.ranks()) - {killed}) == 2)
        ranks = server.ranks()
        assert server.end() == 0
    assert all(map(gone, [*before, *ranks]))


def test_a_stopped_rank_is_lost_after_its_time(tmp_path: Path) -> None:
    async def meanwhile(client: openai.AsyncOpenAI) -> list[str]:
        asking = [asyncio.create_task(outcome(client, number, max_tokens=200)) for number in range(4)]
        await until_all_run(server)
        os.kill(ranks[1], signal.SIGSTOP)
        return await asyncio.gather(*asking)

    with served(tmp_path, ["--plan", "tp=2", "--rank-timeout", "3"]) as server:
        ranks = server.ranks()
        started = time.monotonic()
        found = run(server, meanwhile)
        assert time.monotonic() - started < 60
        assert any("replica_lost" in text for text in found)
        assert httpx2.get(f"{server.url}/health").status_code == 503
        assert server.end() == 0
    assert all(map(gone, ranks))


@pytest.mark.parametrize("grace", ["60", "0.5"])
def test_the_end_under_load(grace: str, tmp_path: Path) -> None:
    """Within the grace time all are answered; what is left after it is told so; nobody is just cut off."""

    async def meanwhile(client: openai.AsyncOpenAI) -> list[str]:
        asking = [asyncio.create_task(outcome(client, number, max_tokens=150)) for number in range(12)]
        async with httpx2.AsyncClient() as looking:
            while (await looking.get(f"{server.url}/health")).json()["rows"] < 6:
                await asyncio.sleep(0.01)
        server.process.send_signal(signal.SIGTERM)
        await asyncio.sleep(0.2)
        late = await outcome(client, 1)
        assert late in ("refused 503 shutting_down", "not connected")
        return await asyncio.gather(*asking)

    with served(tmp_path, ["--grace", grace]) as server:
        ranks = server.ranks()
        found = run(server, meanwhile)
        assert server.process.wait(30) == 0
    assert all(map(gone, ranks))
    assert "not connected" not in found
    ended = [text for text in found if "shutting_down" in text]
    assert bool(ended) == (grace == "0.5")


def test_a_cache_that_is_smaller_than_the_context_bounds_what_is_asked(tmp_path: Path) -> None:
    """A chat without max_tokens was refused, since what is left of the context did not fit."""

    async def asked(client: openai.AsyncOpenAI) -> tuple[str, str | None]:
        chat = await client.chat.completions.create(
            model=MODEL,
            messages=[{"role": "user", "content": "Return"}],
            temperature=0,
            extra_body={"ignore_eos": True},
        )
        assert chat.usage is not None
        assert chat.usage.total_tokens == longest
        with pytest.raises(openai.BadRequestError) as raised:
            await client.completions.create(model=MODEL, prompt=[5] * longest, max_tokens=1)
        return chat.choices[0].finish_reason, raised.value.code

    with served(tmp_path, ["--cache-memory", "200 KB", "--max-batch", "2"]) as server:
        longest = int(server.log.read_text().rsplit("texts of up to ", 1)[1].split()[0])
        assert 2 < longest < 512
        assert run(server, asked) == ("length", "context_length_exceeded")
        assert server.end() == 0


def test_clients_that_are_cut_off_leave_nothing(tmp_path: Path) -> None:
    async def rude(client: openai.AsyncOpenAI) -> None:
        for number in range(8):
            events = await client.completions.create(
                model=MODEL, prompt="If", max_tokens=400, stream=True, extra_body={"ignore_eos": True}
            )
            async for _ in events:
                break
            await events.close()
            waiting = asyncio.create_task(outcome(client, number, max_tokens=400))
            await asyncio.sleep(0.05)
            waiting.cancel()

    with served(tmp_path, []) as server:
        run(server, rude)
        until(lambda: httpx2.get(f"{server.url}/health").json()["rows"] == 0)
        started = time.monotonic()
        assert run(server, lambda client: outcome(client, 1, max_tokens=5))
        assert time.monotonic() - started < 10
        assert server.end() == 0


def test_the_ranks_go_with_a_server_that_is_killed(tmp_path: Path) -> None:
    with served(tmp_path, ["--plan", "tp=2"]) as server:
        ranks = server.ranks()
        assert len(ranks) == 2
        server.process.kill()
        server.process.wait(10)
        until(lambda: all(map(gone, ranks)), 10)
