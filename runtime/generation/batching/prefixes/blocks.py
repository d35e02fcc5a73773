"""Blocks of a paged cache: which are free, which hold tokens, and which of those are a prefix that others may use.

    take()               a block that nobody uses; of those that still hold a prefix the one unused for longest
    keep(block, key)     the block is full and computed; `key` says which tokens stand in it and in all before it
    share(key)           the block with that key, for one user more
    release(blocks)      one user less of each

    key of a block = digest(key of the block before, its tokens)

Two sequences that begin alike so have equal keys, as far as they are alike, and a block is found by what stands before
it as well (PagedAttention, arXiv:2309.06180, section 4.3). A block without users keeps its tokens until it is needed.
Nothing here does I/O, and every rank that is asked the same answers the same.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import deque
from collections.abc import Iterable, Sequence

__all__ = ["BlockPool", "key_of"]


def key_of(before: bytes, tokens: Sequence[int]) -> bytes:
    """The key of a block of `tokens` behind the one with the key `before`; b"" for the first."""
    return hashlib.blake2b(before + array("q", tokens).tobytes(), digest_size=16).digest()


class BlockPool:
    """`count` blocks, numbered from 0."""

    def __init__(self, count: int) -> None:
        self.count = count
        self._fresh = 0
        """Blocks from this number on were never used."""
        self._blank: deque[int] = deque()
        self._users: dict[int, int] = {}
        self._keys: dict[int, bytes] = {}
        self._by_key: dict[bytes, int] = {}
        self._unused: dict[int, None] = {}
        """Blocks that hold a prefix and have no user, the one released first in front."""

    @property
    def free(self) -> int:
        """How many can be taken."""
        return self.count - len(self._users)

    @property
    def holding(self) -> int:
        """How many hold something that may be read again."""
        return len(self._users) + len(self._unused)

    def next(self, *, fresh: bool = False) -> int | None:
        """What `take` gives, where nothing of it is a prefix."""
        if self._fresh < self.count and (fresh or not self._blank):
            return self._fresh
        return self._blank[0] if self._blank else None

    def refresh(self, block: int) -> None:
        """Of the blocks that hold no prefix and nobody uses, `block` is the last to be taken."""
        if block in self._blank:
            self._blank.remove(block)
            self._blank.append(block)

    def take(self, *, fresh: bool = False) -> int | None:
        """fresh: one that was never used, if there is one; else one that was given back, the first of them first."""
        block = self.next(fresh=fresh)
        if block is not None and block == self._fresh:
            self._fresh += 1
        elif block is not None:
            self._blank.popleft()
        elif self._unused:
            block = next(iter(self._unused))
            del self._unused[block]
            self._forget(block)
        else:
            return None
        self._users[block] = 1
        return block

    def keep(self, block: int, key: bytes) -> None:
        """Of equal blocks the first is kept for others."""
        assert self._users[block]
        if key not in self._by_key and block not in self._keys:
            self._by_key[key] = block
            self._keys[block] = key

    def has(self, key: bytes) -> bool:
        return key in self._by_key

    def is_used(self, key: bytes) -> bool:
        """Whether somebody uses the block with that key: then to share it takes none away."""
        return self._by_key.get(key) in self._users

    def share(self, key: bytes) -> int | None:
        block = self._by_key.get(key)
        if block is None:
            return None
        self._unused.pop(block, None)
        self._users[block] = self._users.get(block, 0) + 1
        return block

    def release(self, blocks: Iterable[int], *, keep: bool = True) -> list[int]:
        """Those that nobody uses now. keep: whether what they hold may still be shared.

        Give a sequence's blocks from the first to the last: the last is the first to be taken again.
        """
        done = []
        for block in reversed(list(blocks)):
            self._users[block] -= 1
            if self._users[block]:
                continue
            del self._users[block]
            done.append(block)
            if block in self._keys and keep:
                self._unused[block] = None
            else:
                self._forget(block)
                self._blank.append(block)
        return done

    def _forget(self, block: int) -> None:
        key = self._keys.pop(block, None)
        if key is not None:
            del self._by_key[key]
