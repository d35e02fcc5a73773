"""The options that commands share: each has one name, one default and one help text, wherever it stands.

A new one gets a type here and a parameter of the commands that take it; one that says how a model is compiled gets a
field of `Compile` (`jobs/compile.py`) and a place in `command.py`.
"""

from __future__ import annotations

from typing import Annotated

import typer

__all__ = [
    "CacheDtype",
    "Checkpoint",
    "CompileSteps",
    "Device",
    "Dp",
    "Dtype",
    "Ep",
    "KeepWhole",
    "MaxBatch",
    "MaxLength",
    "Model",
    "ModelWithTokenizer",
    "NoCache",
    "Passes",
    "PlanText",
    "Pp",
    "Revision",
    "Simulate",
    "Timeout",
    "Tp",
    "Verbose",
]

Model = Annotated[
    str,
    typer.Argument(
        help="a checkpoint folder, a hub's org/name, a bundle to reshard, config:FILE.json, or a model type"
    ),
]
PlanText = Annotated[
    str | None,
    typer.Option("--plan", help='degrees and options of passes, such as "tp=2,pp=2" or "tp=4,keep_whole=[*.head]"'),
]
Tp = Annotated[
    int | None,
    typer.Option(
        "--tp",
        "--tensor-parallel-size",
        "--tensor_parallel_size",
        "--tp-size",
        "-tp",
        help="tensor-parallel ranks; by default 1, or those of the bundle",
    ),
]
Pp = Annotated[
    int | None,
    typer.Option(
        "--pp",
        "--pipeline-parallel-size",
        "--pipeline_parallel_size",
        "--pp-size",
        "-pp",
        help="pipeline stages; by default 1, or those of the bundle",
    ),
]
Ep = Annotated[
    int | None,
    typer.Option(
        "--ep",
        "--expert-parallel-size",
        "--expert_parallel_size",
        "--ep-size",
        help="ranks that share out the experts of each layer; by default 1, or those of the bundle",
    ),
]
Sp = Annotated[
    int | None,
    typer.Option(
        "--sp",
        "--context-parallel-size",
        "--context_parallel_size",
        help="ranks that share out the tokens of each sequence; by default 1, or those of the bundle",
    ),
]
Dp = Annotated[
    int | None,
    typer.Option(
        "--dp",
        "--data-parallel-size",
        "--data_parallel_size",
        "--dp-size",
        "-dp",
        help="replicas, which share out requests; by default 1, or those of the bundle",
    ),
]
ModelWithTokenizer = Annotated[
    str,
    typer.Argument(
        help="a checkpoint folder with its tokenizer, a hub's org/name, or a bundle; by default a small trained one"
    ),
]
Dtype = Annotated[
    str | None,
    typer.Option(help="dtype of the weights; by default (or auto) the checkpoint's, or what the configuration names"),
]
Device = Annotated[
    str, typer.Option(help="cpu, cuda, or auto: GPUs if this machine has one for each of its ranks, else cpu")
]
CompileSteps = Annotated[
    bool, typer.Option("--compile/--no-compile", help="compile decode steps by torch.compile, which takes a minute")
]
Revision = Annotated[
    str | None, typer.Option(help="branch, tag or commit of a repository on a hub; by default its main branch")
]
MaxBatch = Annotated[int | None, typer.Option(help="how many prompts run at a time, at most; by default all")]
KeepWhole = Annotated[
    list[str] | None, typer.Option(help="weights that stay whole on every rank: names, in which * matches anything")
]
Passes = Annotated[list[str] | None, typer.Option("--pass", help="name of an installed pass to run as well")]
Verbose = Annotated[bool, typer.Option("--verbose", help="print what compiling did, and how long each step took")]
CacheDtype = Annotated[
    str | None,
    typer.Option(
        "--cache-dtype",
        "--kv-cache-dtype",
        help="fp8: cache keys and values as float8 with a scale per token and head",
    ),
]
NoCache = Annotated[bool, typer.Option("--no-cache", help="do not use or keep compiled programs in the user's cache")]
MaxLength = Annotated[
    int | None,
    typer.Option(help="length of the longest text, in tokens; matters for rotary embeddings that depend on it"),
]
Simulate = Annotated[bool, typer.Option("--simulate", help="run all ranks in this process, one thread each")]
Timeout = Annotated[float, typer.Option("--timeout", help="kill the whole run after this many seconds")]
Checkpoint = Annotated[
    str | None, typer.Option(help="folder with the weights of a bundle that was exported with --reference")
]
