"""`partitioner export`: a checkpoint, or a bundle, becomes a bundle."""

from __future__ import annotations

import contextlib
import time
from pathlib import Path

from partitioner.cli.common.options import Compile
from partitioner.storage.bundle.bundle import load
from partitioner.storage.bundle.format.bundle_files import require_free
from partitioner.storage.bundle.save import has_tokenizer
from partitioner.storage.recognise import is_bundle
from runtime.kv_cache.device_memory import readable

__all__ = ["export"]


def export(model: str, how: Compile, out: str, *, dtype: str | None, reference: bool = False) -> str:
    """Writes the bundle, and says what was written.

    `model`: a checkpoint folder or a bundle, of which a file at most is held at a time; or what `load_model` takes.
    """
    require_free(Path(out))  # here once, rather than after the model has been compiled
    started = time.perf_counter()
    tokenizer: Path | None = None
    with contextlib.ExitStack() as stack:
        if Path(model).is_dir():
            tokenizer = stack.enter_context(load(model).model_folder()) if is_bundle(model) else Path(model)
            tokenizer = tokenizer if has_tokenizer(tokenizer) else None
        how.compile(model, dtype=dtype).save(out, tokenizer=tokenizer, reference=reference)
    bundle = load(out)
    per_rank = [sum(each.shard.bytes for each in bundle.stored(rank)) for rank in range(bundle.mesh.world_size)]
    without = "" if tokenizer is not None else " (without a tokenizer)"
    written = readable(sum(file.bytes for file in bundle.manifest.files.values()))
    between = f"{readable(min(per_rank))} to {readable(max(per_rank))}"
    return (
        f"{out}{without}: {len(per_rank)} ranks, {between} of weights each; {written} written in "
        f"{time.perf_counter() - started:.1f} s"
    )
