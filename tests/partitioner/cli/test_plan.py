"""plan, fit and cluster on the command line: what they print, and their exit codes."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from partitioner.cli.app import app
from partitioner.planning.cluster import Cluster
from partitioner.storage.example import EXAMPLE_MODEL

MODEL = str(EXAMPLE_MODEL)
TINY = """
name: tiny
dimensions:
- {name: PCIe, size: 2, gb_s: 25, latency_ns: 6000}
devices:
- {name: tiny, memory_gib: 0.0005, reserved_gib: 0.0001, bandwidth_gb_s: 100, tflops: {float32: 1, bfloat16: 1}}
"""


def run(*arguments: str) -> tuple[int, str]:
    found = CliRunner().invoke(app, list(arguments), env={"COLUMNS": "240"})
    return found.exit_code, found.output


def test_plans_are_ranked_and_told_as_json() -> None:
    code, said = run("plan", MODEL, "--gpus", "2xH100", "--prompt", "64", "--new", "8", "--batch", "4", "--json")
    assert code == 0
    told = json.loads(said)
    assert told["plans"][0]["tpot_s"] > 0
    latency = [plan["ttft_s"] + 7 * plan["tpot_s"] for plan in told["plans"]]
    assert latency == sorted(latency)
    assert told["plans"][0]["reason"]
    assert told["cluster"]["devices"][0]["name"] == "H100"


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (("--for", "speed"), "--for is one of latency, throughput, context; got 'speed'"),
        (("--weights", "int3"), "--weights is one of expanded, stored; got 'int3'"),
        (("--cache-dtype", "fp4"), "got 'fp4'"),
        (("--top", "0"), "--top"),
        (("--gpus", "3x24GB"), "Known: A100"),
    ],
)
def test_wrong_calls_are_told_before_a_model_is_read(given: tuple[str, str], said: str) -> None:
    code, printed = run("plan", "/nowhere", "--gpus", "2xH100", *given)
    assert code == 2
    assert said in printed


def test_the_table_says_what_is_measured() -> None:
    code, said = run("plan", MODEL, "--gpus", "2xH100", "--for", "throughput", "--tpot", "0.0000001")
    assert code == 0
    assert "binds" in said
    assert "tpot" in said
    assert "NVLink4: NCCL tables" in said
    assert "> 1e-07 s" in said


def test_fit_says_yes_no_and_wrong_call(tmp_path: Path) -> None:
    assert run("fit", MODEL, "--gpus", "H100", "--weights-only")[0] == 0
    path = tmp_path / "tiny.yaml"
    path.write_text(TINY)
    code, said = run("fit", MODEL, "--gpus", str(path), "--weights-only")
    assert code == 1
    assert "no" in said
    code, said = run("fit", MODEL, "--gpus", "many")
    assert code == 2
    assert "unknown device" in said


def test_fit_of_weights_as_they_are_released() -> None:
    shapes = Path(__file__).parents[3] / "benchmarks" / "planning" / "shapes"
    both = [f"config:{shapes / name}.json" for name in ("gpt-oss-120b", "llama-3.1-8b")]
    code, said = run("fit", *both, "--gpus", "2xH100", "--weights-only")
    (row,) = (line for line in said.splitlines() if "gpt-oss-120b" in line)
    assert code == 1
    assert row.replace("│", " ").split() == ["gpt-oss-120b", "233.7", "GB", "3", "no", "65.2", "GB", "1", "yes"]
    assert run("fit", *both, "--gpus", "2xH100", "--weights-only", "--weights", "stored")[0] == 0
    code, said = run("fit", both[1], "--gpus", "2xH100", "--weights-only", "--weights", "stored")
    assert code == 2
    assert "no quantization_config" in said


def test_fit_names_the_fewest_cards() -> None:
    code, said = run("fit", MODEL, "--gpus", "2xH100", "--json")
    assert code == 0
    (told,) = json.loads(said)
    assert told["devices"] == 1
    assert told["fits"] is True
    assert told["weights"] < told["usable_bytes_of_a_card"]


def test_cluster_is_written_and_read(tmp_path: Path) -> None:
    path = tmp_path / "ours.yaml"
    assert run("cluster", "show", "4x8xA100", "--out", str(path))[0] == 0
    assert Cluster.parse(str(path)).size == 32
    assert run("cluster", "show")[0] == 2


@pytest.mark.parametrize("goal", ["glory", pytest.param("", marks=pytest.mark.slow)])
def test_a_wrong_goal_is_refused(goal: str) -> None:
    assert run("plan", MODEL, "--gpus", "H100", "--for", goal)[0] == 2


def test_what_ranks_hold_is_said_and_priced() -> None:
    call = ("plan", MODEL, "--gpus", "2xH100", "--prompt", "64", "--new", "8")
    said = {dtype: run(*call, *(("--cache-dtype", dtype) if dtype else ())) for dtype in ("", "fp8")}
    assert [code for code, _ in said.values()] == [0, 0]
    sizes = {dtype: float(text.split(" kB a token")[0].split(", ")[-1]) for dtype, (_, text) in said.items()}
    assert "keys and values of each token in float32" in said[""][1]
    assert "keys and values of each token in fp8" in said["fp8"][1]
    assert 0.2 < sizes["fp8"] / sizes[""] < 0.5
