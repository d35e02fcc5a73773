"""Continuing sequences on one rank: prompts through the graph in pieces, then token by token.

    Conversation    the tokens of each sequence, on the host        `conversation.py`
    Steps           one piece through this rank's programs          `steps.py`
    TokenChooser    the next tokens from the logits                 `choose_tokens.py`
    StagedLoop      the order of these over pipeline stages         `staged/staged_loop.py`
    GenerateLoop    the order of these, and the memory of the cache
    BatchLoop       many requests at once, in the place of one task after the other   `batching/batch_loop.py`

Every rank does the same on the host and draws the same tokens, so nobody has to tell the others.
"""

from __future__ import annotations

import logging
from collections.abc import Generator, Iterator, Sequence
from dataclasses import replace

import torch

from partitioner.errors import InputError
from runtime.communication.communicator import Communicator, all_stages
from runtime.execution.profile import Profiler
from runtime.execution.prompts.piece import places
from runtime.generation.batching.batch_loop import BatchLoop
from runtime.generation.batching.one_request import one_request
from runtime.generation.choose_tokens import GivenTokens, TokenChooser, TokensOfSteps
from runtime.generation.conversation import Conversation
from runtime.generation.decode_graphs.decoder import require_fixed_shapes
from runtime.generation.generation_options import Settings
from runtime.generation.generation_request import GenerationRequest, Step
from runtime.generation.staged.staged_loop import StagedLoop
from runtime.generation.steps import Loaded, Steps
from runtime.generation.token_rules import TokenRules
from runtime.kv_cache.cache import Cache
from runtime.kv_cache.cache_size import (
    ANY_LENGTH,
    CacheSize,
    Room,
    WhatIsKept,
    default_step,
    held_as,
    slots_for,
    step_of,
)
from runtime.kv_cache.sharded_cache import cache_for
from runtime.program.rank_program import RankProgram

__all__ = ["GenerateLoop"]

_log = logging.getLogger("partitioner")
_ROUND_TO = 64


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
        profiler: Profiler,
        compile: bool,
        cuda_graph: bool,
    ) -> None:
        self._profiler = profiler
        self._prefill_by, self._decode_by = prefill, decode
        self.program = prefill.program
        """For prompts; that for single tokens has the same inputs, states and limits."""
        self.communicator, self.device = communicator, device
        if compile or cuda_graph:
            require_fixed_shapes(decode.program, device, cuda_graph=cuda_graph)
        self._compile, self._cuda_graph = compile, cuda_graph
        self.room: Room | None = None
        """What there is room for, once `reserve` has found out."""
        self._bound: Steps | None = None
        """The programs with the cache that is set aside now."""
        self._batches: BatchLoop | None = None
        """Where ranks have sequences of their own: what requests are dealt to."""
        self._batches_for = (0, 0)
        """Rows, and tokens of each, that its cache was set aside for."""
        self._counts_tokens = False
        """As `WhatIsKept` has it, once there is a cache."""
        self._default_steps: dict[int, int] = {}
        self._told_of_rule = False
        self._staged: StagedLoop | None = None
        """The latest task's, over stages."""
        self._dealt_out: Generator[Step] | None = None
        """The same where ranks have sequences of their own: its rows are theirs as long as it goes on."""
        self._turn = 0
        """Counts tasks: a stream that another task has overtaken must not go on."""

    @property
    def cache(self) -> Cache | None:
        return None if self._bound is None else self._bound.cache

    def steps(self, request: GenerationRequest, *, given: Sequence[Sequence[int]] | None = None) -> Iterator[Step]:
        """One `Step` per token, until every sequence has ended.

        given: texts by request id, whose tokens are taken in the place of chosen ones; the request asks for `logprobs`.
        """
        settings = request.settings
        if settings.top_logprobs is not None:
            raise InputError("top_logprobs is offered by ranks that partitioner.launch started: leave it out here")
        if settings.grammar is not None:
            raise InputError("grammar is offered by ranks that partitioner.launch started: leave it out here")
        longest = max(map(len, request.prompts))
        length = longest + settings.max_new_tokens - 1  # the last token is never run
        request.require_fits(self.program, length)
        self._leave()
        if self.program.batch_axes:
            by_row = None if given is None else [given[number] for number in settings.request_ids or range(len(given))]
            yield from self._dealt(request, length, by_row)
            return
        wanted = settings.prefill_step or self._default_step(len(request.prompts))
        size = min(step_of(self.program, wanted, length), longest)
        run = self._provide(max_batch=len(request.prompts), max_length=length, step=size)
        run.cache.start()
        self._turn += 1
        turn = self._turn
        choosing = self.program, settings, self.communicator, self.device, self._profiler
        chooser = TokenChooser(*choosing) if given is None else GivenTokens(given, *choosing)
        if self.program.stage is not None:
            staged = self._staged = StagedLoop(
                run,
                self.program,
                self._decode_by.program,
                self.communicator,
                self.device,
                self._profiler,
                alike=self._counts_tokens,
                relays=self._relays(settings),
            )
            for step in staged.steps(request, chooser, min(size, run.cache.step)):
                yield step
                self._require(turn)
            return
        conversation = Conversation(request, vocab_size=self.program.vocab_size)
        pieces = conversation.prompt_pieces(run.cache.piece_size(size, longest), alike=self._counts_tokens)
        logits = run.prefill(pieces)
        of_steps: TokensOfSteps | None = None
        while True:
            if of_steps is not None:
                tokens, logprobs = of_steps.choose(conversation)
            else:
                tokens, logprobs = chooser.choose(logits, conversation)
            yield conversation.learn(tokens, logprobs)
            self._require(turn)
            if conversation.is_over:
                return
            if of_steps is None and given is None and self._chooses_in_steps(settings):
                # rows that have ended go on there, and are not listened to
                of_steps = TokensOfSteps(run.decoder(len(request.prompts)), chooser, settings)
            elif of_steps is None:
                logits = run.decode(conversation.next_piece())

    def _dealt(self, request: GenerationRequest, length: int, given: Sequence[Sequence[int]] | None) -> Iterator[Step]:
        """Where each rank of dp has sequences of its own."""
        rows, (most, longest) = len(request.prompts), self._batches_for
        if self._batches is None or (self.room is None and (rows > most or length > longest)):
            self._drop_cache()
            self._batches_for = max(rows, most), max(length, longest)
            self._batches = self._batch_loop(CacheSize(max_batch=max(rows, most), max_length=max(length, longest)))
        self._turn += 1
        turn = self._turn
        self._dealt_out = one_request(self._batches, request, given=given)
        for said in self._dealt_out:
            yield said
            self._require(turn)

    def _require(self, turn: int) -> None:
        if turn != self._turn:
            raise InputError("another text was begun on this engine: its cache no longer holds this stream's")

    def _chooses_in_steps(self, settings: Settings) -> bool:
        """Whether captured steps can choose tokens by themselves, and nobody measures them."""
        if not self._cuda_graph or self._profiler.recording is not None:
            return False
        rule = settings.rules.on_host
        if rule and not self._told_of_rule and self.program.rank == 0:
            _log.warning("tokens are chosen behind captured steps, in spite of cuda_graph: %s is the host's work", rule)
            self._told_of_rule = True
        return not rule

    def _relays(self, settings: Settings) -> bool:
        """Whether stages can hand on by themselves: nothing but the likeliest tokens is asked for, nobody measures."""
        sampling = settings.sampling
        plain = not sampling.do_sample and sampling.repetition_penalty == 1 and settings.rules == TokenRules()
        plain &= not settings.logprobs and self._profiler.recording is None
        # over stages there is something to gain too where steps are only compiled: what a stage hands on does not wait
        return plain and (self._cuda_graph or self._compile)

    def _leave(self) -> None:
        """Ends what a stream has under way, if there is one: over stages others would wait for it."""
        staged, self._staged = self._staged, None
        if staged is not None:
            staged.leave()
        dealt_out, self._dealt_out = self._dealt_out, None
        if dealt_out is not None:
            dealt_out.close()

    def reserve(self, size: CacheSize) -> Room:
        """A collective: sets the cache of all later tasks aside, of the same size on all ranks."""
        self._leave()
        self._drop_cache()
        if self.program.batch_axes:
            self._batches = self._batch_loop(None)
            self.room = self._batches.reserve(size)
            return self.room
        if size.prefill_step is None:
            size = replace(size, prefill_step=self._default_step(size.max_batch))
        assert size.prefill_step is not None
        program = held_as(self.program, size.dtype, self.communicator, self.device)
        room = Room.agreed(program, size, self.communicator, self.device)
        max_length = size.max_length
        if max_length is None:
            max_length = ANY_LENGTH if room.tokens is None else room.tokens
            if room.tokens is not None and room.tokens != room.limit and max_length > _ROUND_TO:
                max_length -= max_length % _ROUND_TO
                room = replace(room, tokens=max_length)
        room.require(max(max_length, 1))
        self.room = room
        step = step_of(self.program, size.prefill_step, max_length)
        self._bound = self._steps_over(program, max_batch=size.max_batch, max_length=max_length, step=step)
        return self.room

    def _default_step(self, max_batch: int) -> int:
        if max_batch not in self._default_steps:
            step = default_step(self.program, self.communicator, self.device, max_batch=max_batch)
            self._default_steps[max_batch] = step
        return self._default_steps[max_batch]

    def _provide(self, *, max_batch: int, max_length: int, step: int) -> Steps:
        """Sets memory aside for a task, unless what there is suffices."""
        if self._bound is not None:
            cache = self._bound.cache
            if self.room is not None:
                if max_batch > cache.max_batch or max_length > cache.max_length:
                    raise InputError(
                        f"the cache set aside holds {cache.max_batch} sequences of {cache.max_length} tokens; this "
                        f"task needs {max_batch} of {max_length}, prompt and new ones ({self.room}). Give fewer or "
                        "shorter prompts or fewer new tokens, or reserve more"
                    )
                return self._bound
            if cache.max_batch >= max_batch and cache.max_length >= max_length and cache.step >= step:
                return self._bound
        # without windows the cache is as large for more tokens at a time; stages may differ in that, and must not here
        if self.program.stage is None and all(state.sees is None for state in self.program.states):
            step = step_of(self.program, places(step), ANY_LENGTH)
        kept = self._bound
        # a stage without attention serves any
        if kept is not None and not all_stages(kept.serve_any_cache, self.program, self.communicator, self.device):
            kept = None
        self._drop_cache()
        size = CacheSize(max_batch=max_batch, max_length=max_length, prefill_step=step)
        room = Room.agreed(self.program, size, self.communicator, self.device)
        room.require(max_length)
        # lengths that kernels like, and that the next task may share
        max_length = -(-max_length // _ROUND_TO) * _ROUND_TO
        if room.tokens is not None:
            max_length = min(max_length, room.tokens)
        if kept is None:
            self._bound = self._steps_over(self.program, max_batch=max_batch, max_length=max_length, step=step)
        else:  # a longer text, or more of them, binds and compiles nothing
            slots = slots_for(self.program, max_length)
            kept.cache.resize(max_batch=max_batch, max_length=max_length, step=step, slots=slots)
            kept.look_for_room()
            self._bound = kept
        return self._bound

    def _drop_cache(self) -> None:
        """The old one is given back before a new one is made."""
        if self._bound is not None:
            self._bound.release()  # its memory now: what is bound to it may keep it for a while
        if self._batches is not None:
            self._batches.release()
        self._bound = self.room = self._batches = None

    def _steps_over(self, program: RankProgram, *, max_batch: int, max_length: int, step: int) -> Steps:
        """The programs over a new cache, for the states as `program` has them; a collective."""
        self._counts_tokens = WhatIsKept.agreed(self.program, self.communicator, self.device).counts_tokens
        slots = slots_for(self.program, max_length)
        cache = cache_for(
            program, max_batch=max_batch, max_length=max_length, step=step, device=self.device, slots=slots
        )
        return Steps(
            self._prefill_by,
            self._decode_by,
            cache,
            self.communicator,
            self.device,
            self._profiler,
            compile=self._compile,
            cuda_graph=self._cuda_graph,
        )

    def batching(self, size: CacheSize | None, *, rows: int | None = None, vocabulary: str | None = None) -> BatchLoop:
        """Many requests at once, over a cache of its own; this one's is given back."""
        self.release()
        return self._batch_loop(size, rows=rows, vocabulary=vocabulary)

    def _batch_loop(
        self, size: CacheSize | None, *, rows: int | None = None, vocabulary: str | None = None
    ) -> BatchLoop:
        return BatchLoop(
            self._prefill_by,
            self._decode_by,
            self.communicator,
            self.device,
            self._profiler,
            size=size,
            rows=rows,
            vocabulary=vocabulary,
            compile=self._compile,
            cuda_graph=self._cuda_graph,
        )

    def abandon(self) -> None:
        """Before `release` where a rank has failed: what is under way comes to no end."""
        self._staged = self._dealt_out = None

    def release(self) -> None:
        """Gives back the cache and the captured steps; a stream that is under way cannot go on."""
        self._leave()
        self._drop_cache()
        self._turn += 1
