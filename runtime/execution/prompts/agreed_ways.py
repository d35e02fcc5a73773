"""In which ways all ranks may run pieces of prompts: parts may be uneven, and whatever one does the others do."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import torch

from runtime.communication.communicator import Communicator, gather_all
from runtime.execution.prompts.captured_pieces import asks_host
from runtime.execution.prompts.in_turns import can_take_turns, turns_from
from runtime.kv_cache.cache import Cache
from runtime.kv_cache.paged_cache import PagedCache
from runtime.program.rank_program import RankProgram

__all__ = ["AgreedWays", "row_dims"]


@dataclass(frozen=True)
class AgreedWays:
    """turns_from: from how many tokens on a piece is run as two halves in turn, where takes_turns.

    is_steady: whether runs of pieces that differ in their tokens only are the same, so that one can be captured.
    packs_steadily: the same of pieces that are packed beside single tokens, whose attention a kernel then does.
    """

    turns_from: int
    takes_turns: bool
    is_steady: bool
    packs_steadily: bool

    @classmethod
    def of(
        cls,
        program: RankProgram,
        cache: Cache,
        communicator: Communicator,
        device: torch.device,
        *,
        shares_head: bool,
        may_halve: bool,
        may_capture: bool,
    ) -> Self:
        """A collective where pieces may be captured. shares_head: whether all stages do. may_: by the device."""
        is_stage, own = program.stage is not None, not program.batch_axes
        alone = own and not is_stage and not shares_head and cache.takes_turns
        halved = program.limits.get("batch", (1, None))[0] == 1  # half of two rows is one
        takes_turns = may_halve and alone and halved and can_take_turns(program)
        same = all(state.per_token for state in program.states)
        same = same and communicator.can_be_captured and not asks_host(program, device)
        is_steady = same and alone and any(wanted.name == "input_ids" for wanted in program.inputs)
        # over stages, only of packed pieces do all know how large they are
        packs = isinstance(cache, PagedCache) and cache.any_length and row_dims(program) is not None
        packs = packs and (same and own if is_stage else is_steady)
        turns = turns_from(program)
        if not may_capture:
            return cls(turns, takes_turns, is_steady, packs_steadily=False)
        mine = torch.tensor([[turns, not takes_turns, not is_steady, not packs]], device=device)
        turns, *others = gather_all(communicator, mine).amax(0).tolist()
        return cls(turns, *(not each for each in others))


def row_dims(program: RankProgram) -> Sequence[int | None] | None:
    """Which dim of each value that a run of packed pieces yields has its rows, None where it has all tokens; None for
    all of them: a head that all stages share out asks for all tokens.
    """
    stage, shared = program.stage, program.shared_head
    if stage is None:
        return (0,)
    if stage.index + 1 < stage.count:
        return [None] * len(stage.sends)
    if shared is None:
        return (0,)
    shapes = [crossing.shape for crossing in shared.receives]
    if any("sequence" in shape or "batch" not in shape for shape in shapes):
        return None
    return [shape.index("batch") for shape in shapes]
