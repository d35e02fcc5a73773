"""Stages on the command line: degrees in every spelling, the picture of a schedule, bundles of stages."""

from __future__ import annotations

import json
import xml.etree.ElementTree
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import partitioner
from partitioner import Plan, partition
from partitioner.cli.actions.verify import verify
from partitioner.cli.app import app
from partitioner.cli.jobs.compile import Compile
from partitioner.cli.jobs.verify import Case
from partitioner.errors import InputError
from tests.support import zoo


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("model") / "tiny.json"
    path.write_text(json.dumps(zoo.tiny("llama")[0].config.to_dict(), default=str))
    return f"config:{path}"


def said(*arguments: str) -> str:
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    return result.output


@pytest.mark.parametrize("option", ["--pp", "--pipeline-parallel-size", "--pipeline_parallel_size"])
def test_a_report_says_what_each_stage_has(config: str, option: str) -> None:
    found = said("report", config, option, "2")
    assert "stages, cut for decode" in found
    assert "  1: model.layers." in found


@pytest.mark.parametrize("option", ["--dp", "--data-parallel-size", "--data_parallel_size"])
def test_a_report_says_how_many_replicas_there_are(config: str, option: str) -> None:
    found = said("report", config, option, "3", "--tensor_parallel_size", "2")
    assert (
        "replicas: 3, each with ranks and weights as above; they share out requests, of which none is faster" in found
    )
    assert "Plan(dp=3, tp=2)" in found
    assert "replicas:" not in said("report", config, "--tp", "2")


def test_a_report_says_that_one_request_is_no_faster_over_stages(config: str) -> None:
    assert "a single sequence is no faster for it" in said("report", config, "--pp", "2")


def test_verify_runs_every_replica(config: str) -> None:
    case = Case(config, Compile(dp=2, pp=2), ("float64",), (5,))
    assert all(outcome.equal for outcome in verify(case))


def test_the_picture_of_a_schedule(config: str, tmp_path: Path) -> None:
    out = tmp_path / "timeline.svg"
    found = said("schedule", config, "--plan", "pp=2", "--microbatches", "4", "-o", str(out))
    assert "4 pieces in a chain: idle" in found
    xml.etree.ElementTree.parse(out)
    refused = CliRunner().invoke(app, ["schedule", config, "--tp", "2"])
    assert refused.exit_code == 2


def test_two_degrees_that_differ_are_refused() -> None:
    with pytest.raises(InputError, match="--pp 3 and --plan 'pp=2' disagree"):
        Compile(text="pp=2", pp=3).plan  # noqa: B018
    assert Compile(pp=3, tp=2).plan == Plan(pp=3, tp=2)
    assert Compile(ep=4, tp=2).plan == Plan(ep=4, tp=2)
    assert Compile(ep=2, text="ep=2,expert-parallel").plan == Plan(ep=2, passes=["expert-parallel"])


def test_verify_compares_what_the_last_stage_has(config: str) -> None:
    for outcome in verify(Case(config, Compile(pp=2), ("float64",), (5,))):
        assert outcome.equal
        assert outcome.error >= 0


def test_a_bundle_of_stages_is_loaded_and_continues_texts(tmp_path: Path) -> None:
    model: Any = zoo.tiny("llama")[0]
    parts = partition(model, Plan(pp=2))
    parts.save(tmp_path / "bundle")
    bundle = partitioner.load(tmp_path / "bundle")
    bundle.verify()
    ids = torch.tensor([[3, 4, 5], [6, 7, 8], [9, 10, 11]])
    assert torch.equal(bundle.simulate(input_ids=ids), parts.simulate(input_ids=ids))
    texts = [[3, 4, 5], [6, 7]]
    assert torch.equal(bundle.generate(texts, max_new_tokens=4), parts.generate(texts, max_new_tokens=4))
    asked = Compile(dp=3).plan_of(str(tmp_path / "bundle"))
    assert (asked.replicas, asked.replica_mesh) == (3, bundle.mesh), "a bundle runs in any number of replicas"
    again = partition(tmp_path / "bundle", Plan(pp=3))
    torch.testing.assert_close(again.simulate(input_ids=ids), parts.simulate(input_ids=ids), rtol=1e-9, atol=1e-9)


def test_a_bundle_of_replicas_holds_one(tmp_path: Path) -> None:
    model: Any = zoo.tiny("llama")[0]
    partition(model, Plan(dp=3, pp=2)).save(tmp_path / "bundle")
    bundle = partitioner.load(tmp_path / "bundle")
    bundle.verify()
    assert (bundle.replicas, bundle.mesh.world_size) == (3, 2)
    assert len(list((tmp_path / "bundle" / "ranks").iterdir())) == 2
    texts = [[3, 4, 5], [6, 7], [8]]
    assert torch.equal(
        bundle.generate(texts, max_new_tokens=3), partition(model, Plan()).generate(texts, max_new_tokens=3)
    )
    assert ", 3 replicas of them" in said("show", str(tmp_path / "bundle"))


def test_replicas_on_the_command_line() -> None:
    arguments = ["--prompt", "Return a list of", "--prompt", "def f", "--max-new-tokens", "6"]
    runs = [CliRunner().invoke(app, ["run", *arguments, "--simulate", *more]) for more in ([], ["--dp", "2"])]
    assert [run.exit_code for run in runs] == [0, 0]
    one, two = (run.stdout for run in runs)
    assert "def f" in one
    assert one == two
    refused = CliRunner().invoke(app, ["run", *arguments, "--dp", "2", "--profile", "trace.json"])
    assert refused.exit_code == 2
    assert "--profile is for one replica" in refused.output
