"""What is to be continued, and what comes back: prompts as rows of tokens, results as transformers returns them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from partitioner.errors import InputError
from runtime.generation.generation_options import Settings
from runtime.generation.stop_strings import StopStrings
from runtime.generation.token_rules import Watcher
from runtime.program.rank_program import RankProgram

__all__ = ["Generated", "GenerationRequest", "Prompts", "Step", "longest_text"]

Prompts = Tensor | Sequence[Sequence[int]] | Sequence[Tensor]


@dataclass(frozen=True)
class Step:
    """One token per sequence, None where it has ended; and its log-probability, where asked for.

    top: where `top_logprobs` was asked for, by sequence, (token, log-probability) of that token and the most probable.
    """

    tokens: tuple[int | None, ...]
    logprobs: tuple[float | None, ...] | None
    top: tuple[tuple[tuple[int, float], ...] | None, ...] | None = None


@dataclass(frozen=True)
class Generated:
    """sequences [B, L + N] int64; logprobs [B, N] of the new tokens, nan after the end of a sequence."""

    sequences: Tensor
    logprobs: Tensor


@dataclass(frozen=True)
class GenerationRequest:
    """prompts: the tokens of each row, without padding. ids [B, L]: the prompts as they will be returned.

    numbers: of some rows of a request, which these are; (): these are all.
    """

    prompts: tuple[tuple[int, ...], ...]
    ids: Tensor
    settings: Settings
    stops: StopStrings | None = None
    numbers: tuple[int, ...] = ()

    @classmethod
    def of(
        cls,
        prompts: Prompts | None,
        attention_mask: Tensor | None,
        options: Mapping[str, Any],
        *,
        eos_token_id: tuple[int, ...],
        model: Mapping[str, Any] | None = None,
    ) -> GenerationRequest:
        """`model`: what its generation config says besides `eos_token_id`."""
        prompts, options = _named(prompts, options)
        width = _width(prompts)
        settings = Settings.of(options, eos_token_id=eos_token_id, model=model, width=width)
        stops = StopStrings(settings.stop_strings, settings.tokenizer) if settings.stop_strings else None
        rows, ids = _rows(prompts, attention_mask, settings.pad_token_id)
        if not rows:
            raise InputError("no prompts: give at least one row of tokens")
        for row, tokens in enumerate(rows):
            if not tokens:
                raise InputError(f"prompt {row} is empty: generation starts from at least one token")
        requests = settings.request_ids
        if requests is not None and len(requests) != len(rows):
            raise InputError(f"request_ids must name each of the {len(rows)} prompts, got {len(requests)}")
        return cls(rows, ids, settings, stops)

    @property
    def longest(self) -> int:
        """Tokens of the longest text that may come of it, without the last one, which is never run."""
        return max(map(len, self.prompts)) + self.settings.max_new_tokens - 1

    def of_rows(self, rows: Sequence[int]) -> GenerationRequest:
        """Some of the rows, which are told the same tokens as among all."""
        requests = self.settings.request_ids or range(len(self.prompts))
        settings = replace(self.settings, request_ids=tuple(requests[row] for row in rows))
        return replace(
            self,
            prompts=tuple(self.prompts[row] for row in rows),
            ids=self.ids[list(rows)],
            settings=settings,
            numbers=tuple(rows),
        )

    def require_fits(self, program: RankProgram, length: int) -> None:
        """Raises InputError where the model's tables lack a token or a position of texts of `length` tokens."""
        low, _ = program.limits.get("sequence", (1, None))
        if low > 1:
            raise InputError(f"this model was compiled for {low} tokens at a time or more: it cannot decode")
        longest = _compiled_for(program)
        if longest is not None and length > longest:
            raise InputError(
                f"prompt and new tokens make up to {length}, but this model was compiled for up to {longest}: "
                "by partition(..., max_length=), --max-length on the command line, or because its own code does "
                "something else for longer texts"
            )
        for wanted in program.inputs:
            if wanted.bound is None:
                continue
            if wanted.name == "position_ids" and length - 1 > wanted.bound.high:
                raise InputError(
                    f"prompt and new tokens make up to {length}, and this model takes at most {wanted.bound.high + 1}: "
                    f"its positions must be {wanted.bound}"
                )
            if wanted.name == "input_ids":
                for row, prompt in enumerate(self.prompts):
                    if min(prompt) < wanted.bound.low or max(prompt) > wanted.bound.high:
                        number = self.numbers[row] if self.numbers else row
                        raise InputError(f"prompt {number} holds a token out of range; ids must be {wanted.bound}")

    def watcher(self, vocab_size: int) -> Watcher:
        """Which tokens the steps must and must not take, from the first on."""
        settings = self.settings
        return Watcher(
            settings.rules,
            width=self.ids.shape[1],
            eos_token_id=settings.eos_token_id,
            max_new_tokens=settings.max_new_tokens,
            vocab_size=vocab_size,
        )

    def has_ended(self, tokens: Sequence[int]) -> bool:
        """`tokens` of one sequence, its prompt's first."""
        if tokens[-1] in self.settings.eos_token_id:
            return True
        return self.stops is not None and self.stops.end(tokens)

    def result(self, steps: Sequence[Step]) -> Tensor | Generated:
        pad = self.settings.pad_token_id
        new = [[pad if token is None else token for token in step.tokens] for step in steps]
        sequences = torch.cat([self.ids, torch.tensor(new, dtype=torch.int64, device=self.ids.device).t()], dim=1)
        if not self.settings.logprobs:
            return sequences
        said = [[float("nan") if value is None else value for value in step.logprobs or ()] for step in steps]
        return Generated(sequences, torch.tensor(said, dtype=torch.float64).t())


def longest_text(program: RankProgram) -> int | None:
    """Tokens that the model can run of one text; None: nothing in it sets a limit."""
    found = [wanted.bound.high + 1 for wanted in program.inputs if wanted.name == "position_ids" and wanted.bound]
    compiled_for = _compiled_for(program)
    return min(found + ([] if compiled_for is None else [compiled_for]), default=None)


def _compiled_for(program: RankProgram) -> int | None:
    _, longest = program.limits.get("positions", (1, None))
    _, slots = program.limits.get("slots", (1, None))
    return longest if slots is None else min(slots - 1, longest or slots)


def _width(prompts: Prompts) -> int:
    """How many tokens the longest has, as far as that can be said of what is not checked yet."""
    if isinstance(prompts, Tensor):
        return prompts.shape[1] if prompts.dim() == 2 else 1
    rows = prompts if isinstance(prompts, (list, tuple)) else ()
    return max((len(row) for row in rows if isinstance(row, (list, tuple, Tensor))), default=1)


def _named(prompts: Prompts | None, options: Mapping[str, Any]) -> tuple[Prompts, dict[str, Any]]:
    """The prompts, wherever they were given, and the other options."""
    others = dict(options)
    every: dict[str, Any] = {"prompts": prompts}
    every |= {name: others.pop(name) for name in ("input_ids", "inputs") if name in others}
    named = {name: value for name, value in every.items() if value is not None}
    if len(named) > 1:
        raise InputError(f"prompts are given twice, as {' and '.join(named)}: give one of them")
    return next(iter(named.values()), None), others  # type: ignore[return-value]  # None is refused with the rest


def _rows(prompts: Prompts, attention_mask: Tensor | None, pad: int) -> tuple[tuple[tuple[int, ...], ...], Tensor]:
    if isinstance(prompts, Tensor):
        if prompts.dim() != 2 or prompts.dtype not in (torch.int64, torch.int32):
            raise InputError(f"prompts must be token ids [B, L], int64; got {prompts.dtype} {list(prompts.shape)}")
        if prompts.is_meta or prompts.layout is not torch.strided:
            raise InputError("prompts must hold data, as a plain tensor")
        if attention_mask is not None and not isinstance(attention_mask, Tensor):
            raise InputError(f"attention_mask must be a tensor, got {type(attention_mask).__name__}")
        if attention_mask is None:
            return tuple(map(tuple, prompts.tolist())), prompts.long()
        if attention_mask.shape != prompts.shape:
            raise InputError(f"attention_mask must be {list(prompts.shape)}, got {list(attention_mask.shape)}")
        mask = attention_mask.bool()
        if bool((mask.int().diff(dim=1) != 0).sum(dim=1).gt(1).any()):
            raise InputError("attention_mask has a hole: pad prompts at one end only")
        rows = [
            [t for t, keep in zip(*pair, strict=True) if keep]
            for pair in zip(prompts.tolist(), mask.tolist(), strict=True)
        ]
        return tuple(map(tuple, rows)), prompts.long()
    if not isinstance(prompts, (list, tuple)) or not all(isinstance(row, (list, tuple, Tensor)) for row in prompts):
        raise InputError("prompts must be token ids [B, L], or a list with a list of ids for each; " + _got(prompts))
    if attention_mask is not None:
        raise InputError("attention_mask goes with prompts [B, L]; a list of rows needs none")
    rows = [list(row.tolist() if isinstance(row, Tensor) else row) for row in prompts]
    for number, row in enumerate(rows):
        if not all(isinstance(token, int) and not isinstance(token, bool) and 0 <= token < 2**63 for token in row):
            raise InputError(f"prompt {number} must be token ids, whole numbers from 0 on; {_got(row)}")
    longest = max(map(len, rows), default=0)
    ids = torch.tensor([[pad] * (longest - len(row)) + row for row in rows], dtype=torch.int64)
    return tuple(map(tuple, rows)), ids


def _got(given: object) -> str:
    text = repr(given)
    return f"got {text if len(text) < 60 else type(given).__name__}"
