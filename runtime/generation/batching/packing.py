"""Whether the tokens of several sequences may stand behind each other in one row of a run, none of them filled up.

    a row each    ids [B, S]    pieces of prompts and single tokens run in different steps, or short rows are filled up
    packed        ids [1, N]    pieces of any lengths and single tokens run in one step

It is so where nothing but attention over a cache looks from one token at another, for that takes each sequence by
itself (`PagedCache`). All stages must agree, since all follow the same scheduler.
"""

from __future__ import annotations

import torch

from runtime.communication.communicator import Communicator, gather_all
from runtime.execution.executable import OVER_CACHE, has_mask
from runtime.ops.rows.share_rows import own_last_token
from runtime.program.rank_program import RankProgram

__all__ = ["TOKENS_SHARED_OUT", "why_not_packed"]

_KNOWN_INPUTS = {"input_ids", "position_ids", "last"}
_ROWS_OF_THEIR_OWN = "ranks that share out experts have sequences of their own, and their steps go together"
TOKENS_SHARED_OUT = "ranks share out the tokens of a sequence, which lies in a row of its own"
_REASONS = (
    "",
    "the model keeps a state per sequence, which a run of one row has one of",
    "the program for prompts is told of more than tokens and their positions, and may look from one token at another",
    "a mask of attention is a tensor, which says of one sequence only what it may see",
    "the program for prompts runs a limited number of tokens at a time",
    "each rank picks the last token of its own rows",
    "a stage hands on last tokens only, as many as there are rows",
)


def why_not_packed(program: RankProgram, communicator: Communicator, device: torch.device) -> str:
    """Of the program for prompts, "" where it may be; a collective where there are stages."""
    if program.batch_axes:
        return _ROWS_OF_THEIR_OWN
    code = _code(program)
    if program.stage is not None:
        code = int(gather_all(communicator, torch.tensor([code], device=device)).max())
    return _REASONS[code]


def _code(program: RankProgram) -> int:
    if any(not state.per_token for state in program.states):
        return 1
    held = {str(node.kwargs["state"]) for node in program.graph.nodes if node.target in OVER_CACHE}
    if any(given.name not in _KNOWN_INPUTS for given in program.inputs) or not all(
        state.name.rpartition(".")[0] in held for state in program.states
    ):
        return 2
    if any(has_mask(node) for node in program.graph.nodes):
        return 3
    if program.limits.get("sequence", (1, None)) != (1, None) or program.limits.get("batch", (1, None))[0] > 1:
        return 4
    if any(node.target is own_last_token for node in program.graph.nodes):
        return 5
    if program.stage is not None and any("sequence" not in each.shape for each in program.stage.receives):
        return 6
    return 0
