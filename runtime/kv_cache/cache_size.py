"""How large a cache is set aside: for so many sequences of so many tokens, or as many tokens as memory has room for.

    CacheSize(max_batch=8, max_length=4096)          exactly that; refused where it does not fit
    CacheSize(max_batch=8, memory="0.9 of free")     as many tokens per sequence as fit
    CacheSize(.., dtype="fp8")                       keys and values as float8, with a scale per token and head

    held_as(program, size, ..)    the program with its states as the size says that they are held
    bytes_needed(program, ..)     what a cache of these sizes takes on a rank
    tokens_that_fit(program, ..)  the inverse: the longest sequences that so many bytes have room for
    Room.agreed(..)               the same numbers on all ranks: the least of what each has room for

Ranks whose memory is the same (threads, processes of one host, one GPU) get an even share of what is free in it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from partitioner.errors import InputError
from partitioner.sharding.mesh import AXES
from runtime.communication.communicator import Communicator, gather_all
from runtime.kv_cache.device_memory import FLOAT8, Amount, free_bytes, readable, require_dtype
from runtime.kv_cache.sharded_slots import cache_bytes
from runtime.ops.cached_attention import cached_attention
from runtime.ops.rows.sequence_attention import cached_sequence_attention
from runtime.ops.state.latent_attention import latent_attention
from runtime.ops.state.latent_sequence_attention import latent_sequence_attention
from runtime.processes.place import kernel_id
from runtime.program.rank_program import RankProgram

__all__ = [
    "ANY_LENGTH",
    "LEAST_STEP",
    "CacheSize",
    "Room",
    "WhatIsKept",
    "bytes_needed",
    "can_spare",
    "default_step",
    "held_as",
    "in_float8",
    "longest_text",
    "slots_for",
    "step_of",
    "tokens_that_fit",
    "why_not_float8",
]

LEAST_STEP = 512
"""Tokens of a prompt at a time: enough for a processor."""
_ALL = 1 << 40
"""Positions, where a token looks back to the first."""
_MOST_ROWS = 16384
"""Tokens at a time on a GPU, of all rows together."""
_LIVE = 8
"""How many values as wide as the widest layer are alive at once, about."""
_SPARED = 4
"""How much more than what a run takes is to be left, for others like it to be captured."""
ANY_LENGTH = 2**31 - 1
"""Stands for "as long as you like": what the model remembers does not grow, and it counts no positions in a table."""


@dataclass(frozen=True, kw_only=True)
class CacheSize:
    """The size of a cache.

    - max_batch: sequences at a time. max_length: tokens of each, prompt included; None: as many as `memory` has room
      for.
    - memory: bytes, a size such as "4 GB", or a share such as "0.9 of free" (`runtime.kv_cache.device_memory`).
    - prefill_step: how many tokens of a prompt run at a time. None: by device and memory, see `default_step`.
    - dtype: None for the model's, or "fp8": keys and values, or the latent that they are computed from, as
      float8_e4m3fn with a scale for each token and head (`runtime.ops.kernels.float8_rows`).
    """

    max_batch: int = 1
    max_length: int | None = None
    memory: int | str | None = None
    prefill_step: int | None = None
    dtype: str | None = None

    def __post_init__(self) -> None:
        for name in ("max_batch", "max_length", "prefill_step"):
            given = vars(self)[name]
            if name != "max_batch" and given is None:
                continue
            if not isinstance(given, int) or isinstance(given, bool) or not 1 <= given < 2**31:
                raise InputError(f"{name} must be a whole number, at least 1; got {given!r}")
        require_dtype(self.dtype)
        if self.memory is not None:
            Amount.of(self.memory)
        elif self.max_length is None:
            raise InputError('a cache needs a size: give max_length, or memory such as "0.9 of free"')


_ATTENDING = (cached_attention, cached_sequence_attention, latent_attention, latent_sequence_attention)


def why_not_float8(program: RankProgram) -> str | None:
    """The first state that is none of an attention's keys and values, with what it is; None: all may be float8."""
    attended: set[str] = set()
    for node in program.graph.nodes:
        if node.op == "call_function" and node.target in _ATTENDING:
            attended |= {f"{node.kwargs['state']}.{part}" for part in ("key", "value", "latent")}
    for state in program.states:
        if state.name not in attended:
            what = "is written by the model's own code" if state.per_token else "is a state per sequence"
            return f"{state.name!r} {what}, and not keys or values of an attention over a cache"
    return None


def in_float8(program: RankProgram) -> RankProgram:
    """The same with all states as float8. Raises `InputError` where one is not for that."""
    reason = why_not_float8(program)
    if reason is not None:
        raise InputError(f"a cache of dtype={FLOAT8!r} is for keys and values: {reason}; leave dtype out")
    return replace(program, states=tuple(replace(state, float8=True) for state in program.states))


def held_as(program: RankProgram, dtype: str | None, communicator: Communicator, device: torch.device) -> RankProgram:
    """The program with its states as a cache of that dtype holds them; a collective where there are stages.

    Raises `InputError` on all ranks alike.
    """
    if dtype is None:
        return program
    if program.stage is not None:
        refused = torch.tensor([why_not_float8(program) is not None], dtype=torch.int64, device=device)
        if int(gather_all(communicator, refused).sum()) and not int(refused):
            raise InputError(
                f"a cache of dtype={FLOAT8!r} is for keys and values, and another stage has other states; leave dtype "
                "out"
            )
    return in_float8(program)


@dataclass(frozen=True)
class Room:
    """What there is room for on every rank: `tokens` per sequence of `max_batch`, in `bytes` on the fullest rank.

    tokens: None where any number fits, because what the model remembers of a text does not grow with it, or where
    nobody knows (`bytes` None too). limit: the longest text that the model itself takes, None: any.
    """

    max_batch: int
    tokens: int | None
    bytes: int | None
    limit: int | None

    def __str__(self) -> str:
        if self.bytes is None:
            return "how much memory is free is not known here"
        if self.tokens is None:
            fit = "a text of any length fits"
        else:
            each = f" in each of {self.max_batch} sequences" if self.max_batch > 1 else ""
            most = ", as many as the model takes," if self.tokens == self.limit else ""
            fit = f"{self.tokens} tokens{each}{most} fit"
        return f"{fit} in {readable(self.bytes)}"

    @classmethod
    def agreed(cls, program: RankProgram, size: CacheSize, communicator: Communicator, device: torch.device) -> Room:
        """A collective. Before it, every rank has loaded what it loads; after it, each may set memory aside."""
        step = size.prefill_step or LEAST_STEP
        return cls.of(
            program,
            size,
            communicator,
            device,
            lambda room: tokens_that_fit(program, room, max_batch=size.max_batch, prefill_step=step),
        )

    @classmethod
    def of(
        cls,
        program: RankProgram,
        size: CacheSize,
        communicator: Communicator,
        device: torch.device,
        fit: Callable[[int], int | None],
    ) -> Room:
        """The same, with what `fit` says of how many tokens so many bytes have room for; None: any number."""
        place = _number_of(device)
        places = gather_all(communicator, torch.tensor([place], device=device))
        # nobody takes anything between the two meetings
        free = free_bytes(device)
        sharing = int((places == place).sum()) * (communicator.replicas_here if device.type == "cpu" else 1)
        amount = Amount.of("1 of free" if size.memory is None else size.memory)
        mine = amount.within(None if free is None else free // sharing)
        fits = -1 if mine is None else fit(mine)
        given = torch.tensor([ANY_LENGTH if fits is None else fits, -1 if mine is None else mine], device=device)
        everyone = gather_all(communicator, given).view(-1, 2).tolist()
        if any(bytes_ < 0 for _, bytes_ in everyone):
            if size.memory is not None:
                raise InputError(
                    f"memory={size.memory!r}: this system does not say how much of {str(device)!r} is free; "
                    'give a number of bytes, such as memory="4 GB"'
                )
            return cls(size.max_batch, None, None, longest_text(program))
        least, room = min(tokens for tokens, _ in everyone), min(bytes_ for _, bytes_ in everyone)
        return cls(size.max_batch, None if least == ANY_LENGTH else least, room, longest_text(program))

    def require(self, max_length: int) -> None:
        """Raises InputError where sequences of `max_length` tokens do not fit."""
        if self.limit is not None and max_length > self.limit:
            raise InputError(
                f"texts of {max_length} tokens were asked for, prompt and new ones; this model takes up to "
                f"{self.limit}. Where its rotary embeddings are the reason, compile it for more: "
                "partition(..., max_length=), or --max-length on the command line"
            )
        if self.tokens is None or max_length <= self.tokens:
            return
        sequences = "one sequence" if self.max_batch == 1 else f"{self.max_batch} sequences"
        raise InputError(
            f"a cache for {sequences} of {max_length} tokens, prompt and new ones, does not fit: {self}. "
            "Give shorter or fewer prompts, fewer new tokens or a smaller prefill_step, partition over more ranks, or "
            "make more memory free"
        )


@dataclass(frozen=True)
class WhatIsKept:
    """Of all pipeline stages: how sequences are cut must not follow from the states of a rank's own stage.

    counts_tokens: whether some state of a sequence changes with each token, so that no row may repeat one.
    token_axes: those whose ranks share out the tokens of states.
    gives_up: whether some state keeps the last tokens only.
    sees: how many positions back a token looks in any layer, its own among them; None: to the first.
    """

    counts_tokens: bool
    token_axes: tuple[str, ...]
    gives_up: bool
    sees: int | None

    @classmethod
    def agreed(cls, program: RankProgram, communicator: Communicator, device: torch.device) -> WhatIsKept:
        """A collective where there are stages."""
        axes = {axis for state in program.states for axis in state.token_axes}
        sees = max((_ALL if s.sees is None else s.sees for s in program.states if s.per_token), default=0)
        found = [sees, any(state.sees is not None for state in program.states)]
        found += [any(not state.per_token for state in program.states), *(axis in axes for axis in AXES)]
        if program.stage is not None:
            mine = torch.tensor(found, dtype=torch.int64, device=device)
            found = gather_all(communicator, mine).view(-1, len(found)).amax(0).tolist()
        sees, gives_up, counts_tokens, *of_axes = found
        return cls(
            counts_tokens=bool(counts_tokens),
            token_axes=tuple(axis for axis, is_one in zip(AXES, of_axes, strict=True) if is_one),
            gives_up=bool(gives_up),
            sees=sees if 0 < sees < _ALL else None,
        )


def slots_for(program: RankProgram, max_length: int) -> int:
    """How many slots there must be at least where all positions are kept, for texts of `max_length` tokens."""
    if all(wanted.name != "slots" for wanted in program.inputs):
        return max_length
    # a graph that is told its slots looks at one more than there are tokens
    return max(max_length + 1, program.limits.get("slots", (1, None))[0])


def default_step(program: RankProgram, communicator: Communicator, device: torch.device, *, max_batch: int) -> int:
    """How many tokens of each prompt to run at a time; a collective on GPUs, where it is the least of all ranks.

    A GPU wants thousands of rows in a product, and launches as many kernels for few. What runs takes memory while it
    does, several values as wide as the widest layer for each row: an eighth of the device may go there, or a quarter of
    what is free. Where ranks share out the tokens of a piece, each has rows of its own, and the piece so many more.
    """
    if device.type != "cuda":
        return LEAST_STEP
    whole, free = torch.cuda.get_device_properties(device).total_memory, free_bytes(device) or 0
    fits = min(whole // 8, free // 4) // _bytes_of_row(program)
    axes = {axis for state in program.states for axis in state.token_axes}
    parts = program.mesh.size(*sorted(axes)) if axes else 1
    mine = torch.tensor([min(_MOST_ROWS, fits) * parts // max_batch], device=device)
    least = int(gather_all(communicator, mine).min())
    return max(LEAST_STEP, 1 << max(0, least.bit_length() - 1))


def _bytes_of_row(program: RankProgram) -> int:
    """What a run takes for each row of its products, about."""
    rows = [weight.local_shape[0] * weight.dtype.itemsize for weight in program.weights if len(weight.local_shape) == 2]
    # the two largest may be those of the vocabulary, which runs for one row of a prompt
    return _LIVE * (max(1, sorted(rows)[-3:][0]) if rows else 1)


def can_spare(program: RankProgram, communicator: Communicator, device: torch.device, *, rows: int) -> bool:
    """Whether every rank has several times the memory left that a run of so many rows takes; a collective on GPUs."""
    if device.type != "cuda":
        return True
    mine = torch.tensor([_SPARED * rows * _bytes_of_row(program) <= (free_bytes(device) or 0)], device=device)
    return bool(gather_all(communicator, mine.int()).all())


def step_of(program: RankProgram, prefill_step: int, max_length: int) -> int:
    """How many tokens of a text are run at a time; one for each rank at least, where they share out its tokens."""
    most = program.limits.get("sequence", (1, None))[1]
    # the first ranks would keep all tokens of shorter pieces, and have no room for them
    step = max(prefill_step, program.mesh.size("sp"))
    return min(step, max_length, step if most is None else most)


def bytes_needed(program: RankProgram, *, max_batch: int, max_length: int, prefill_step: int) -> int:
    """What a cache of these sizes takes on this rank."""
    step = step_of(program, prefill_step, max_length)
    axes = {axis for state in program.states for axis in state.token_axes}
    return cache_bytes(
        program.states,
        max_batch=max_batch,
        max_length=slots_for(program, max_length),
        step=step,
        parts=program.mesh.size(*sorted(axes)) if axes else 1,
    )


def longest_text(program: RankProgram) -> int | None:
    """The longest text that the program itself is right for; None: any."""
    known = [program.limits.get("positions", (1, None))[1]]
    if (slots := program.limits.get("slots", (1, None))[1]) is not None:
        known.append(slots - 1)
    known += [i.bound.high + 1 for i in program.inputs if i.name == "position_ids" and i.bound is not None]
    return min((most for most in known if most is not None), default=None)


def tokens_that_fit(program: RankProgram, room: int, *, max_batch: int, prefill_step: int = 512) -> int | None:
    """The most tokens per sequence whose cache takes no more than `room` bytes on this rank, 0: not even one.

    None: any number. No more than the model takes.
    """

    def fits(length: int) -> bool:
        return bytes_needed(program, max_batch=max_batch, max_length=length, prefill_step=prefill_step) <= room

    limit = longest_text(program)
    most = ANY_LENGTH if limit is None else limit
    if fits(most):
        return limit
    low, high = 0, most  # what fits, what does not
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def _number_of(device: torch.device) -> int:
    """The same for ranks that take from the same memory: of one machine, and of one device there."""
    # the same device has other numbers in processes that see other devices
    unique = str(torch.cuda.get_device_properties(device).uuid) if device.type == "cuda" else device.type
    digest = hashlib.blake2b(f"{kernel_id()} {unique}".encode(), digest_size=7).digest()
    return int.from_bytes(digest, "big")
