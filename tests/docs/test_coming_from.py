"""docs/coming_from.md: its options exist in the commands that it names, and its code runs as typed."""

import re
from pathlib import Path

import pytest
import typer.main

from partitioner.cli.app import app
from tests.support.processes import typed

PAGE = typed.text_of("coming_from.md")
OF_PLANS = ("run", "serve", "verify", "report", "export", "schedule")


def options_of(command: str) -> set[str]:
    found = typer.main.get_command(app).commands[command]  # type: ignore[attr-defined]
    return {name for each in found.params for name in each.opts}


def rows() -> list[list[str]]:
    lines = [line for line in PAGE.splitlines() if line.startswith("| `--")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def names(cell: str) -> set[str]:
    return set(re.findall(r"(?<![\w-])--?[a-z][a-z-]+", cell))


def test_every_option_of_ours_exists_and_takes_the_names_of_vllm_and_sglang() -> None:
    assert len(rows()) == 11
    for ours, vllm, sglang, *_ in rows():
        (own,) = (name for name in names(ours) if name.startswith("--"))
        assert own in options_of("serve")
        # degrees that are a flag there, or split something else, and numbers of memory that mean something else
        skipped = {"--enable-expert-parallel", "--decode-context-parallel-size", "--prefill-context-parallel-size"}
        skipped |= {"--attn-cp-size", "--dcp-size"}
        skipped |= {"--gpu-memory-utilization", "--mem-fraction-static"}
        assert (names(vllm) | names(sglang)) - skipped <= options_of("serve"), ours


DEGREES = {
    "tp": ("--tp", "--tp-size", "--tensor-parallel-size", "-tp"),
    "pp": ("--pp", "--pp-size", "--pipeline-parallel-size", "-pp"),
    "dp": ("--dp", "--dp-size", "--data-parallel-size", "-dp"),
    "ep": ("--ep", "--ep-size", "--expert-parallel-size"),
    "sp": ("--sp", "--context-parallel-size"),
}


@pytest.mark.parametrize("command", OF_PLANS)
def test_each_name_of_a_degree_is_read_as_it_in_every_command(command: str) -> None:
    known = typer.main.get_command(app).commands[command]  # type: ignore[attr-defined]
    needed = {"export": ["MODEL", "--out", "FOLDER"], "run": ["MODEL", "--prompt", "Hello"]}.get(command, ["MODEL"])
    for degree, names_of in DEGREES.items():
        for name in names_of:
            context = known.make_context(command, [*needed, name, "3"], resilient_parsing=False)
            read = {each: value for each, value in context.params.items() if value == 3}
            assert read == {degree: 3}, name


def test_commands_name_options_that_exist() -> None:
    mine = [line for line in PAGE.splitlines() if line.startswith("partitioner serve ")]
    assert len(mine) == 5
    for line in mine:
        assert names(line) <= options_of("serve"), line


@pytest.mark.slow
def test_the_code(tmp_path: Path) -> None:
    done = typed.run_code("\n".join(typed.code("coming_from.md")), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
