"""Memory of a server and all its processes under random load: it must not grow.

    python -m benchmarks.generation.soak --minutes 30               the model that comes along, on two replicas
    python -m benchmarks.generation.soak --minutes 10 --plan tp=2

Clients ask for completions and chats, whole and streamed, greedy and drawn, with log-probabilities, stop strings, a
form or tools; some leave in the middle, some send what is malformed. Each line is a minute: MB of each process, files
that are mapped left out, what two share counted once. The first quarter of the time is left out, in which caches fill:
the median of the last quarter counts against that of the second. Exit code 1 where it grew by more than 2%.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2

from partitioner.serving.load.workload import Workload
from partitioner.storage.example import EXAMPLE_MODEL

ROOT = Path(__file__).resolve().parents[2]
TEMPLATE = ROOT / "examples" / "serving" / "tools_chat.jinja"
LIMIT = 0.02
START_S = 300
FORM = {"type": "array", "items": {"enum": ["if", "for", "while"]}, "minItems": 1, "maxItems": 3}
TOOL = {"name": "weather", "parameters": {"type": "object", "properties": {"city": {"enum": ["Rome", "Oslo"]}}}}


@contextmanager
def server(command: list[str], log: Path) -> Iterator[tuple[subprocess.Popen[bytes], str]]:
    """Its process, the leader of a session, and its address."""
    with log.open("wb") as out:
        process = subprocess.Popen(command, stdout=out, stderr=out, start_new_session=True)
    try:
        deadline = time.monotonic() + START_S
        while not (found := re.search(r"(http://127\.0\.0\.1:\d+)/v1 ", log.read_text())):
            if process.poll() is not None or time.monotonic() > deadline:
                sys.exit(f"the server did not start:\n{log.read_text()[-2000:]}")
            time.sleep(0.2)
        yield process, found[1]
    finally:
        process.terminate()
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def memory(session: int) -> dict[str, float]:
    """MB of each process of a session, in the order in which they were started."""
    found: dict[str, float] = {}
    for path in sorted(Path("/proc").glob("[0-9]*"), key=lambda each: int(each.name)):
        try:
            if os.getsid(int(path.name)) != session:
                continue
            rollup = (path / "smaps_rollup").read_text()
        except OSError:
            continue
        sizes = re.findall(r"^Pss_(?:Anon|Shmem): +(\d+) kB", rollup, re.MULTILINE)
        found[path.name] = sum(map(int, sizes)) / 1024
    return found


def body(draw: random.Random, model: str, prompt: str, new: int) -> tuple[str, dict[str, Any]]:
    """A request of some kind: its path and its body."""
    asked: dict[str, Any] = {"model": model, "max_tokens": new, "temperature": draw.choice((0, 0.7, 1.2))}
    if draw.random() < 0.3:
        asked["stop"] = ["the", "\n\n"]
    if draw.random() < 0.5:
        asked["seed"] = draw.randrange(100)
    if draw.random() < 0.5:
        if draw.random() < 0.2:
            asked["logprobs"] = 3
        return "/v1/completions", {**asked, "prompt": prompt}
    asked["messages"] = [{"role": "user", "content": prompt}]
    kind = draw.random()
    if kind < 0.2:
        asked["response_format"] = {"type": "json_schema", "json_schema": {"name": "form", "schema": FORM}}
    elif kind < 0.4:
        asked |= {"tools": [{"type": "function", "function": TOOL}], "tool_choice": draw.choice(("auto", "required"))}
    elif kind < 0.5:
        asked |= {"logprobs": True, "top_logprobs": 2}
    return "/v1/chat/completions", asked


async def client(url: str, model: str, number: int, until: float, seen: Counter[str]) -> None:
    draw = random.Random(number)
    questions = Workload(requests=1000, clients=1, prompt_mean=60, answer_mean=60, longest=400, seed=number).questions()
    async with httpx2.AsyncClient(base_url=url, timeout=300) as asking:
        while time.monotonic() < until:
            question = draw.choice(questions)
            path, asked = body(draw, model, question.prompt, question.new)
            chance = draw.random()
            if chance < 0.05:
                answer = await asking.post(path, content=b'{"model": ', headers={"content-type": "application/json"})
                seen[f"malformed {answer.status_code}"] += 1
            elif chance < 0.6:
                await streamed(asking, path, asked, draw.randrange(1, 10) if chance < 0.15 else 0, seen)
            else:
                answer = await asking.post(path, json=asked)
                seen[f"whole {answer.status_code}"] += 1


async def streamed(
    asking: httpx2.AsyncClient, path: str, asked: dict[str, Any], leaves_after: int, seen: Counter[str]
) -> None:
    """leaves_after: so many events; 0: it stays to the end."""
    async with asking.stream("POST", path, json={**asked, "stream": True}) as answer:
        count = 0
        async for line in answer.aiter_lines():
            count += line.startswith("data: ")
            if leaves_after and count >= leaves_after:
                seen["left"] += 1
                return
        seen[f"streamed {answer.status_code}"] += 1


async def load(url: str, session: int, *, clients: int, minutes: float) -> list[dict[str, float]]:
    """What the processes have, minute by minute."""
    async with httpx2.AsyncClient(base_url=url, timeout=60) as asking:
        model = (await asking.get("/v1/models")).json()["data"][0]["id"]
    begin = time.monotonic()
    seen: Counter[str] = Counter()
    asking_all = [asyncio.create_task(client(url, model, n, begin + 60 * minutes, seen)) for n in range(clients)]
    found: list[dict[str, float]] = []
    while time.monotonic() < begin + 60 * minutes:
        await asyncio.sleep(min(60, max(1.0, minutes * 60 / 16)))
        found.append(memory(session))
        sizes = " ".join(f"{size:.1f}" for size in found[-1].values())
        total, answered = sum(found[-1].values()), sum(seen.values())
        print(f"{(time.monotonic() - begin) / 60:5.1f} min: {total:8.1f} MB = {sizes}; {answered} requests", flush=True)
    await asyncio.gather(*asking_all)
    print(dict(seen.most_common()))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(EXAMPLE_MODEL))
    parser.add_argument("--plan", default="dp=2")
    parser.add_argument("--clients", type=int, default=12)
    parser.add_argument("--minutes", type=float, default=30)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as logs:
        command = [sys.executable, "-m", "partitioner", "serve", given.model, "--device", "cpu", "--plan", given.plan]
        # a cache that is full soon: its memory is taken when it is first used
        command += ["--port", "0", "--chat-template", str(TEMPLATE), "--cache-memory", "16 MB"]
        with server(command, Path(logs, "log")) as (process, url):
            found = asyncio.run(load(url, process.pid, clients=given.clients, minutes=given.minutes))
    totals = [sum(each.values()) for each in found]
    quarter = max(1, len(totals) // 4)
    before, after = statistics.median(totals[quarter : 2 * quarter]), statistics.median(totals[-quarter:])
    growth = after / before - 1
    print(f"{given.minutes:g} minutes, {given.plan}: {before:.1f} MB, then {after:.1f}: {growth:+.1%} (limit 2%)")
    sys.exit(growth > LIMIT)


if __name__ == "__main__":
    main()
