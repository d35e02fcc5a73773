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

import typer

from partitioner.cli.commands.balance import balance_command
from partitioner.cli.commands.bench import bench_plan_command, bench_serve_command
from partitioner.cli.commands.cluster import cluster_command
from partitioner.cli.commands.export import export_command, show_command
from partitioner.cli.commands.plan import fit_command, plan_command
from partitioner.cli.commands.report import report_command
from partitioner.cli.commands.run import run_command
from partitioner.cli.commands.schedule import schedule_command
from partitioner.cli.commands.serve import serve_command
from partitioner.cli.commands.verify import verify_command
from partitioner.cli.common.command import command

__all__ = ["app", "main"]

_HELP = """Partition Hugging Face models over ranks, and run them.

MODEL is a checkpoint folder, a hub's org/name, a bundle, config:FILE.json, or a model type of transformers.
Exit codes: 0 equal, 1 a difference or a lost rank, 2 invalid arguments (one line says which)."""

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False, help=_HELP)
command(app, "verify")(verify_command)
command(app, "report")(report_command)
command(app, "run")(run_command)
command(app, "export")(export_command)
command(app, "show")(show_command)
command(app, "schedule")(schedule_command)
command(app, "plan")(plan_command)
command(app, "fit")(fit_command)
command(app, "cluster")(cluster_command)
command(app, "balance")(balance_command)
command(app, "serve")(serve_command)

bench = typer.Typer(no_args_is_help=True)
command(bench, "serve")(bench_serve_command)
command(bench, "plan")(bench_plan_command)
app.add_typer(bench, name="bench", help="Measure a server under load, or a plan on this machine.")


def main() -> None:
    app()
