"""200 random events against one `partitioner serve --restart`, drawn from a seed: clients that are cut off, bodies that
are malformed, more requests than there is room for, ranks that are killed and stopped, the end under load.

Each answer has the text of `generate` alone, or is refused in OpenAI's form; each partial one is its beginning. Nothing
hangs, and nothing is left: no process of the server's session, no temporary file.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import signal
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
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
EVENTS = 200
LIVES = 3
"""How often the server is started, and ended under load."""
WEIGHTS = {"ask": 9, "cut": 4, "hang up": 2, "malformed": 4, "burst": 1}
PATIENCE_S = 240
REFUSED = {429: {"queue_full"}, 503: {"replica_lost", "shutting_down"}}
MALFORMED: tuple[tuple[bytes, int], ...] = (
    (b"", 400),
    (b"{", 400),
    (b"[" * 3000, 400),
    (b"\xff\xfe", 400),
    (b'{"model": "example_model"}', 400),
    (b'{"model": "example_model", "prompt": "a", "temperature": "1"}', 400),
    (b'{"model": "example_model", "prompt": "a", "max_tokens": 100000}', 400),
    (b'{"model": "example_model", "prompt": [9999999]}', 400),
    (b'{"model": "other", "prompt": "a"}', 404),
    (b'{"model": "example_model", "prompt": "' + b"a" * 70_000 + b'"}', 413),
)


@dataclass(frozen=True)
class Question:
    asked: dict[str, Any]
    answer: str


def questions() -> list[Question]:
    """With the answers of the model alone, in float64."""
    tokenizer: Any = AutoTokenizer.from_pretrained(EXAMPLE_MODEL)
    alone = partition(EXAMPLE_MODEL, Plan(), dtype=torch.float64)
    found = []
    for number in range(16):
        text = "The value of the list is returned if it has"[: 4 + number * 3 % 40]
        temperature = (0, 0.9)[number % 2]
        count = 6 + number * 11 % 60
        prompt = tokenizer(text)["input_ids"]
        own = {"do_sample": True, "temperature": temperature, "top_k": 0} if temperature else {}
        new = alone.generate([prompt], max_new_tokens=count, seed=number, **own)[0, len(prompt) :]  # type: ignore[index]
        said = AnswerText(tokenizer, prompt)
        for token in new.tolist():
            said.add(token)
        said.end()
        asked = {"prompt": text, "temperature": temperature, "max_tokens": count, "seed": number}
        found.append(Question({"model": MODEL, **asked}, said.text))
    return found


def refusal(error: openai.APIError, status: int) -> str:
    """Its code, which must be one of those that the server may answer with now."""
    assert error.code in REFUSED[status], error
    return str(error.code)


@dataclass
class Population:
    """Clients of one server; what came of what they asked."""

    server: Served
    questions: Sequence[Question]
    draw: random.Random
    seen: Counter[str] = field(default_factory=Counter)
    asking: set[asyncio.Task[None]] = field(default_factory=set)
    is_ending: bool = False

    def begin(self, client: openai.AsyncOpenAI, kind: str) -> None:
        question = self.draw.choice(self.questions)
        works = {
            "ask": lambda: self.ask(client, question, stream=self.draw.random() < 0.5),
            "cut": lambda: self.cut(client, question, self.draw.randrange(1, 6)),
            "hang up": lambda: self.hang_up(self.draw.random()),
            "malformed": lambda: self.malformed(*self.draw.choice(MALFORMED)),
            "burst": lambda: self.burst(client),
        }
        self.asking.add(asyncio.create_task(works[kind]()))

    async def ask(self, client: openai.AsyncOpenAI, question: Question, *, stream: bool) -> None:
        said = ""
        try:
            if stream:
                async with await client.completions.create(**question.asked, stream=True) as events:
                    async for event in events:
                        said += event.choices[0].text
            else:
                said = (await client.completions.create(**question.asked)).choices[0].text
        except openai.APIStatusError as error:
            self.seen[f"refused {refusal(error, error.status_code)}"] += 1
        except openai.APIConnectionError:
            assert self.server.process.poll() is not None or self.is_ending
            self.seen["not connected"] += 1
        except openai.APIError as error:  # in a stream
            self.seen[f"ended {refusal(error, 503)}"] += 1
            self.require_beginning(said, question)
        else:
            assert said == question.answer, question
            self.seen["answered"] += 1

    @staticmethod
    def require_beginning(said: str, question: Question) -> None:
        assert question.answer.startswith(said), (said, question)

    async def cut(self, client: openai.AsyncOpenAI, question: Question, events_read: int) -> None:
        """A client that leaves amid a stream, or before a whole answer has come."""
        said = ""
        try:
            events = await client.completions.create(**question.asked, stream=True)
            async for event in events:
                said += event.choices[0].text
                events_read -= 1
                if not events_read:
                    break
            await events.close()
        except openai.APIError:
            pass
        self.require_beginning(said, question)
        waiting = asyncio.create_task(client.completions.create(**question.asked))
        await asyncio.sleep(0.02)
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)
        self.seen["cut"] += 1

    async def hang_up(self, part: float) -> None:
        """A connection that ends amid the request's head or body."""
        host, port = self.server.url.removeprefix("http://").split(":")
        body = json.dumps(self.questions[0].asked).encode()
        head = (
            f"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\nContent-Length: {len(body)}"
        )
        whole = head.encode() + b"\r\n\r\n" + body
        try:
            _, out = await asyncio.open_connection(host, int(port))
        except OSError:
            assert self.is_ending
            return
        out.write(whole[: int(part * len(whole))])
        await out.drain()
        out.transport.abort()
        self.seen["hung up"] += 1

    async def malformed(self, body: bytes, status: int) -> None:
        try:
            async with httpx2.AsyncClient() as client:
                answer = await client.post(
                    f"{self.server.url}/v1/completions",
                    content=body,
                    headers={"content-type": "application/json"},
                    timeout=PATIENCE_S,
                )
        except httpx2.TransportError:
            assert self.is_ending
            return
        assert set(answer.json()["error"]) == {"message", "type", "param", "code"}
        assert answer.status_code in (status, 503), answer.text
        self.seen[f"malformed {answer.status_code}"] += 1

    async def burst(self, client: openai.AsyncOpenAI) -> None:
        """More than there is room for: some wait, some lose their place in the cache, some are refused."""
        drawn = [self.draw.choice(self.questions) for _ in range(24)]
        await asyncio.gather(*(self.ask(client, question, stream=False) for question in drawn))


async def life(population: Population, events: Sequence[str]) -> None:
    """The events, one after the other at random times; then the end under load."""
    server, draw = population.server, population.draw
    async with openai.AsyncOpenAI(
        base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=PATIENCE_S
    ) as client:
        for kind in events:
            if kind in ("kill", "stop", "pause"):
                ranks = server.ranks()
                if ranks:
                    rank = draw.choice(ranks)
                    # one that is lost already may be ended, and waited for, at any time
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(rank, signal.SIGKILL if kind == "kill" else signal.SIGSTOP)
                        population.seen[f"rank: {kind}"] += 1
                        if kind == "pause":
                            await asyncio.sleep(0.5)
                            os.kill(rank, signal.SIGCONT)
            else:
                population.begin(client, kind)
            await asyncio.sleep(draw.expovariate(4))
        # what was lost comes back, and all that was asked before it is answered or refused
        await asyncio.wait_for(asyncio.gather(*population.asking), PATIENCE_S)
        population.asking.clear()
        await asyncio.wait_for(all_serve(server), PATIENCE_S)
        async with httpx2.AsyncClient() as looking:
            assert (await looking.get(f"{server.url}/health")).json()["rows"] == 0
        for _ in range(12):
            population.begin(client, "ask")
        await asyncio.sleep(draw.random())
        population.is_ending = True
        server.process.send_signal(signal.SIGTERM)
        for _ in range(4):
            population.begin(client, "ask")
        await asyncio.wait_for(asyncio.gather(*population.asking), PATIENCE_S)


async def all_serve(server: Served) -> None:
    async with httpx2.AsyncClient() as looking:
        while (await looking.get(f"{server.url}/health?every=1")).status_code != 200:
            await asyncio.sleep(0.2)


def of_session(session: int) -> list[str]:
    """Commands of processes that a server has started and that are still there."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
            if int(fields[3]) == session and fields[0] != "Z":
                found.append(Path(path.parent, "cmdline").read_text())
        except OSError:
            continue
    return found


@pytest.mark.parametrize("seed", [1])
def test_200_random_events(seed: int, tmp_path: Path) -> None:
    draw = random.Random(seed)
    asked = questions()
    events = draw.choices(list(WEIGHTS), list(WEIGHTS.values()), k=EVENTS - 12 - LIVES)
    for kind in ("kill", "kill", "kill", "stop", "stop", "pause") * 2:
        events.insert(draw.randrange(len(events)), kind)
    assert len(events) + LIVES == EVENTS
    seen: Counter[str] = Counter()
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    options = ["--plan", "dp=2", "--dtype", "float64", "--restart", "--rank-timeout", "5", "--max-requests", "40"]
    options += ["--max-batch", "6", "--cache-memory", "2 MB", "--max-context", "120", "--max-body", "65536"]
    for number in range(LIVES):
        with served(tmp_path, options, environment={"TMPDIR": str(temporary)}) as server:
            population = Population(server, asked, draw, seen)
            asyncio.run(life(population, events[number::LIVES]))
            assert server.process.wait(60) == 0
        log = server.log.read_text()
        assert "Traceback" not in log, log
        deadline = time.monotonic() + 10
        while left := of_session(server.process.pid):
            assert time.monotonic() < deadline, left
            time.sleep(0.1)
        assert not list(temporary.iterdir())
    print(f"seed {seed}: {dict(seen.most_common())}")
    assert seen["answered"] > EVENTS // 4
    for kind in ("cut", "hung up", "malformed 400", "rank: kill", "rank: stop", "rank: pause"):
        assert seen[kind], kind
    assert sum(count for kind, count in seen.items() if "replica_lost" in kind)
