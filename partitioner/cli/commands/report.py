"""`partitioner report`."""

from __future__ import annotations

from typing import Annotated

import typer

from partitioner.cli.common.options import Dtype, Model
from partitioner.cli.common.tables import say
from partitioner.cli.jobs.compile import Compile
from partitioner.errors import InputError

__all__ = ["report_command"]


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
    from partitioner.cli.common.files import require_file
    from partitioner.planning.cluster import Cluster
    from partitioner.planning.quantities import GOALS
    from partitioner.storage.dtypes import require_asked

    pages = html is not None or print_json
    if min(prompt, new, batch) < 1:
        raise InputError(f"--prompt, --new and --batch are at least 1; got {prompt}, {new}, {batch}")
    if gpus is not None and not pages:
        raise InputError("--gpus is for the page: give --html FILE or --json as well")
    if pages and (explain is not None or generate):
        raise InputError("--explain and --generate do not go together with --html and --json: leave one of them out")
    if goal not in GOALS:
        raise InputError(f"--for is one of {', '.join(GOALS)}; got {goal!r}")
    require_file("--html", html)
    require_asked(dtype)
    cluster = None if gpus is None else Cluster.parse(gpus)

    from partitioner.analysis.report.explain import explain as explain_weight
    from partitioner.analysis.report.page.contents import Work
    from partitioner.analysis.report.page.render import as_json
    from partitioner.cli.actions.report import page_of, require_room, write_page

    if cluster is not None:
        require_room(cluster, how.plan_of(model).mesh)
    parts = how.compile(model, dtype=dtype, meta=True)
    if pages:
        page = page_of(parts, how.plan_of(model), Work(prompt, new, batch), cluster=cluster, goal=goal)
        if html is not None:
            write_page(page, html)
        if print_json:
            print(as_json(page))
        else:
            say(f"written to {html}")
        return
    if explain is not None:
        say(explain_weight(parts.program, explain))
        return
    say(str(parts.report))
    if generate:
        say(f"\n{parts.generation_report}")
