"""Setting the cache of a replica aside, between two steps of what it does."""

from __future__ import annotations

from concurrent.futures import Future
from dataclasses import asdict
from typing import Any

from runtime.kv_cache.cache_size import CacheSize, Room
from runtime.launching.connection import Message

__all__ = ["Reserving"]


class Reserving:
    """`found`: how many tokens fit, as `Engine.reserve` says it."""

    def __init__(self, size: CacheSize) -> None:
        self.size = size
        self.found: Future[Room] = Future()

    def said(self) -> dict[str, Any]:
        return {"size": asdict(self.size)}

    def take(self, message: Message) -> None:
        if not self.found.done():
            self.found.set_result(Room(**message["room"]))

    def end(self, failure: BaseException | None = None) -> None:
        if failure is not None and not self.found.done():
            self.found.set_exception(failure)
