"""What the groups of a request were given, and the steps of all rows together that follow from it."""

from __future__ import annotations

from collections.abc import Sequence

from runtime.generation.conversation import Conversation
from runtime.generation.generation_request import Step

__all__ = ["GroupResults"]


class GroupResults:
    """See the module's docstring."""

    def __init__(self, groups: list[Conversation]) -> None:
        self.groups = groups
        self._steps: list[list[Step]] = [[] for _ in groups]
        self._yielded = 0

    def learn(self, group: int, tokens: Sequence[int], logprobs: Sequence[float] | None) -> None:
        if self.groups[group].texts:
            self._steps[group].append(self.groups[group].learn(tokens, logprobs))

    @property
    def has_next(self) -> bool:
        """Whether every group has been given its next token, or has ended before, and some have not."""
        found = False
        for group, steps in zip(self.groups, self._steps, strict=True):
            if len(steps) > self._yielded:
                found = True
            elif not group.is_over:
                return False
        return found

    @property
    def is_over(self) -> bool:
        return all(group.is_over for group in self.groups)

    def next(self) -> Step:
        tokens: list[int | None] = []
        logprobs: list[float | None] = []
        scored = False
        for group, steps in zip(self.groups, self._steps, strict=True):
            step = steps[self._yielded] if len(steps) > self._yielded else None
            nothing = (None,) * len(group.texts)
            tokens += nothing if step is None else step.tokens
            scored |= step is not None and step.logprobs is not None
            logprobs += nothing if step is None or step.logprobs is None else step.logprobs
        self._yielded += 1
        return Step(tuple(tokens), tuple(logprobs) if scored else None)
