"""docs/serving.md against the code: fields, codes, options, files; and the files of balancers, as they read them."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from partitioner.serving.openai.requests import ChatRequest, CompletionRequest

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "serving.md").read_text(encoding="utf-8")
SERVING = ROOT / "partitioner" / "serving"


def test_every_field_that_is_taken_is_named() -> None:
    own = {"messages", "prompt", "model"}
    named = set(re.findall(r"`([a-z_.]+)", PAGE))
    shortened = {"modalities", "audio", "prediction", "web_search_options", "reasoning_effort", "verbosity"}
    shortened |= {"tool_choice", "function_call", "parallel_tool_calls"}
    fields = {*ChatRequest.model_fields, *CompletionRequest.model_fields} - own - shortened
    assert len(fields) > 20
    assert not fields - named - {"stream_options"}


def test_every_code_of_an_error_is_named() -> None:
    source = "".join(path.read_text(encoding="utf-8") for path in SERVING.rglob("*.py"))
    codes = set(re.findall(r'code="([a-z_]+)"', source))
    assert len(codes) >= 10
    assert not [code for code in codes if code not in PAGE and not code.startswith("missing_required")]


def test_options_and_paths_that_it_names_exist() -> None:
    reference = (ROOT / "docs" / "reference" / "command_line.md").read_text(encoding="utf-8")
    options = set(re.findall(r"`?(--[a-z][a-z-]+)", PAGE)) - {
        "--continuous-batching",
        "--minutes",
        "--parts",
        "--pieces",
        "--ranks",
        "--rounds",
        "--seconds",
    }  # others'
    sections = [
        reference.partition(f"## partitioner {name}\n")[2].partition("\n## ")[0] for name in ("serve", "bench serve")
    ]
    assert len(options) > 12
    assert not [option for option in options if not any(f"`{option}`" in section for section in sections)]
    for path in re.findall(r"examples/serving[\w/.]*", PAGE):
        assert (ROOT / path).exists()


@pytest.mark.parametrize(
    "command",
    [
        ["haproxy", "-c", "-f", "examples/serving/haproxy.cfg"],
        ["nginx", "-t", "-p", ".", "-c", "examples/serving/nginx.conf"],
    ],
    ids=lambda command: command[0],
)
def test_configurations_of_balancers_are_accepted(command: list[str]) -> None:
    if shutil.which(command[0]) is None:
        pytest.skip(f"{command[0]} is not installed")
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
