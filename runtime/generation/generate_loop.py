"""Continuing sequences on one rank: prompts through the graph in steps, then token by token.

    prefill   [B, up to prefill_step] tokens at a time; shorter rows repeat their last token, at its position
    decode    [B, 1]

A repeated token writes to the cache what is there already, so padding reaches neither a cache nor another token. Every
rank does the same on the host and draws the same tokens, so nobody has to tell the others.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from partitioner.errors import InputError
from runtime.communication.communicator import Communicator
from runtime.execution.executable import Executable
from runtime.execution.profile import Profiler
from runtime.generation.decode_graphs import Decoder, require_fixed_shapes
from runtime.generation.generation_options import Settings
from runtime.generation.generation_request import GenerationRequest, Step
from runtime.generation.token_rules import TokenRules
from runtime.kv_cache.batch import Batch
from runtime.kv_cache.cache import Cache
from runtime.kv_cache.cache_size import ANY_LENGTH, CacheSize, Room, default_step, slots_for, step_of
from runtime.program.rank_program import RankProgram
from runtime.sampling.sampler import Sampler
from runtime.sampling.sampling_options import Sampling

__all__ = ["GenerateLoop", "Loaded"]

T = TypeVar("T")
_ROUND_TO = 64


@dataclass(frozen=True)
class Loaded:
    """A program with its weights, in the order of `program.weights`."""

    program: RankProgram
    weights: Sequence[Tensor]


class GenerateLoop:
    """The programs of one rank that continue sequences, for prompts and for single tokens, and their one cache.

    The cache is made for the first task, and anew for a larger one; or once, by `reserve`, for all tasks.
    """

    def __init__(
        self,
        prefill: Loaded,
        decode: Loaded,
        communicator: Communicator,
        device: torch.device,
        *,
        profiler: Profiler | None = None,
        compile: bool = False,
        cuda_graph: bool = False,
    ) -> None:
        self._profiler = profiler or Profiler(prefill.program, device)
        self._prefill_by, self._decode_by = prefill, decode
        self.program = prefill.program
        """For prompts; that for single tokens has the same inputs, states and limits."""
        self.communicator, self.device = communicator, device
        if compile or cuda_graph:
            require_fixed_shapes(decode.program, device, cuda_graph=cuda_graph)
        self._compile, self._cuda_graph = compile, cuda_graph
        self.cache: Cache | None = None
        self.room: Room | None = None
        """What there is room for, once `reserve` has found out."""
        self._executables: tuple[Executable, Executable] | None = None
        """For prompts and for single tokens; one and the same where the programs are."""
        self._decoders: dict[int, Decoder] = {}
        """By the number of sequences."""
        self._pool: Any = None
        self._default_steps: dict[int, int] = {}
        self._turn = 0
        """Counts tasks: a stream that another task has overtaken must not go on."""

    def steps(self, request: GenerationRequest) -> Iterator[Step]:
        """One `Step` per token, until every sequence has ended."""
        settings = request.settings
        length = max(map(len, request.prompts)) + settings.max_new_tokens - 1  # the last token is never run
        self._check(request, length)
        wanted = settings.prefill_step or self._default_step(len(request.prompts))
        size = min(step_of(self.program, wanted, length), max(map(len, request.prompts)))
        self._provide(max_batch=len(request.prompts), max_length=length, step=size)
        assert self.cache is not None
        size = min(size, self.cache.step)
        self.cache.start()
        self._turn += 1
        mine = self._turn
        texts = [list(prompt) for prompt in request.prompts]
        ended = [False] * len(texts)
        requests = torch.tensor(settings.request_ids or list(range(len(texts))), device=self.device)
        sampler = Sampler(
            settings.sampling,
            self._profiler.watched(self.communicator),
            vocab_size=self.program.vocab_size,
            owned=self.program.vocabulary,
            device=self.device,
        )
        draw: Callable[..., tuple[Tensor, Tensor | None]] = (
            sampler.scored if settings.logprobs else lambda *given, **keys: (sampler(*given, **keys), None)
        )
        choose = self._profiler.timed("sampling", draw)
        watcher = request.watcher(self.program.vocab_size)
        logits = self._prefill(texts, size)
        chained: Iterator[Tensor] | None = None
        for count in range(1, settings.max_new_tokens + 1):
            logprobs: list[float] | None = None
            if chained is not None:
                tokens = sampler.chosen(next(chained))
            else:
                history, lengths = self._history(texts, settings.sampling)
                chosen, scores = choose(
                    logits,
                    request_ids=requests,
                    step=count - 1,
                    history=history,
                    lengths=lengths,
                    edits=watcher.edits(texts, count),
                )
                tokens, logprobs = chosen.tolist(), None if scores is None else scores.tolist()
            yield Step(_unless(ended, tokens), None if logprobs is None else _unless(ended, logprobs))
            if mine != self._turn:
                raise InputError("another text was begun on this engine: its cache no longer holds this stream's")
            for row, token in enumerate(tokens):
                if not ended[row]:
                    texts[row].append(token)
                    ended[row] = request.has_ended(texts[row])
            if all(ended) or count == settings.max_new_tokens:
                return
            # a sequence that has ended stays at its last token and position
            last, at = [text[-1] for text in texts], [len(text) - 1 for text in texts]
            if count == 1 and self._chains(settings):
                # those that have ended go on here, and are not listened to
                chained = self._decoder_for(len(texts)).chain(sampler.best, last, at, settings.max_new_tokens - 1)
            elif chained is None:
                logits = self._decode(last, at, tuple(not over for over in ended))

    def _chains(self, settings: Settings) -> bool:
        """Whether the device can choose tokens by itself: nothing else is asked of a step, and nobody measures it."""
        sampling = settings.sampling
        plain = not sampling.do_sample and sampling.repetition_penalty == 1 and settings.rules == TokenRules()
        plain &= not settings.logprobs
        return self._cuda_graph and plain and self._profiler.recording is None

    def _history(self, texts: list[list[int]], sampling: Sampling) -> tuple[Tensor | None, Tensor | None]:
        """The tokens so far [B, L], of which the first [B] count; only the repetition penalty asks for them."""
        if sampling.repetition_penalty == 1:
            return None, None
        lengths = torch.tensor([len(text) for text in texts], device=self.device)
        most = max(map(len, texts))
        return torch.tensor([text + [0] * (most - len(text)) for text in texts], device=self.device), lengths

    def reserve(self, size: CacheSize) -> Room:
        """A collective: sets the cache of all later tasks aside, of the same size on all ranks."""
        self._make_no_cache()
        if size.prefill_step is None:
            size = replace(size, prefill_step=self._default_step(size.max_batch))
        assert size.prefill_step is not None
        room = Room.agreed(self.program, size, self.communicator, self.device)
        max_length = size.max_length
        if max_length is None:
            max_length = ANY_LENGTH if room.tokens is None else room.tokens
            if room.tokens is not None and room.tokens != room.limit and max_length > _ROUND_TO:
                max_length -= max_length % _ROUND_TO
                room = replace(room, tokens=max_length)
        room.require(max(max_length, 1))
        self.room = room
        self._make_cache(
            max_batch=size.max_batch,
            max_length=max_length,
            step=step_of(self.program, size.prefill_step, max_length),
        )
        return self.room

    def _default_step(self, max_batch: int) -> int:
        if max_batch not in self._default_steps:
            step = default_step(self.program, self.communicator, self.device, max_batch=max_batch)
            self._default_steps[max_batch] = step
        return self._default_steps[max_batch]

    def _provide(self, *, max_batch: int, max_length: int, step: int) -> None:
        """Sets memory aside for a task, unless what there is suffices."""
        cache = self.cache
        if self.room is not None and cache is not None:
            if max_batch > cache.max_batch or max_length > cache.max_length:
                raise InputError(
                    f"the cache set aside holds {cache.max_batch} sequences of {cache.max_length} tokens; this task "
                    f"needs {max_batch} of {max_length}, prompt and new ones ({self.room}). Give fewer or shorter "
                    "prompts or fewer new tokens, or reserve more"
                )
            return
        if cache and cache.max_batch >= max_batch and cache.max_length >= max_length and cache.step >= step:
            return
        if not self._keeps_steps():
            self._make_no_cache()
        elif cache is not None:
            for decoder in self._decoders.values():
                decoder.release()
            cache.drop()
        size = CacheSize(max_batch=max_batch, max_length=max_length, prefill_step=step)
        room = Room.agreed(self.program, size, self.communicator, self.device)
        try:
            room.require(max_length)
        except InputError:
            self._make_no_cache()
            raise
        # lengths that kernels like, and that the next task may share
        max_length = -(-max_length // _ROUND_TO) * _ROUND_TO
        if room.tokens is not None:
            max_length = min(max_length, room.tokens)
        self._make_cache(max_batch=max_batch, max_length=max_length, step=step)

    def _keeps_steps(self) -> bool:
        """Whether what is compiled serves a cache of another size as well."""
        return self.cache is not None and bool(self._decoders) and self.cache.any_length

    def _make_no_cache(self) -> None:
        """The old one is given back before a new one is made."""
        if self.cache is not None:
            self.cache.drop()  # what is bound to it may keep it for a while
        self._decoders.clear()
        self.cache = self._executables = self.room = None

    def _make_cache(self, *, max_batch: int, max_length: int, step: int) -> None:
        slots = slots_for(self.program, max_length)
        if self._keeps_steps() and self.cache is not None:
            self.cache.resize(max_batch=max_batch, max_length=max_length, step=step, slots=slots)
            return
        self.cache = Cache(
            self.program.states, max_batch=max_batch, max_length=max_length, step=step, device=self.device, slots=slots
        )
        prefill = self._executable(self._prefill_by)
        same = self._decode_by is self._prefill_by
        self._executables = prefill, prefill if same else self._executable(self._decode_by)

    def _executable(self, loaded: Loaded) -> Executable:
        return Executable(loaded.program, loaded.weights, self.communicator, self.device, self.cache, self._profiler)

    def release(self) -> None:
        """Gives back the cache and the captured steps; a stream that is under way cannot go on."""
        for decoder in self._decoders.values():
            decoder.release()
        self._make_no_cache()
        self._turn += 1

    def _decode(self, tokens: list[int], positions: list[int], going: tuple[bool, ...]) -> Tensor:
        if not self._compile and not self._cuda_graph:
            return self.run([[token] for token in tokens], positions, going, decode=True)
        return self._decoder_for(len(tokens))(tokens, positions)

    def _decoder_for(self, batch: int) -> Decoder:
        assert self.cache is not None
        assert self._executables is not None
        if batch not in self._decoders:
            if self._cuda_graph and self._pool is None:
                self._pool = torch.cuda.graph_pool_handle()
            self._decoders[batch] = Decoder(
                self._decode_by.program,
                self._executables[1],
                self.cache,
                batch=batch,
                device=self.device,
                compile=self._compile,
                cuda_graph=self._cuda_graph,
                pool=self._pool,
            )
        return self._decoders[batch]

    @property
    def _least_slots(self) -> int:
        return self.program.limits.get("slots", (1, None))[0]

    def _check(self, request: GenerationRequest, length: int) -> None:
        """Tokens and positions must be ones that the model's tables have."""
        low, _ = self.program.limits.get("sequence", (1, None))
        if low > 1:
            raise InputError(f"this model was compiled for {low} tokens at a time or more: it cannot decode")
        _, longest = self.program.limits.get("positions", (1, None))
        _, slots = self.program.limits.get("slots", (1, None))
        longest = longest if slots is None else min(slots - 1, longest or slots)
        if longest is not None and length > longest:
            raise InputError(
                f"prompt and new tokens make up to {length}, but this model was compiled for up to {longest}: "
                "by partition(..., max_length=), --max-length on the command line, or because its own code does "
                "something else for longer texts"
            )
        for wanted in self.program.inputs:
            if wanted.bound is None:
                continue
            if wanted.name == "position_ids" and length - 1 > wanted.bound.high:
                raise InputError(
                    f"prompt and new tokens make up to {length}, and this model takes at most {wanted.bound.high + 1}: "
                    f"its positions must be {wanted.bound}"
                )
            if wanted.name == "input_ids":
                for row, prompt in enumerate(request.prompts):
                    if min(prompt) < wanted.bound.low or max(prompt) > wanted.bound.high:
                        raise InputError(f"prompt {row} holds a token out of range; ids must be {wanted.bound}")

    def _prefill(self, texts: list[list[int]], size: int) -> Tensor:
        """The logits [B, V/n] of each prompt's last token."""
        found: Tensor | None = None
        for start in range(0, max(map(len, texts)), size):
            # a prompt that is through repeats its last token at its position, which changes nothing
            starts = [min(start, len(text) - 1) for text in texts]
            rows = [text[at : start + size] or text[at:] for text, at in zip(texts, starts, strict=True)]
            logits = self.run(rows, starts, tuple(start < len(text) for text in texts))
            through = torch.tensor([start < len(text) <= start + size for text in texts], device=self.device)
            found = logits if found is None else torch.where(through[:, None], logits, found)
        assert found is not None
        return found

    def run(
        self, rows: list[list[int]], starts: list[int], active: tuple[bool, ...], *, decode: bool = False
    ) -> Tensor:
        """The logits of each row's last token; `starts`: the position of its first; `active`: rows that are not
        repeated; `decode`: by the program for single tokens.
        """
        assert self.cache is not None
        assert self._executables is not None
        counts = [len(row) for row in rows]
        size = max(counts)
        ids = torch.tensor([row + row[-1:] * (size - len(row)) for row in rows], device=self.device)
        last = torch.tensor(counts, device=self.device) - 1
        offsets = torch.arange(size, device=self.device).minimum(last[:, None])
        positions = torch.tensor(starts, device=self.device)[:, None] + offsets
        batch = Batch(positions, tuple(starts), tuple(counts), active)
        self.cache.begin(batch)
        given = {"input_ids": ids, "position_ids": positions, "last": last}
        given["active"] = torch.tensor(active, device=self.device)
        # a graph for single steps may decide by whether there are slots besides those of its tokens
        given["slots"] = torch.arange(max(batch.end + 1, self._least_slots), device=self.device)
        for wanted in self.program.inputs:
            if wanted.name not in given:
                raise InputError(f"generation knows nothing to give the input {wanted.name!r} of this model")
        logits: Tensor = self._executables[decode]([given[wanted.name] for wanted in self.program.inputs])
        return logits[:, 0]


def _unless(ended: list[bool], values: Sequence[T]) -> tuple[T | None, ...]:
    return tuple(None if over else value for value, over in zip(values, ended, strict=True))
