"""Continuing sequences on one rank: prompts through the graph in steps, then token by token.

    prefill   [B, up to prefill_step] tokens at a time; shorter rows repeat their last token, at its position
    decode    [B, 1]

A repeated token writes to the cache what is there already, so padding reaches neither a cache nor another token. Every
rank does the same on the host and draws the same tokens, so nobody has to tell the others.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from partitioner.errors import InputError
from runtime.cache import Batch, Cache
from runtime.communicator import Communicator
from runtime.executable import Executable
from runtime.rank_program import RankProgram
from runtime.sampling import Sampler
from runtime.task import Step, Task

__all__ = ["Continuation", "Step"]


class Continuation:
    """The generation program of one rank, its weights in the order of `program.weights`, and its cache.

    The cache is made for the first task, and anew for a larger one.
    """

    def __init__(
        self, program: RankProgram, weights: Sequence[Tensor], communicator: Communicator, device: torch.device
    ) -> None:
        self.program, self.weights, self.communicator, self.device = program, weights, communicator, device
        self.cache: Cache | None = None
        self._execute: Executable | None = None

    def steps(self, task: Task) -> Iterator[Step]:
        """One `Step` per token, until every sequence has ended."""
        settings = task.settings
        size = min(settings.prefill_step, max(map(len, task.prompts)), self._most_at_once())
        self.reserve(
            max_batch=len(task.prompts),
            max_length=max(map(len, task.prompts)) + settings.max_new_tokens - 1,
            step=size,
        )
        texts = [list(prompt) for prompt in task.prompts]
        ended = [False] * len(texts)
        requests = torch.tensor(settings.request_ids or range(len(texts)), device=self.device)
        sampler = Sampler(settings.sampling, self.program, self.communicator, logprobs=settings.logprobs)
        logits = self._prefill(texts, size)
        for count in range(1, settings.max_new_tokens + 1):
            tokens, logprobs = sampler(logits, request_ids=requests, step=count - 1, texts=texts)
            yield Step(
                tuple(None if over else token for token, over in zip(tokens, ended, strict=True)),
                tuple(None if over else value for value, over in zip(logprobs, ended, strict=True)),
            )
            for row, token in enumerate(tokens):
                if not ended[row]:
                    texts[row].append(token)
                    ended[row] = task.has_ended(texts[row], count)
            if all(ended) or count == settings.max_new_tokens:
                return
            # a sequence that has ended stays at its last token and position
            logits = self._run([text[-1:] for text in texts], [len(text) - 1 for text in texts])

    def reserve(self, *, max_batch: int, max_length: int, step: int) -> None:
        """Sets memory aside, unless what there is suffices."""
        cache = self.cache
        if cache and cache.max_batch >= max_batch and cache.max_length >= max_length and cache.step >= step:
            return
        self._check_length(max_length)
        self.cache = self._execute = None  # the old one is given back first
        self.cache = Cache(
            self.program.states, max_batch=max_batch, max_length=max_length, step=step, device=self.device
        )
        self._execute = Executable(self.program, self.weights, self.communicator, self.device, self.cache)

    def _most_at_once(self) -> int:
        low, high = self.program.limits.get("sequence", (1, None))
        if low > 1:
            raise InputError(f"this model was compiled for {low} tokens at a time or more: it cannot decode")
        return high or 1 << 62

    def _check_length(self, length: int) -> None:
        """Positions must stay within what the model was compiled for."""

    def _prefill(self, texts: list[list[int]], size: int) -> Tensor:
        """The logits [B, V/n] of each prompt's last token."""
        found: Tensor | None = None
        for start in range(0, max(map(len, texts)), size):
            # a prompt that is through repeats its last token at its position, which changes nothing
            starts = [min(start, len(text) - 1) for text in texts]
            logits = self._run([text[at : start + size] or text[at:] for text, at in zip(texts, starts, strict=True)], starts)
            through = torch.tensor([start < len(text) <= start + size for text in texts], device=self.device)
            found = logits if found is None else torch.where(through[:, None], logits, found)
        assert found is not None
        return found

    def _run(self, rows: list[list[int]], starts: list[int]) -> Tensor:
        """The logits of each row's last token; `starts`: the position of its first."""
        assert self.cache is not None
        assert self._execute is not None
        counts = [len(row) for row in rows]
        size = max(counts)
        ids = torch.tensor([row + row[-1:] * (size - len(row)) for row in rows], device=self.device)
        last = torch.tensor(counts, device=self.device) - 1
        offsets = torch.arange(size, device=self.device).minimum(last[:, None])
        positions = torch.tensor(starts, device=self.device)[:, None] + offsets
        self.cache.begin(Batch(positions, tuple(starts), tuple(counts)))
        given = {"input_ids": ids, "position_ids": positions, "last": last}
        for wanted in self.program.inputs:
            if wanted.name not in given:
                raise InputError(f"generation knows nothing to give the input {wanted.name!r} of this model")
        logits: Tensor = self._execute([given[wanted.name] for wanted in self.program.inputs])
        return logits[:, 0]
