"""`partitioner export`: a checkpoint, or a bundle, becomes a bundle."""

from __future__ import annotations

import contextlib
import time
from pathlib import Path

from partitioner.compile.partition import partition
from partitioner.program.plan import Plan
from partitioner.storage.bundle.bundle import load
from partitioner.storage.bundle.save import has_tokenizer
from partitioner.storage.named_model import dtype_named, load_model
from partitioner.storage.recognise import is_bundle
from runtime.kv_cache.device_memory import readable

__all__ = ["export"]


def export(
    model: str, plan: Plan, out: str, *, dtype: str | None, max_length: int | None = None, reference: bool = False
) -> str:
    """Writes the bundle, and says what was written.

    `model`: a checkpoint folder or a bundle, of which a file at most is held at a time; or what `load_model` takes.
    """
    started = time.perf_counter()
    kind = None if dtype is None else dtype_named(dtype)
    tokenizer: Path | None = None
    with contextlib.ExitStack() as stack:
        if Path(model).is_dir():
            tokenizer = stack.enter_context(load(model).model_folder()) if is_bundle(model) else Path(model)
            tokenizer = tokenizer if has_tokenizer(tokenizer) else None
            parts = partition(model, plan, dtype=kind, max_length=max_length)
        else:
            parts = partition(load_model(model, dtype=kind or dtype_named("float32")), plan, max_length=max_length)
        parts.save(out, tokenizer=tokenizer, reference=reference)
    bundle = load(out)
    per_rank = [sum(each.shard.bytes for each in bundle.stored(rank)) for rank in range(bundle.mesh.world_size)]
    without = "" if tokenizer is not None else " (without a tokenizer)"
    written = readable(sum(file.bytes for file in bundle.manifest.files.values()))
    between = f"{readable(min(per_rank))} to {readable(max(per_rank))}"
    return (
        f"{out}{without}: {len(per_rank)} ranks, {between} of weights each; {written} written in "
        f"{time.perf_counter() - started:.1f} s"
    )
