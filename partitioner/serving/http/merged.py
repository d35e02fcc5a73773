"""Several asynchronous iterators as one, each followed by a task of its own.

What an iterator does in one task (a timeout, say) stays in that task, whoever takes its items.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from typing import TypeVar

__all__ = ["merged"]

T = TypeVar("T")


async def merged(*iterators: AsyncGenerator[T]) -> AsyncGenerator[T]:
    """Items as they come. What one raises ends all; leaving early closes all."""
    come: asyncio.Queue[tuple[T] | BaseException | None] = asyncio.Queue()

    async def follow(iterator: AsyncIterator[T]) -> None:
        try:
            async for item in iterator:
                come.put_nowait((item,))
            come.put_nowait(None)
        except Exception as error:
            come.put_nowait(error)

    async def closing(iterator: AsyncGenerator[T]) -> None:
        async with aclosing(iterator):
            await follow(iterator)

    tasks = [asyncio.create_task(closing(iterator)) for iterator in iterators]
    try:
        left = len(tasks)
        while left:
            found = await come.get()
            if isinstance(found, BaseException):
                raise found
            if found is None:
                left -= 1
            else:
                yield found[0]
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
