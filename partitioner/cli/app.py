"""The command line.

    partitioner verify MODEL --tp 4      compare the partitioned model with the original; exit code 1 if they differ
    partitioner report MODEL --tp 4      print what would be split and what not, without any weights
    partitioner run MODEL --prompt "..." continue a prompt
    partitioner serve MODEL --dp 2       answer requests over HTTP, with OpenAI's API
    partitioner bench serve --rate 4     put load on a server, and print its throughput and times
    partitioner bench plan MODEL --tp 2  run a plan on this machine: predicted times beside measured ones
    partitioner balance MODEL --text F   count which experts a text uses, and print a plan that evens them out
    partitioner export MODEL -o FOLDER   write a bundle: every rank's program and slices of the weights
    partitioner show FOLDER              print what is in a bundle
    partitioner schedule MODEL --pp 4    print or draw what each pipeline stage does when
    partitioner plan MODEL --gpus 8xH100 rank plans for a cluster by predicted times
    partitioner fit MODEL --gpus 8xH100  say whether it fits; exit code 1 if it does not
    partitioner cluster detect           measure this machine, as a file to plan with

Exit codes: 0 equal, 1 a difference or a lost rank, 2 invalid arguments (one line says which).
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from partitioner.analysis.report.explain import explain as explain_weight
from partitioner.analysis.report.page.contents import Work
from partitioner.analysis.report.page.render import as_json
from partitioner.cli.balance import register as register_balance
from partitioner.cli.bench.command import register as register_bench
from partitioner.cli.common.command import command
from partitioner.cli.common.options import (
    CacheDtype,
    Checkpoint,
    Compile,
    CompileSteps,
    Device,
    Dtype,
    MaxBatch,
    Model,
    ModelWithTokenizer,
    NoCache,
    Revision,
    Simulate,
    Timeout,
)
from partitioner.cli.common.tables import print_table
from partitioner.cli.export import export
from partitioner.cli.plan import register
from partitioner.cli.report import page_of, schedule, write_page
from partitioner.cli.run import Question, answer, answer_alone, answer_here, run_in_processes, run_on_replicas
from partitioner.cli.serve import register as register_serve
from partitioner.cli.verify import (
    Case,
    Outcome,
    cache_losses,
    cache_losses_in_processes,
    explain,
    parse_lengths,
    verify,
    verify_in_processes,
)
from partitioner.errors import InputError
from partitioner.storage.bundle.bundle import load
from partitioner.storage.bundle.describe import describe, show_graph
from partitioner.storage.example import EXAMPLE_MODEL
from partitioner.storage.hub import fetched
from partitioner.storage.named_model import dtype_named
from runtime.generation.generation_options import Settings
from runtime.processes.launch import require_timeout
from runtime.processes.place import is_rank

__all__ = ["app", "main"]

_HELP = """Partition Hugging Face models over ranks, and run them.

MODEL is a checkpoint folder, a hub's org/name, a bundle, config:FILE.json, or a model type of transformers.
Exit codes: 0 equal, 1 a difference or a lost rank, 2 invalid arguments (one line says which)."""

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False, help=_HELP)


_OF_CONFIG = typer.Option(help="by default what the model's generation config says")


@command(app, "verify")
def verify_command(
    model: Model,
    how: Compile,
    dtype: Annotated[str, typer.Option(help="dtypes to compare in, separated by commas")] = "float64,float32",
    lengths: Annotated[str, typer.Option(help="sequence lengths, separated by commas")] = "1,5,40",
    simulate: Simulate = False,
    device: Device = "auto",
    revision: Revision = None,
    seed: Annotated[int, typer.Option(help="seed of random weights and inputs")] = 0,
    timeout_s: Timeout = 600.0,
    cache_dtype: Annotated[
        str | None, typer.Option(help="fp8: also print how much worse such a cache is than one in bfloat16")
    ] = None,
) -> None:
    """Compare the partitioned model with the original, over one process per rank."""
    model = fetched(model, revision=revision)
    place = "cpu" if simulate else device
    case = Case(model, how, tuple(dtype.split(",")), parse_lengths(lengths), seed, place, cache_dtype)
    require_timeout(timeout_s)  # also where no process is started
    for name in case.dtypes:
        dtype_named(name)
    outcomes = list(verify(case)) if simulate else verify_in_processes(case, timeout_s=timeout_s)
    console = Console()
    over = "one process per rank, over gloo" if case.placed.type == "cpu" else "one process and GPU per rank"
    print_table(f"{case.model}, {case.plan}, {'one thread per rank' if simulate else over}", _table(outcomes))
    worst = next((outcome for outcome in outcomes if not outcome.equal), None)
    if worst is not None:
        divergence = explain(case, worst)
        equal = "in the trace, or in rounding: in float64 the partitioned graph equals the traced one"
        at = equal if divergence is None else str(divergence)
        console.print(f"first difference ({worst.dtype}, length {worst.length}): {at}", markup=False, highlight=False)
        raise typer.Exit(1)
    if cache_dtype is not None:
        losses = cache_losses(case) if simulate else cache_losses_in_processes(case, timeout_s=timeout_s)
        for loss in losses:
            console.print(str(loss), markup=False, highlight=False, soft_wrap=True)


@command(app, "report")
def report_command(
    model: Model,
    how: Compile,
    dtype: Dtype = None,
    explain: Annotated[
        str | None,
        typer.Option(help="print instead why this weight is held as it is: a name, in which * matches anything"),
    ] = None,
    generate: Annotated[
        bool, typer.Option("--generate", help="also report the decode graph: what ranks keep of each sequence")
    ] = False,
    html: Annotated[str | None, typer.Option(help="write instead a page with pictures to this file")] = None,
    print_json: Annotated[bool, typer.Option("--json", help="print instead all that the page says as JSON")] = False,
    gpus: Annotated[
        str | None,
        typer.Option(help="for the page: the cluster, for places and predicted times: 8xH100, or a .yaml file"),
    ] = None,
    prompt: Annotated[int, typer.Option(help="for the page: tokens per prompt")] = 1024,
    new: Annotated[int, typer.Option(help="for the page: new tokens per prompt")] = 256,
    batch: Annotated[int, typer.Option(help="for the page: requests at the same time")] = 1,
    goal: Annotated[str, typer.Option("--for", help="for the page: goal: latency, throughput or context")] = "latency",
) -> None:
    """Print what would be split over the ranks and what would not, and why. Needs no weights and little memory."""
    if min(prompt, new, batch) < 1:
        raise InputError(f"--prompt, --new and --batch are at least 1; got {prompt}, {new}, {batch}")
    if gpus is not None and html is None and not print_json:
        raise InputError("--gpus is for the page: give --html FILE or --json as well")
    if (html is not None or print_json) and (explain is not None or generate):
        raise InputError("--explain and --generate do not go together with --html and --json: leave one of them out")
    if html is not None and not Path(html).resolve().parent.is_dir():
        raise InputError(f"--html {html}: there is no folder {Path(html).resolve().parent}")
    if html is not None and Path(html).is_dir():
        raise InputError(f"--html {html}: this is a folder, and the page is a file")
    parts = how.compile(model, dtype=dtype, meta=True)
    console = Console()
    if html is not None or print_json:
        page = page_of(parts, how.plan_of(model), Work(prompt, new, batch), gpus=gpus, goal=goal)
        if html is not None:
            write_page(page, html)
        if print_json:
            print(as_json(page))
        else:
            console.print(f"written to {html}", markup=False, highlight=False, soft_wrap=True)
        return
    if explain is not None:
        console.print(explain_weight(parts.program, explain), markup=False, highlight=False, soft_wrap=True)
        return
    console.print(str(parts.report), markup=False, highlight=False, soft_wrap=True)
    if generate:
        console.print(f"\n{parts.generation_report}", markup=False, highlight=False, soft_wrap=True)


@command(app, "run")
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
    # what is not given is what the model's generation config says
    options = {name: value for name, value in options.items() if value is not None}
    require_timeout(timeout_s)
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
        options=options,
        profile=profile,
        device="cpu" if simulate and device == "auto" else device,
        compile_steps=compile_steps,
        max_batch=max_batch,
    )
    if simulate and (question.placed.type != "cpu" or compile_steps):
        raise InputError("--simulate runs on cpu, node by node: leave --device and --compile out")
    Settings.of({**options, "tokenizer": ...}, eos_token_id=())  # here once, rather than on every rank
    if is_rank():
        answer(question)
    elif simulate:
        answer_here(question, timeout_s=timeout_s)
    elif question.num_ranks == 1:
        answer_alone(question, timeout_s=timeout_s)
    elif question.replicated.replicas > 1:
        run_on_replicas(question, timeout_s=timeout_s)
    else:
        run_in_processes(question, timeout_s=timeout_s)


@command(app, "export")
def export_command(
    model: Model,
    out: Annotated[str, typer.Option("--out", "-o", help="a new folder")],
    how: Compile,
    dtype: Dtype = None,
    reference: Annotated[
        bool, typer.Option("--reference", help="leave the weights in the checkpoint, and refer to them")
    ] = False,
    revision: Revision = None,
) -> None:
    """Write a bundle: what each rank runs, and its slices of the weights. Loading a bundle executes no code from it."""
    said = export(fetched(model, revision=revision), how, out, dtype=dtype, reference=reference)
    Console(stderr=True).print(said, markup=False, highlight=False, soft_wrap=True)


@command(app, "show")
def show_command(
    folder: Annotated[str, typer.Argument(help="a bundle")],
    rank: Annotated[int | None, typer.Option(help="print what this rank runs")] = None,
    generation: Annotated[bool, typer.Option("--generation", help="with --rank: its decode graph")] = False,
    verify: Annotated[bool, typer.Option("--verify", help="read and check all files, weights included")] = False,
    checkpoint: Checkpoint = None,
) -> None:
    """Print what is in a bundle."""
    bundle = load(folder, checkpoint=checkpoint)
    if verify:
        bundle.verify()
    said = describe(bundle) if rank is None else show_graph(bundle, rank, generation=generation)
    Console().print(said, markup=False, highlight=False, soft_wrap=True)
    if verify:
        Console().print("all files are as they were written", markup=False, highlight=False)


@command(app, "schedule")
def schedule_command(
    model: Model,
    how: Compile,
    dtype: Dtype = None,
    microbatches: Annotated[int, typer.Option(help="number of pieces of a batch or prompt")] = 8,
    out: Annotated[str | None, typer.Option("--out", "-o", help="write the picture to this file, as SVG")] = None,
) -> None:
    """Print how long pipeline stages are idle, from their predicted times; needs no weights."""
    parts = how.compile(model, dtype=dtype, meta=True)
    said = schedule(parts, microbatches=microbatches, out=out)
    Console().print(said, markup=False, highlight=False, soft_wrap=True)


register(app)
register_balance(app)
register_serve(app)
register_bench(app)


def main() -> None:
    app()


def _table(outcomes: list[Outcome]) -> Table:
    table = Table()
    for heading in ("dtype", "length", "relative error", "allowed", ""):
        table.add_column(heading, justify="left" if heading in ("dtype", "") else "right")
    for outcome in outcomes:
        verdict = "[green]equal[/]" if outcome.equal else "[red]differs[/]"
        table.add_row(outcome.dtype, str(outcome.length), f"{outcome.error:.1e}", f"{outcome.accepted:.0e}", verdict)
    return table
