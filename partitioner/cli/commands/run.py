"""`partitioner run`."""

from __future__ import annotations

from typing import Annotated

import typer

from partitioner.cli.common.options import (
    CacheDtype,
    Checkpoint,
    CompileSteps,
    Device,
    Dtype,
    MaxBatch,
    ModelWithTokenizer,
    NoCache,
    Revision,
    Simulate,
    Timeout,
)
from partitioner.cli.jobs.compile import Compile
from partitioner.errors import InputError
from partitioner.storage.example import EXAMPLE_MODEL

__all__ = ["run_command"]

_OF_CONFIG = typer.Option(help="by default what the model's generation config says")


def run_command(
    prompt: Annotated[list[str], typer.Option(help="text to continue; several make a batch")],
    how: Compile,
    model: ModelWithTokenizer = str(EXAMPLE_MODEL),
    dtype: Dtype = None,
    max_new_tokens: Annotated[int, typer.Option(help="new tokens per prompt, at most")] = 64,
    sample: Annotated[
        bool | None,
        typer.Option(
            "--sample/--greedy", help="draw tokens, or take the likeliest; by default what the model's config says"
        ),
    ] = None,
    temperature: Annotated[float | None, _OF_CONFIG] = None,
    top_k: Annotated[int | None, _OF_CONFIG] = None,
    top_p: Annotated[float | None, _OF_CONFIG] = None,
    min_p: Annotated[float | None, _OF_CONFIG] = None,
    repetition_penalty: Annotated[float | None, _OF_CONFIG] = None,
    seed: Annotated[int, typer.Option(help="the same seed gives the same text on any number of ranks")] = 0,
    stop: Annotated[list[str] | None, typer.Option(help="stop after this text; may be given several times")] = None,
    chat: Annotated[bool, typer.Option("--chat", help="put the prompt into the tokenizer's chat template")] = False,
    cache_memory: Annotated[
        str | None, typer.Option(help='limit for the cache of a rank: "4 GB", or "0.9 of free"')
    ] = None,
    cache_dtype: CacheDtype = None,
    simulate: Simulate = False,
    revision: Revision = None,
    device: Device = "auto",
    compile_steps: CompileSteps = False,
    max_batch: MaxBatch = None,
    timeout_s: Timeout = 3600.0,
    profile: Annotated[str, typer.Option(help="write a trace of every rank, node by node, to this file")] = "",
    checkpoint: Checkpoint = None,
    mapped: Annotated[
        bool, typer.Option("--mapped", help="memory-map the weights; the files must not change meanwhile")
    ] = False,
    unchecked: Annotated[
        bool, typer.Option("--unchecked", help="do not compare a bundle's weights with their digests")
    ] = False,
    no_cache: NoCache = False,
) -> None:
    """Continue a prompt, over one process per rank: of this machine, or those that torchrun started."""
    from partitioner.cli.jobs.run import Question
    from partitioner.storage.hub import fetched
    from runtime.processes.launch import require_timeout

    options = {
        "max_new_tokens": max_new_tokens,
        "do_sample": sample,
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "min_p": min_p,
        "repetition_penalty": repetition_penalty,
        "seed": seed,
        "stop_strings": stop or None,
    }
    require_timeout(timeout_s)
    if simulate and (device not in ("auto", "cpu") or compile_steps):
        raise InputError("--simulate runs on cpu, node by node: leave --device and --compile out")
    question = Question(
        fetched(model, revision=revision),
        how,
        prompts=tuple(prompt),
        dtype=dtype,
        checkpoint=checkpoint,
        mapped=mapped,
        checked=not unchecked,
        cached=not no_cache,
        chat=chat,
        cache_memory=cache_memory,
        cache_dtype=cache_dtype,
        # what is not given is what the model's generation config says
        options={name: value for name, value in options.items() if value is not None},
        profile=profile,
        device="cpu" if simulate else device,
        compile_steps=compile_steps,
        max_batch=max_batch,
    )
    question.require_right()

    from partitioner.cli.actions.run import run

    run(question, simulate=simulate, timeout_s=timeout_s)
