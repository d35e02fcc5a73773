"""`partitioner serve`."""

from __future__ import annotations

from typing import Annotated

import typer

from partitioner.cli.common.options import (
    CacheDtype,
    Checkpoint,
    CompileSteps,
    Device,
    Dtype,
    ModelWithTokenizer,
    NoCache,
    Revision,
)
from partitioner.cli.jobs.compile import Compile
from partitioner.storage.example import EXAMPLE_MODEL

__all__ = ["serve_command"]


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
    from partitioner.cli.jobs.serve import Serving
    from partitioner.storage.hub import fetched

    serving = Serving(
        fetched(model, revision=revision),
        how,
        host=host,
        port=port,
        name=name,
        chat_template=chat_template,
        api_key_file=api_key_file,
        max_requests=max_requests,
        max_context=max_context,
        max_body=max_body,
        request_timeout_s=request_timeout,
        grace_s=grace,
        restart=restart,
        max_batch=max_batch,
        cache_memory=cache_memory,
        cache_dtype=cache_dtype,
        rank_timeout_s=rank_timeout,
        start_timeout_s=start_timeout,
        dtype=dtype,
        device=device,
        compile_steps=compile_steps,
        checkpoint=checkpoint,
        mapped=mapped,
        checked=not unchecked,
        cached=not no_cache,
    )

    from partitioner.cli.actions.serve import serve

    serve(serving)
