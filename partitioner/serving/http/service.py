"""What the routes stand on: one model with its tokenizer, the requests that are being answered, and the end.

async with service.admitted(rows): ...     counts them; raises where there are too many, or none are taken
service.health()                           a status and what it means
await service.drain(grace_s)               nothing new is taken, what runs may finish, what is left is cut off
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncIterator, Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from typing import Any, TypeVar

from partitioner.serving.grammar.check import Checks
from partitioner.serving.http.keys import Keys
from partitioner.serving.http.limits import Limits
from partitioner.serving.http.metrics import Metrics
from partitioner.serving.openai.errors import ApiError
from partitioner.serving.text.chat_template import Renderer
from partitioner.serving.tools.find_form import CallForms
from runtime.launching.launched import Launched

__all__ = ["NotOffered", "Service"]

T = TypeVar("T")
_TEXTS_AT_ONCE = max(2, (os.cpu_count() or 2) // 2)


class NotOffered(Exception):
    """Why this server does not do what it could with something that is missing."""


class Service:
    """See the module's docstring. name: by which clients ask for the model.

    checks: of schemas that answers must be valid by, for the vocabulary that the ranks were started with; or why there
    are none.
    """

    def __init__(
        self,
        llm: Launched,
        tokenizer: Any,
        *,
        name: str,
        limits: Limits,
        keys: Keys | None = None,
        checks: Checks | str = "its ranks were not told what tokens say",
    ) -> None:
        self.llm, self.tokenizer, self.name, self.limits = llm, tokenizer, name, limits
        self.keys = keys or Keys()
        self.metrics = Metrics()
        self.chats = Renderer(tokenizer)
        """Writes chats as the tokenizer's template puts them."""
        self.call_forms = CallForms(self.chats, _texts(tokenizer, llm.generation["eos_token_id"]))
        """How that template writes calls of tools."""
        self._checks = checks
        self.created = int(time.time())
        self.generation = llm.generation
        """What the model's generation config says."""
        # apart from the threads in which rows are begun and left, which no long text is to hold up
        self._texts = ThreadPoolExecutor(_TEXTS_AT_ONCE, thread_name_prefix="texts")
        self._rows = 0
        self._deadlines: set[asyncio.Timeout] = set()
        self._idle = asyncio.Event()
        self._idle.set()
        self._is_ending = self._is_cut = False

    @asynccontextmanager
    async def admitted(self, rows: int) -> AsyncIterator[None]:
        """Raises ApiError at once where the rows are not taken, and where they take too long."""
        self.require_open()
        if self._rows + rows > self.limits.max_requests:
            raise ApiError(
                429,
                f"{self._rows} rows run or wait here already, and {rows} more are above the {self.limits.max_requests} "
                "that this server takes; try again later.",
                kind="rate_limit_error",
                code="queue_full",
            )
        self._count(rows)
        try:
            async with asyncio.timeout(self.limits.request_s) as deadline:
                self._deadlines.add(deadline)
                try:
                    yield
                finally:
                    self._deadlines.discard(deadline)
        except TimeoutError as error:
            if self._is_cut:
                raise _ending() from error
            raise ApiError(
                504, f"The request was not done within {self.limits.request_s:g} s.", code="timeout"
            ) from error
        finally:
            self._count(-rows)

    def require_open(self) -> None:
        """Raises where no request can be answered at all."""
        if self._is_ending:
            raise _ending()
        if self.replicas()["serving"] == 0:
            raise ApiError(503, f"No replica of the model is left: {self._reasons()}", code="replica_lost")

    def health(self, *, every: bool) -> tuple[int, dict[str, Any]]:
        """200 while requests are answered; every: while no replica is lost."""
        counts = self.replicas()
        lost = {number: str(error) for number, error in self.llm.lost.items()}
        state = "ok" if not lost else "degraded" if counts["serving"] else "lost"
        if self._is_ending:
            state = "ending"
        is_red = state in ("lost", "ending") or (every and state != "ok")
        return 503 if is_red else 200, {"status": state, "replicas": counts, "lost": lost, "rows": self._rows}

    def replicas(self) -> dict[str, int]:
        """How many there are, by state."""
        lost = len(self.llm.lost)
        return {"serving": self.llm.replicas - lost, "lost": lost}

    async def drain(self, grace_s: float) -> None:
        """Returns when nothing is left."""
        self._is_ending = True
        try:
            async with asyncio.timeout(grace_s):
                await self._idle.wait()
        except TimeoutError:
            self._is_cut = True
            now = asyncio.get_running_loop().time()
            for deadline in list(self._deadlines):
                deadline.reschedule(now)
            await self._idle.wait()

    def grammars(self) -> Checks:
        """Grammars for this model; asking them waits for a process. Raises NotOffered."""
        if isinstance(self._checks, str):
            raise NotOffered(self._checks)
        if not self.generation["eos_token_id"]:
            raise NotOffered("the model has no token with which a text ends")
        return self._checks

    async def on_texts(self, work: Callable[[], T]) -> T:
        """What takes as long as its texts are long, beside the loop."""
        return await asyncio.get_running_loop().run_in_executor(self._texts, work)

    def close(self) -> None:
        """Ends what it has started."""
        self._texts.shutdown(wait=False, cancel_futures=True)
        self.chats.close()
        if isinstance(self._checks, Checks):
            self._checks.close()

    def cut(self) -> None:
        """What still runs is ended with an error, now."""
        self._is_ending = self._is_cut = True
        for deadline in list(self._deadlines):
            deadline.reschedule(asyncio.get_running_loop().time())

    def _count(self, rows: int) -> None:
        self._rows += rows
        self.metrics.running.set(self._rows)
        if self._rows:
            self._idle.clear()
        else:
            self._idle.set()

    def _reasons(self) -> str:
        return "; ".join(str(error) for error in self.llm.lost.values())


def _texts(tokenizer: Any, tokens: Iterable[int]) -> list[str]:
    return [str(tokenizer.decode([token], skip_special_tokens=False)) for token in tokens]


def _ending() -> ApiError:
    return ApiError(503, "This server is ending: ask another one.", code="shutting_down")
