"""`partitioner serve`: a model over HTTP, for OpenAI's clients. Needs the extra `partitioner[serve]`."""

from __future__ import annotations

import contextlib
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from transformers.utils import logging as transformers_logging

from partitioner.cli.common.command import command
from partitioner.cli.common.options import (
    CacheDtype,
    Checkpoint,
    Compile,
    CompileSteps,
    Device,
    Dtype,
    ModelWithTokenizer,
    NoCache,
    Revision,
)
from partitioner.errors import InputError
from partitioner.serving.launch import launch
from partitioner.storage.example import EXAMPLE_MODEL
from partitioner.storage.hub import fetched
from partitioner.storage.named_model import dtype_named, hub_hint
from partitioner.storage.recognise import is_bundle
from runtime.kv_cache.cache_size import CacheSize
from runtime.processes.choose_device import choose_device

__all__ = ["register"]

_LOOPBACK = ("127.0.0.1", "::1", "localhost")
_ROWS = 32
_MEMORY = "0.5 of free"


def register(app: typer.Typer) -> None:
    """Adds the command."""
    command(app, "serve")(serve_command)


def serve_command(
    how: Compile,
    model: ModelWithTokenizer = str(EXAMPLE_MODEL),
    host: Annotated[str, typer.Option(help="the address to listen on")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="the port; 0 takes a free one")] = 8000,
    name: Annotated[
        str | None,
        typer.Option("--name", "--served-model-name", help="name of the model for clients; by default its folder's"),
    ] = None,
    chat_template: Annotated[
        str | None, typer.Option(help="file with the template of chats, in place of the tokenizer's")
    ] = None,
    api_key_file: Annotated[
        str | None, typer.Option(help="file of keys, one per line, mode 0600; or give one key in PARTITIONER_API_KEY")
    ] = None,
    max_requests: Annotated[
        int, typer.Option(help="rows that may run or wait at a time; more are refused with 429")
    ] = 256,
    max_context: Annotated[
        int | None,
        typer.Option(
            "--max-context",
            "--max-model-len",
            "--context-length",
            help="tokens of a prompt with its answer, at most; by default the model's limit",
        ),
    ] = None,
    max_body: Annotated[int, typer.Option(help="bytes of a request, at most")] = 4 << 20,
    request_timeout: Annotated[float, typer.Option(help="seconds that a request may take")] = 600.0,
    grace: Annotated[float, typer.Option(help="seconds that running requests have after SIGTERM")] = 30.0,
    restart: Annotated[
        bool, typer.Option("--restart", help="start a lost replica again, while the others serve")
    ] = False,
    max_batch: Annotated[
        int | None,
        typer.Option(
            "--max-batch",
            "--max-num-seqs",
            "--max-running-requests",
            help="rows that a replica runs at a time; by default 32",
        ),
    ] = None,
    cache_memory: Annotated[
        str | None, typer.Option(help='limit for the cache of a rank: "4 GB", or "0.9 of free"')
    ] = None,
    cache_dtype: CacheDtype = None,
    rank_timeout: Annotated[float, typer.Option(help="seconds after which a silent rank counts as lost")] = 60.0,
    start_timeout: Annotated[float, typer.Option(help="seconds in which all ranks must have loaded")] = 600.0,
    dtype: Dtype = None,
    device: Device = "auto",
    compile_steps: CompileSteps = False,
    revision: Revision = None,
    checkpoint: Checkpoint = None,
    mapped: Annotated[
        bool, typer.Option("--mapped", help="memory-map the weights; the files must not change meanwhile")
    ] = False,
    unchecked: Annotated[
        bool, typer.Option("--unchecked", help="do not compare a bundle's weights with their digests")
    ] = False,
    no_cache: NoCache = False,
) -> None:
    """Serve a model over HTTP to OpenAI's clients, over one process per rank of this machine; ends on SIGTERM."""
    try:
        from partitioner.serving.http.keys import Keys
        from partitioner.serving.http.limits import Limits
        from partitioner.serving.http.server import bound, serve_on
        from partitioner.serving.open_service import open_service, read_tokenizer, read_vocabulary
    except ModuleNotFoundError as error:
        raise InputError(f"a server needs {error.name}: pip install 'partitioner[serve]'") from error
    if max_context is not None and max_context < 2:
        raise InputError(
            f"--max-context must be at least 2, a token of a prompt and one of its answer; got {max_context}"
        )
    if not grace >= 0:
        raise InputError(f"--grace must be a number of seconds, 0 for none; got {grace:g}")
    limits: dict[str, Any] = {"max_requests": max_requests, "max_body_bytes": max_body, "request_s": request_timeout}
    Limits(max_length=max_context or 2, **limits)  # here once, rather than when all ranks have loaded
    model = fetched(model, revision=revision)
    if not model or not Path(model).is_dir():
        raise InputError(
            f"{model!r} is not a folder: give a checkpoint folder with its tokenizer, or a bundle{hub_hint(model)}"
        )
    keys = Keys.found(api_key_file)
    transformers_logging.disable_progress_bar()
    tokenizer, notes = read_tokenizer(model, chat_template)
    for note in notes:
        _say(f"note: {note}")
    vocabulary, why_not = read_vocabulary(tokenizer)
    plan = how.plan_of(model)
    if is_bundle(model):
        how.require_none(model)
    # before anything is started: whoever has the port is told of at once
    listening = bound(host, port)
    address = listening.getsockname()[1]
    if host not in _LOOPBACK and not keys:
        _say(f"note: {host} can be reached from elsewhere, and everybody may ask: give --api-key-file")
    placed = choose_device(device, num_ranks=plan.mesh.world_size)
    kind: torch.dtype | None = None if dtype in (None, "auto") else dtype_named(str(dtype))
    started = time.perf_counter()
    with (
        listening,
        launch(
            model,
            plan,
            device=placed.type,
            dtype=kind,
            max_length=how.max_length,
            checkpoint=checkpoint,
            mapped=mapped,
            checked=not unchecked,
            compile=compile_steps,
            compiled_cache=not no_cache,
            cache=_cache(cache_memory, max_batch, cache_dtype),
            max_batch=max_batch,
            vocabulary=vocabulary,
            restart=restart,
            timeout_s=rank_timeout,
            start_timeout_s=start_timeout,
        ) as llm,
    ):
        service = open_service(
            llm,
            model,
            tokenizer,
            vocabulary=vocabulary,
            why_not=why_not,
            limits=limits,
            max_context=max_context,
            name=name,
            keys=keys,
        )
        if compile_steps and (why := llm.status().replicas[0].why_eager):
            _say(f"note: decode steps run node by node, in spite of {why}")
        ready = f"{service.name!r} is served at http://{host}:{address}/v1 by {llm.replicas} x {llm.mesh}"
        longest = service.limits.max_length

        def say_ready() -> None:
            _say(f"{ready}, ready in {time.perf_counter() - started:.1f} s; texts of up to {longest} tokens")

        with contextlib.closing(service):
            serve_on(service, listening, grace_s=grace, ready=say_ready)
    _say("ended")


def _cache(memory: str | None, rows: int | None, dtype: str | None) -> CacheSize | None:
    """None: half of the memory that is free."""
    if memory is None and dtype is None:
        return None
    return CacheSize(max_batch=rows or _ROWS, memory=memory or _MEMORY, dtype=dtype)


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
