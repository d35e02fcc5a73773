"""What `partitioner serve` does: a model over HTTP, for OpenAI's clients. Needs the extra `partitioner[serve]`."""

from __future__ import annotations

import contextlib
import sys
import time
from typing import Any

from transformers.utils import logging as transformers_logging

from partitioner.cli.jobs.serve import Serving
from partitioner.errors import InputError
from partitioner.serving.launch import launch
from partitioner.storage.dtypes import dtype_asked
from runtime.kv_cache.cache_size import CacheSize
from runtime.processes.choose_device import choose_device

__all__ = ["serve"]

_LOOPBACK = ("127.0.0.1", "::1", "localhost")
_ROWS = 32
_MEMORY = "0.5 of free"


def serve(serving: Serving) -> None:
    """Until a signal ends it."""
    try:
        from partitioner.serving.http.keys import Keys
        from partitioner.serving.http.limits import Limits
        from partitioner.serving.http.server import bound, serve_on
        from partitioner.serving.open_service import open_service, read_tokenizer, read_vocabulary
    except ModuleNotFoundError as error:
        raise InputError(f"a server needs {error.name}: pip install 'partitioner[serve]'") from error
    limits: dict[str, Any] = {
        "max_requests": serving.max_requests,
        "max_body_bytes": serving.max_body,
        "request_s": serving.request_timeout_s,
    }
    Limits(max_length=serving.max_context or 2, **limits)  # here once, rather than when all ranks have loaded
    model, plan = serving.model, serving.compile.plan_of(serving.model)
    placed = choose_device(serving.device, num_ranks=plan.mesh.world_size)
    keys = Keys.found(serving.api_key_file)
    transformers_logging.disable_progress_bar()
    tokenizer, notes = read_tokenizer(model, serving.chat_template)
    for note in notes:
        _say(f"note: {note}")
    vocabulary, why_not = read_vocabulary(tokenizer)
    # before anything is started: whoever has the port is told of at once
    listening = bound(serving.host, serving.port)
    address = listening.getsockname()[1]
    if serving.host not in _LOOPBACK and not keys:
        _say(f"note: {serving.host} can be reached from elsewhere, and everybody may ask: give --api-key-file")
    started = time.perf_counter()
    with (
        listening,
        launch(
            model,
            plan,
            device=placed.type,
            dtype=dtype_asked(serving.dtype),
            max_length=serving.compile.max_length,
            checkpoint=serving.checkpoint,
            mapped=serving.mapped,
            checked=serving.checked,
            compile=serving.compile_steps,
            compiled_cache=serving.cached,
            cache=_cache(serving.cache_memory, serving.max_batch, serving.cache_dtype),
            max_batch=serving.max_batch,
            vocabulary=vocabulary,
            restart=serving.restart,
            timeout_s=serving.rank_timeout_s,
            start_timeout_s=serving.start_timeout_s,
        ) as llm,
    ):
        service = open_service(
            llm,
            model,
            tokenizer,
            vocabulary=vocabulary,
            why_not=why_not,
            limits=limits,
            max_context=serving.max_context,
            name=serving.name,
            keys=keys,
        )
        if serving.compile_steps and (why := llm.status().replicas[0].why_eager):
            _say(f"note: decode steps run node by node, in spite of {why}")
        ready = f"{service.name!r} is served at http://{serving.host}:{address}/v1 by {llm.replicas} x {llm.mesh}"
        longest = service.limits.max_length

        def say_ready() -> None:
            _say(f"{ready}, ready in {time.perf_counter() - started:.1f} s; texts of up to {longest} tokens")

        with contextlib.closing(service):
            serve_on(service, listening, grace_s=serving.grace_s, ready=say_ready)
    _say("ended")


def _cache(memory: str | None, rows: int | None, dtype: str | None) -> CacheSize | None:
    """None: half of the memory that is free."""
    if memory is None and dtype is None:
        return None
    return CacheSize(max_batch=rows or _ROWS, memory=memory or _MEMORY, dtype=dtype)


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
