"""Whether a graph that takes some tokens at a time does what the model does with the whole text.

Tokens of one run meet in caches only (`analysis.tokens`), and caches are read by position, with however many slots
(`analysis.slots`). A graph for one token at a time has no other tokens to meet.
"""

from __future__ import annotations

from partitioner.analysis.tokens.slot_independence import why_slots_matter
from partitioner.analysis.tokens.token_mixing import why_tokens_mix
from partitioner.program.program import Program

__all__ = ["why_steps_differ"]


def why_steps_differ(program: Program) -> str | None:
    """The first op that keeps the graph from being right, and why; None: there is none."""
    mixed = why_tokens_mix(program) if "sequence" in program.symbols else None
    return mixed or why_slots_matter(program)
