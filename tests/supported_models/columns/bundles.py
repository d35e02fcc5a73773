"""Whether a model does the same from a bundle as it did before it was saved, bit by bit."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import partitioner
from partitioner import CaptureError, PartitionerError, Parts, Plan, partition
from partitioner.errors import InputError, PlanError
from tests.supported_models.generation import prompts_for

__all__ = ["compare_bundle"]

PLAN, NEW = Plan.parse("tp=2"), 8


class _Differs(Exception):
    pass


def compare_bundle(model: Any, lengths: Callable[[Any], list[int]]) -> dict[str, Any]:
    """The verdict on a model: "equal", "refused" (by `partition` or `save`, and why) or "wrong".

    `lengths(program)`: of the texts to try. generates: true, or why not, which both must say alike.
    """
    try:
        try:
            parts = partition(model, PLAN)
        except CaptureError:  # not for all lengths at once
            parts = partition(model, PLAN, fixed_length=8)
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary) / "bundle"
            parts.save(folder)
            row: dict[str, Any] = {"bytes": sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())}
            return {"verdict": "equal", **row, **_compare(parts, folder, model, lengths(parts.traced))}
    except _Differs as error:
        return {"verdict": "wrong", "why": str(error)}
    except PartitionerError as error:
        return {"verdict": "refused", "why": f"{type(error).__name__}: {error}".split("\n")[0][:300]}


def _compare(parts: Parts[Any], folder: Path, model: Any, lengths: list[int]) -> dict[str, Any]:
    """A refusal after saving is a difference: what was written must be read."""
    try:
        bundle = partitioner.load(folder)
        bundle.verify()
        for rank in range(PLAN.mesh.world_size):
            if str(parts.rank(rank).graph) != str(bundle.rank(rank).graph):
                raise _Differs(f"rank {rank} has another graph")
            if parts.rank(rank).graph_module.code != bundle.rank(rank).graph_module.code:
                raise _Differs(f"rank {rank} has other code")
    except PartitionerError as error:
        raise _Differs(f"cannot be read: {error}") from error
    vocabulary = model.get_input_embeddings().weight.shape[0]
    for length in lengths:
        ids = torch.randint(3, vocabulary, (2, length), generator=torch.Generator().manual_seed(0))
        one, other = (_outcome(lambda r, ids=ids: r.simulate(input_ids=ids), ranks) for ranks in (parts, bundle))
        _require_same(one, other, f"logits of {length} tokens")
    prompts = prompts_for(model)[:2]
    one, other = (_outcome(lambda r: r.generate(prompts, max_new_tokens=NEW), ranks) for ranks in (parts, bundle))
    _require_same(one, other, "a continuation")
    return {"lengths": lengths, "generates": isinstance(one, Tensor) or str(one)[:200]}


def _outcome(run: Callable[[Any], Any], ranks: Any) -> Tensor | str:
    """What comes of it, or how it is refused."""
    try:
        found: Tensor = run(ranks)
        return found
    except (PlanError, InputError) as error:
        return str(error)


def _require_same(one: Tensor | str, other: Tensor | str, what: str) -> None:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        same = one.dtype == other.dtype and torch.equal(one.nan_to_num(), other.nan_to_num())
    else:
        same = type(one) is type(other) and one == other
    if not same:
        said = f": {one!r} and {other!r}"[:300] if isinstance(one, str) or isinstance(other, str) else ""
        raise _Differs(f"{what} differ{said}")
