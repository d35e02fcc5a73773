"""A workload's requests, sent to a server, without torch."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from partitioner.serving.load.ask import ask_all, model_of
from partitioner.serving.load.measures import Measures
from partitioner.serving.load.workload import Workload

__all__ = ["put_load"]


def put_load(
    workload: Workload, *, url: str, model: str | None, key: str | None, tokenizer: str | None, timeout_s: float
) -> tuple[str, Measures]:
    """The model that was asked, by default the first that the server lists, and what came of the requests.

    tokenizer: the folder of one that counts prompts' tokens; None: words are counted.
    """
    questions = workload.questions(cut=None if tokenizer is None else _cutter(tokenizer))
    asked = model or model_of(url, key)
    clients = workload.clients
    answered = asyncio.run(ask_all(questions, url=url, model=asked, key=key, clients=clients, timeout_s=timeout_s))
    return asked, Measures(tuple(answered))


def _cutter(folder: str) -> Callable[[str, int], str]:
    from partitioner.serving.text.tokenizer import load_tokenizer  # here: transformers takes seconds to import

    found, _ = load_tokenizer(folder)

    def cut(words: str, tokens: int) -> str:
        return str(found.decode(found(words)["input_ids"][:tokens], skip_special_tokens=True))

    return cut
