"""Asks a server, streaming, and notes when what came: any server that speaks OpenAI's /v1/completions."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import httpx2

from partitioner.errors import InputError
from partitioner.serving.load.workload import Question

__all__ = ["Answered", "ask_all", "model_of"]


@dataclass(frozen=True)
class Answered:
    """Of one request: seconds since the start of all, and tokens. error: why there is no whole answer."""

    asked_s: float
    first_s: float
    last_s: float
    prompt_tokens: int
    new_tokens: int
    error: str = ""


async def ask_all(
    questions: Sequence[Question], *, url: str, model: str, key: str | None, clients: int | None, timeout_s: float
) -> list[Answered]:
    """Each at its time; with `clients`, so many at a time, one after the other."""
    free = asyncio.Semaphore(clients or len(questions))
    headers = {} if key is None else {"authorization": f"Bearer {key}"}
    limits = httpx2.Limits(max_connections=None, max_keepalive_connections=clients or 100)
    async with httpx2.AsyncClient(base_url=url, headers=headers, timeout=timeout_s, limits=limits) as client:
        begin = time.perf_counter()

        async def ask(question: Question) -> Answered:
            await asyncio.sleep(max(0.0, question.arrival_s - (time.perf_counter() - begin)))
            async with free:
                return await _ask(client, question, model, begin)

        return await asyncio.gather(*(ask(question) for question in questions))


def model_of(url: str, key: str | None) -> str:
    """The first model that the server lists."""
    headers = {} if key is None else {"authorization": f"Bearer {key}"}
    try:
        answer = httpx2.get(f"{url}/models", headers=headers, timeout=30)
        return str(answer.raise_for_status().json()["data"][0]["id"])
    except (httpx2.HTTPError, ValueError, LookupError) as error:
        raise InputError(f"no model is listed at {url}/models: {error}") from error


async def _ask(client: httpx2.AsyncClient, question: Question, model: str, begin: float) -> Answered:
    body = {"model": model, "prompt": question.prompt, "max_tokens": question.new, "temperature": 0, "stream": True}
    body["stream_options"] = {"include_usage": True}
    asked = time.perf_counter() - begin
    first = last = asked
    usage: dict[str, Any] = {}
    pieces, error = 0, ""
    try:
        async with client.stream("POST", "completions", json=body) as answer:
            if answer.status_code != 200:
                error = f"{answer.status_code}: {(await answer.aread()).decode(errors='replace')[:200]}"
            async for line in answer.aiter_lines():
                if not line.startswith("data: ") or line == "data: [DONE]":
                    continue
                event = json.loads(line[len("data: ") :])
                if "error" in event:
                    error = str(event["error"])
                    break
                usage = event.get("usage") or usage
                if any(choice.get("text") for choice in event["choices"]):
                    last = time.perf_counter() - begin
                    first = last if not pieces else first
                    pieces += 1
    except (httpx2.HTTPError, ValueError, LookupError) as failure:
        error = f"{type(failure).__name__}: {failure}"
    if not error and not pieces:
        error = "no text came"
    return Answered(asked, first, last, usage.get("prompt_tokens", 0), usage.get("completion_tokens", pieces), error)
