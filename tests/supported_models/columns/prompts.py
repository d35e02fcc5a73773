"""Whether prompts of a model with a state per sequence run many tokens at a time, and say what the model says.

    prompts   1, 5, 11 and 23 tokens in one batch, at tp = 2 and 3
    pieces    the prompt at once, and 7 tokens at a time

Each continues by 6 tokens, which must be those of the model's own forward without a cache, and so must their
log-probabilities, in float64. Where prompts run token by token, the verdict says so, and `why` is what the compiler
tells the user; what such a model says is told by the column of generation.
"""

from __future__ import annotations

from typing import Any

from tests.support import stepping

__all__ = ["compare_prompts"]

RANKS = (2, 3)
PREFILL_STEPS = (None, 7)
EXACT = 1e-9
_NOTE = "prompts run token by token: "


def compare_prompts(name: str) -> dict[str, Any]:
    """verdict: "in pieces", "token by token", "wrong", or "" for a model that has no state per sequence."""
    step = stepping.traced(name)[1]
    if all(state.per_token for state in step.states.values()):
        return {"verdict": ""}
    row: dict[str, Any] = {"verdict": "in pieces", "errors": {}}
    for tp in RANKS:
        parts = stepping.compiled_in_pieces(name, tp)
        notes = parts.generation_report.notes
        if why := next((note.removeprefix(_NOTE) for note in notes if note.startswith(_NOTE)), None):
            return {**row, "verdict": "token by token", "why": f"tp={tp}: {why}"}
        for prefill_step in PREFILL_STEPS:
            try:
                error = stepping.error(name, parts, prefill_step=prefill_step)
            except AssertionError:
                return {**row, "verdict": "wrong", "why": f"tp={tp}, {prefill_step} at a time: other tokens"}
            row["errors"][f"tp={tp}"] = max(error, row["errors"].get(f"tp={tp}", 0.0))
            if error > EXACT:
                return {**row, "verdict": "wrong", "why": f"tp={tp}, {prefill_step} at a time: off by {error:.0e}"}
    return row
