"""Help, errors of arguments and clusters come at once: what takes seconds to import is imported by what needs it."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

import partitioner

CODE = """
import json, sys
found = []

def note(what):
    found.append((what, sorted({"torch", "transformers", "sympy", "numpy"} & set(sys.modules))))

from partitioner import Cluster, InputError, Plan, Workload
Plan.parse("tp=2,pp=2"), Cluster.parse("8xH100"), Workload(16, 16)
note("from partitioner import Plan, Cluster")

from typer.main import get_command
from typer.testing import CliRunner
from partitioner.cli.app import app
note("the app")

def leaves(group, *above):
    for name, command in group.commands.items():
        yield from leaves(command, *above, name) if hasattr(command, "commands") else [[*above, name]]

def run(*arguments, code):
    done = CliRunner().invoke(app, list(arguments))
    assert done.exit_code == code, (arguments, done.output, done.exception)
    note(" ".join(arguments))
    return done.output

run("--help", code=0)
for command in leaves(get_command(app)):
    run(*command, "--help", code=0)
    run(*command, "--no-such-option", code=2)
run("cluster", "show", "2x8xH100", code=0)
for text in sys.argv[1:]:
    run(*text.split(), code=2)
assert len(found) > 40
light = list(found)

run("verify", "no-such-model", "--simulate", code=2)  # negative control: it looks for a model
print(json.dumps({"light": light, "heavy": found[-1]}))
"""
WRONG = (
    "verify llama --tp 0",
    "verify llama --lengths 1,x",
    "verify llama --dtype int8",
    "verify llama --timeout 0",
    "verify llama --seed -1",
    "verify llama --pass nothing",
    "verify llama --cache-dtype int4",
    "report llama --gpus 8xH100",
    "report llama --json --gpus 8xNothing",
    "report llama --html /nowhere/page.html",
    "report llama --dtype int8",
    "report llama --json --for nothing",
    "run no-such-folder --prompt a",
    "run --prompt a --max-batch 0",
    "run --prompt a --temperature -1",
    "run --prompt a --cache-memory some",
    "run --prompt a --plan tp=2 --tp 3",
    "run --prompt a --profile /nowhere/trace.json",
    "run --prompt a --simulate --device cuda",
    "export llama -o /",
    "schedule llama",
    "schedule llama --pp 2 --microbatches 0",
    "plan llama --gpus 8xH100 --for nothing",
    "fit llama --gpus 8xH100 --weights nothing",
    "cluster show",
    "balance no-such-folder --text x --ep 2",
    "serve no-such-folder",
    "serve --max-context 1",
    "serve --max-batch 0",
    "serve --port 65536",
    "bench plan llama --new 1",
    "bench serve --rate 1 --clients 1",
    "bench serve --url http://127.0.0.1:9/v1 --requests 1",
)


@pytest.mark.interpreters
def test_arguments_are_taken_without_torch() -> None:
    root = Path(partitioner.__file__).parent.parent
    done = subprocess.run([sys.executable, "-c", CODE, *WRONG], capture_output=True, text=True, check=False, cwd=root)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert not [what for what, modules in found["light"] if modules]
    assert "torch" in found["heavy"][1]
