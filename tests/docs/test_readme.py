"""The code of README.md and docs/generation.md as typed; the commands for torchrun."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.processes import typed
from tests.support.processes.free_port import free_port

README = (typed.ROOT / "README.md").read_text(encoding="utf-8")
PYTHON = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
TORCHRUN = re.compile(r"^\.venv/bin/torchrun (.*)$", re.MULTILINE)
TEXT = "Return a list of strings."


@pytest.mark.slow
def test_the_code_of_the_readme(tmp_path: Path) -> None:
    first, in_processes = PYTHON.findall(README)
    assert 'device="cuda"' in in_processes
    # one rank, which needs no launcher
    alone = in_processes.replace('device="cuda"', 'device="cpu"')
    place = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    connect = f"import os\nos.environ |= {place}\nparts = partition(EXAMPLE_MODEL, Plan())\n{alone}"
    done = typed.run("-c", f"{first}\n{connect}\nprint('written', written.shape)", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert TEXT in done.stdout
    assert "def forward" in done.stdout
    assert "written torch.Size([1, " in done.stdout


@pytest.mark.slow
def test_the_code_about_generation(tmp_path: Path) -> None:
    first, *_ = typed.code("generation.md")
    done = typed.run_code(first, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert TEXT in done.stdout
    assert done.stdout.count("|") == 8


@pytest.mark.slow
@pytest.mark.processes
def test_the_commands_for_torchrun(tmp_path: Path) -> None:
    """Of two hosts, both are this one; of GPUs, none."""
    one_host, *two_hosts = TORCHRUN.findall(typed.text_of("generation.md"))
    assert len(two_hosts) == 2
    assert torchrun([one_host.replace("cuda", "cpu")], tmp_path)[0].startswith("tp=2 on cpu")
    first, second = torchrun(two_hosts, tmp_path)
    assert first.startswith("tp=2 on ")
    assert TEXT in first
    assert not second  # rank 0 alone prints


def torchrun(commands: list[str], folder: Path) -> list[str]:
    port = str(free_port())
    environment = {**os.environ, "PYTHONPATH": str(typed.ROOT), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    started = []
    with (folder / "stderr").open("wb") as stderr:
        for command in commands:
            arguments = shlex.split(command.replace("$HOST", "127.0.0.1").replace("29500", port))
            started.append(
                subprocess.Popen(
                    [sys.executable, "-P", "-m", "torch.distributed.run", *arguments],
                    cwd=typed.ROOT,
                    env=environment,
                    stdout=subprocess.PIPE,
                    stderr=stderr,
                    text=True,
                )
            )
    said = [process.communicate(timeout=300)[0] for process in started]
    assert [process.returncode for process in started] == [0] * len(commands), (folder / "stderr").read_text()
    return said
