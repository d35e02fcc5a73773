"""`partitioner bench serve`: how a server does under load, whoever's it is, which needs the extra `partitioner[serve]`
and no torch; `partitioner bench plan`: what a plan takes on this machine, beside what is predicted.
"""

from __future__ import annotations

import json
import os
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from partitioner.cli.common.options import Device, Model, Timeout
from partitioner.cli.common.tables import print_table, say
from partitioner.cli.jobs.compile import Compile
from partitioner.errors import InputError
from partitioner.serving.load.workload import ANSWER_MEAN, PROMPT_MEAN, Workload

__all__ = ["bench_plan_command", "bench_serve_command"]


def bench_plan_command(
    model: Model,
    how: Compile,
    prompt: Annotated[int, typer.Option(help="tokens per prompt")] = 64,
    new: Annotated[int, typer.Option(help="new tokens per prompt")] = 16,
    batch: Annotated[int, typer.Option(help="requests at the same time, over all ranks")] = 2,
    gpus: Annotated[
        str | None,
        typer.Option(help="predict by this cluster's tables, such as 2xH200; by default this CPU is calibrated"),
    ] = None,
    device: Device = "auto",
    rounds: Annotated[int, typer.Option(help="number of rounds, of which the fastest counts")] = 5,
    timeout_s: Timeout = 600.0,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON")] = False,
) -> None:
    """Run a plan over one process per rank of this machine, and print its times beside the predicted ones."""
    from partitioner.cli.jobs.bench_plan import PlanCase
    from runtime.processes.launch import require_timeout

    require_timeout(timeout_s)
    case = PlanCase(model, how, prompt, new, batch, gpus, device, rounds)

    from partitioner.cli.actions.bench_plan import measure

    found = measure(case, timeout_s=timeout_s)
    if as_json:
        print(json.dumps(found, indent=1))
        return
    table = Table()
    for heading in ("", "predicted", "measured", "off"):
        table.add_column(heading, justify="right" if heading else "left")
    for what, name in (("ttft_s", "first token"), ("tpot_s", "each token")):
        guess, took = found["predicted"][what], found["measured"][what]
        table.add_row(name, f"{guess * 1e3:.2f} ms", f"{took * 1e3:.2f} ms", f"{guess / took - 1:+.0%}")
    print_table(f"{model}, {how.plan_of(model)}: {batch} x {prompt} tokens, {new} new", table)
    say(found["by"])


def bench_serve_command(
    url: Annotated[str, typer.Option(help="address of the server, up to /v1")] = "http://127.0.0.1:8000/v1",
    rate: Annotated[float | None, typer.Option(help="requests that arrive per second, at random (Poisson)")] = None,
    clients: Annotated[
        int | None, typer.Option(help="instead of --rate: number of clients that each send one request after the other")
    ] = None,
    requests: Annotated[int, typer.Option(help="number of requests")] = 100,
    prompt_mean: Annotated[float, typer.Option(help="mean tokens of a prompt")] = PROMPT_MEAN,
    answer_mean: Annotated[float, typer.Option(help="mean tokens of an answer")] = ANSWER_MEAN,
    longest: Annotated[int, typer.Option(help="tokens of a prompt with its answer, at most")] = 2048,
    seed: Annotated[int, typer.Option(help="the same seed sends the same requests")] = 0,
    model: Annotated[
        str | None, typer.Option(help="name of the model; by default the first that the server lists")
    ] = None,
    tokenizer: Annotated[
        str | None,
        typer.Option(help="folder of a tokenizer, to count tokens of prompts; by default words are counted"),
    ] = None,
    timeout_s: Annotated[
        float, typer.Option("--timeout", help="seconds without a byte after which a request has failed")
    ] = 600,
    plot: Annotated[str | None, typer.Option(help="write the distributions to this file, .svg or .png")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON")] = False,
) -> None:
    """Put load on a server, and print its throughput and times. A key is read from OPENAI_API_KEY."""
    from partitioner.cli.common.files import require_file

    require_file("--plot", plot)
    workload = Workload(
        requests=requests,
        rate=4.0 if rate is None and clients is None else rate,
        clients=clients,
        prompt_mean=prompt_mean,
        answer_mean=answer_mean,
        longest=longest,
        seed=seed,
    )
    try:
        from partitioner.serving.load.measures import write_plot
        from partitioner.serving.load.put_load import put_load  # needs the extra
    except ModuleNotFoundError as error:
        raise InputError(f"this needs {error.name}: pip install 'partitioner[serve]'") from error
    key = os.environ.get("OPENAI_API_KEY")
    asked, measures = put_load(workload, url=url, model=model, key=key, tokenizer=tokenizer, timeout_s=timeout_s)
    if plot is not None:
        write_plot(measures, plot)
    if as_json:
        print(json.dumps(measures.data(), indent=1))
    else:
        _show(measures.rows(), f"{asked} at {url}", measures.summary())
    if len(measures.good) < len(measures.answered):
        reasons = sorted({each.error for each in measures.answered if each.error})
        Console(stderr=True).print(f"failed: {'; '.join(reasons[:3])}", markup=False, highlight=False, soft_wrap=True)
        raise typer.Exit(1)


def _show(rows: list[list[str]], title: str, summary: str) -> None:
    table = Table()
    for heading in ("ms", "mean", "p50", "p99"):
        table.add_column(heading, justify="left" if heading == "ms" else "right")
    for row in rows:
        table.add_row(*row)
    print_table(title, table)
    say(summary)
