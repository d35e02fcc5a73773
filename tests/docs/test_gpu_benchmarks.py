"""The benchmarks of several GPUs run, on this machine's processors with tiny shapes, and say what they are to say."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.gpu.plans import kendall

ROOT = Path(__file__).parents[2]
RUNS = {
    "pipeline": (["--tokens", "130", "--layers", "2"], ["pp=2: 2 x CPU", "first token of 130", "3 groups of 8"]),
    "experts": (["--tokens", "1", "3"], ["small: 2 x CPU", "uneven: 2 x CPU", "3 tokens per rank", "; hidden "]),
    "sequences": (
        ["--lengths", "33", "--cached", "20", "--layers", "2"],
        ["33 tokens", "first token of 33", "20 cached", "one GPU's"],
    ),
    "plans": (["--plan", "tp=2", "dp=2", "--models", "llama 8b", "qwen3 30b-a3b"], ["2 plans, Kendall's tau"]),
}


def run(name: str, *options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", f"benchmarks.gpu.{name}", "--ranks", "2", "--device", "cpu", "--small"]
    return subprocess.run(
        [*command, "--rounds", "1", *options],
        cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=400, check=False,
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_two_ranks(name: str) -> None:
    options, said = RUNS[name]
    done = run(name, *options)
    assert done.returncode == 0, done.stdout + done.stderr
    assert all(each in done.stdout for each in said), done.stdout
    assert "!\n" not in done.stdout  # stages wrote other tokens than one rank


@pytest.mark.slow
def test_what_fails_is_told_and_the_next_runs() -> None:
    done = run("pipeline", "--plan", "pp=3", "pp=2", "--tokens", "70", "--layers", "2")
    assert done.returncode == 1
    assert "left out: pp=3" in done.stdout
    assert "pp=2: 2 x CPU" in done.stdout


@pytest.mark.slow
def test_kendall() -> None:
    assert kendall([(1, 2), (2, 3), (3, 9)]) == 1
    assert kendall([(1, 9), (2, 3), (3, 2)]) == -1
    assert kendall([(1, 1), (2, 3), (3, 2)]) == pytest.approx(1 / 3)
