"""A probe of generation by steps: a few tokens, one by one, against the program for whole texts.

    stepping   [2, 1] at a time, with its cache; the second row is another text, so that rows that meet show up
    traced     [1, N] of the first row at once, without any cache

What a trace of single tokens does with the tokens before is what its states carry from one to the next, and no analysis
of one step proves that they carry all of it. A model's own code for single tokens may also be another than its code for
whole texts (a limit that one of them applies): a difference beyond rounding is noted, one that is no variant of the
same model is refused. Both run unpartitioned, on the model's own weights; in float64 where these are few, which leaves
rounding out of it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from partitioner.compile.emit import Emitter
from partitioner.errors import InputError, PlanError
from partitioner.program.program import Program
from partitioner.proof.float64 import in_float64
from partitioner.sharding.mesh import Mesh
from runtime.communication.thread_communicator import ThreadGroup
from runtime.engine.check_inputs import complete_inputs
from runtime.execution.executable import Executable
from runtime.execution.profile import Profiler
from runtime.execution.prompts.piece import Piece
from runtime.generation.steps import Loaded, Steps
from runtime.kv_cache.cache import Cache
from runtime.kv_cache.cache_size import CacheSize, Room, slots_for
from runtime.program.rank_program import RankProgram
from runtime.weights.load_weights import load_weights

__all__ = ["compare_steps", "is_another_text"]

TOKENS = 6
"""More than the usual kernel of a convolution over tokens, which is 4."""
EXACT_BYTES = 2**28
"""Of weights: up to here both are compared in float64."""
_ROUNDING = {torch.float64: 1e-8, torch.float32: 1e-4}
"""Of so many layers in another order, relative to the largest logit; of what holds fewer digits, 2e-2."""
REFUSED = 0.1
"""A difference relative to the largest logit, from which on it is another text that is continued."""


def compare_steps(traced: Program, stepping: Program) -> str | None:
    """A note where single tokens and the whole text differ, or could not be compared; `stepping`: with its cache.

    Raises `PlanError` where they have little to do with each other.
    """
    found = _difference(traced, stepping)
    if isinstance(found, str):
        return f"whether tokens one by one say what the whole text says was not tried out: {found}"
    if found.is_rounding:
        return None
    if found.error < REFUSED:
        return (
            "fed tokens one by one, with what it remembers, the model's own code computes something else than for the "
            f"whole text: {found}. Texts are continued as by the former"
        )
    raise PlanError(
        f"{traced.name} cannot generate: fed tokens one by one, with what it remembers, it does not continue its own "
        f"text: {found}. What it remembers is not all that it needs, or its two ways are two models"
    )


def is_another_text(traced: Program, stepping: Program) -> bool:
    """Whether single tokens are known to differ from the whole text beyond rounding."""
    found = _difference(traced, stepping)
    return not isinstance(found, str) and not found.is_rounding


@dataclass(frozen=True)
class _Difference:
    """error: relative to the largest logit, over so many tokens, compared in `dtype`."""

    error: float
    tokens: int
    dtype: torch.dtype

    @property
    def is_rounding(self) -> bool:
        return self.error <= _ROUNDING.get(self.dtype, 2e-2)

    def __str__(self) -> str:
        short = str(self.dtype).removeprefix("torch.")
        return f"logits differ by up to {self.error:.1g} of the largest, over {self.tokens} tokens in {short}"


def _difference(traced: Program, stepping: Program) -> _Difference | str:
    """Of single tokens and the whole text; or why they cannot be compared."""
    if not all(_has_data(program) for program in (traced, stepping)):
        return "the model holds no data"
    if sum(value.nbytes for value in traced.weight_data.values()) <= EXACT_BYTES:
        traced, stepping = in_float64(traced), in_float64(stepping)
    whole, step = (Emitter(program).rank(Mesh.of().coordinates(0)) for program in (traced, stepping))
    tokens = _tokens(whole)
    try:
        at_once = _at_once(whole, tokens[:1])[:TOKENS]
    except InputError as reason:  # the program for whole texts takes more than the ids
        return str(reason)
    one_by_one = _one_by_one(step, tokens[:, :TOKENS])
    scale = at_once.abs().max().clamp_min(torch.finfo(at_once.dtype).tiny)
    error = ((one_by_one.to(at_once.dtype) - at_once).abs().max() / scale).item()
    return _Difference(error, len(at_once), at_once.dtype)


def _has_data(program: Program) -> bool:
    used = {str(node.target) for node in program.graph.nodes if node.op == "get_attr" and node.users}
    return all(name in program.weight_data and not program.weight_data[name].is_meta for name in used)


def _tokens(whole: RankProgram) -> Tensor:
    """[2, N], as many as the program for whole texts takes."""
    ids = next(given for given in whole.inputs if given.name == "input_ids")
    count = ids.shape[1]
    if not isinstance(count, int):
        low, high = whole.limits.get(count, (1, None))
        count = max(low, TOKENS if high is None else min(TOKENS, high))
    least, most = (0, 1) if ids.bound is None else (ids.bound.low, ids.bound.high)
    return torch.randint(least, most + 1, (2, count), generator=torch.Generator().manual_seed(0))


def _at_once(program: RankProgram, tokens: Tensor) -> Tensor:
    """[N, V]."""
    communicator = ThreadGroup(program.mesh).communicator(0)
    device = _device(program)
    execute = Executable(
        program, load_weights(program.weights, program.weight_data, None, device), communicator, device
    )
    logits: Tensor = execute(complete_inputs(program.inputs, {"input_ids": tokens}, device, program.limits))
    return logits[0]


def _one_by_one(program: RankProgram, tokens: Tensor) -> Tensor:
    """[N, V] of the first row."""
    communicator = ThreadGroup(program.mesh).communicator(0)
    device = _device(program)
    loaded = Loaded(program, load_weights(program.weights, program.weight_data, None, device))
    rows, count = tokens.shape
    size = CacheSize(max_batch=rows, max_length=count, prefill_step=1)
    Room.agreed(program, size, communicator, device).require(count)
    slots = slots_for(program, count)
    cache = Cache(program.states, max_batch=rows, max_length=count, step=1, device=device, slots=slots)
    steps = Steps(loaded, loaded, cache, communicator, device, Profiler(program, device))
    pieces = [
        Piece([[token] for token in tokens[:, position].tolist()], [position] * rows, (True,) * rows)
        for position in range(count)
    ]
    return torch.stack([steps.run(piece)[0] for piece in pieces])


def _device(program: RankProgram) -> torch.device:
    """Where the model's weights are."""
    return next((value.device for value in program.weight_data.values()), torch.device("cpu"))
