"""A sequence as its scheduler knows it: its tokens, where they lie in the cache, and how many are there."""

from __future__ import annotations

from dataclasses import dataclass, field

from runtime.generation.batching.prefixes.blocks import key_of

__all__ = ["Sequence"]


@dataclass
class Sequence:
    number: int
    tokens: list[int]
    most: int
    piece: int | None
    arrival: int
    keys: list[bytes] = field(default_factory=list)
    """Of its full blocks, as far as they were asked for."""
    row: int = -1
    group: int = 0
    admission: int = -1
    known: int = 0
    """How many tokens it had when it was given its row."""
    blocks: list[int] = field(default_factory=list)
    behind: int = 0
    """How many of these it has given back."""
    computed: int = 0
    """How many of its tokens the cache holds."""

    @property
    def left(self) -> int:
        return len(self.tokens) - self.computed

    def key(self, index: int, size: int) -> bytes:
        while len(self.keys) <= index:
            start = len(self.keys) * size
            self.keys.append(key_of(self.keys[-1] if self.keys else b"", self.tokens[start : start + size]))
        return self.keys[index]
