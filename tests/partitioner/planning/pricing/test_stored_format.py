"""Weights and caches in fewer bits: bytes to the byte, and what products and attention take."""

import functools
import json
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from partitioner import Plan, partition
from partitioner.cli.app import app
from partitioner.compile.partition import compile_program
from partitioner.errors import InputError
from partitioner.planning.cluster import Cluster
from partitioner.planning.kernels import EXPANDING, Grouped, kernels_of
from partitioner.planning.pricing.price import Pricer
from partitioner.planning.pricing.stored_format import ITEM, StoredFormat
from partitioner.planning.quantities import Workload
from partitioner.planning.summary import Summary, summarize_program
from partitioner.storage.example import EXAMPLE_MODEL
from tests.support import zoo
from tests.support.partitioned import traced
from tests.supported_models import quantise

WORKLOAD = Workload(8, 4, 1)


@functools.cache
def summary(name: str) -> Summary:
    return summarize_program(traced(name)[1])


def matrices(found: Summary, *, experts_only: bool) -> float:
    """How many numbers the layers' matrices have, by the sizes of their products."""
    values, total = found.values(tp=1) | {found.batch: 1, found.sequence: 1}, 0.0
    for part in found.order:
        for node in found.parts[part].nodes["decode"]:
            if node.kind == "experts" or (node.kind == "linear" and not experts_only):
                held = values[next(each for each in values if str(each) == "experts")] if node.kind == "experts" else 1
                total += float((node.product[1] * node.product[2] * held).subs(values))
    return total


@pytest.mark.parametrize("name", ["llama", "mixtral"])
@pytest.mark.parametrize("experts_only", [False, True])
def test_weights_take_the_bits_that_are_said(name: str, experts_only: bool) -> None:
    found, where = summary(name), Cluster.parse("2xH100")
    stored = StoredFormat("four", found.dtype, 4.5, experts_only=experts_only)
    light, heavy = (Pricer(found, where, stored=each) for each in (stored, None))
    layers = light.even_stages(Plan())
    less = heavy.memory(Plan(), WORKLOAD, layers).weights - light.memory(Plan(), WORKLOAD, layers).weights
    assert less == pytest.approx(matrices(found, experts_only=experts_only) * (ITEM[found.dtype] - 4.5 / 8))
    assert (less > 0) is not (experts_only and name == "llama")


def test_steps_read_fewer_bytes_and_expanding_kernels_have_their_own_speed() -> None:
    found = summary("mixtral")
    where = Cluster.parse("H100")
    table = kernels_of("H100", 1e12, {"bfloat16": 1e15}, fitted="h100_sxm")
    assert table.measured("experts", EXPANDING)
    assert not table.measured("linear", EXPANDING)
    grouped = Grouped(rows=64, experts=8, hidden=4096, inner=1024, flops=1e9, num_bytes=1e9, dtype="bfloat16")
    times = [table.experts(grouped, table=each) for each in ("", EXPANDING)]
    assert times[0] != times[1]
    stored = StoredFormat("four", found.dtype, 4.5)
    plain, light = (Pricer(found, where, stored=each).price(Plan(), WORKLOAD).tpot_s for each in (None, stored))
    assert light < plain


@functools.cache
def quantised() -> tuple[Path, Any]:
    kept = tempfile.TemporaryDirectory()
    model, _ = zoo.tiny("llama", hidden_size=256, intermediate_size=768, num_attention_heads=4, num_key_value_heads=2)
    with tempfile.TemporaryDirectory() as plain:
        model.bfloat16().save_pretrained(plain)
        quantise.quantise(Path(plain), Path(kept.name), "fp8")
    return Path(kept.name), kept


@pytest.mark.parametrize("plan", [pytest.param("tp=1", marks=pytest.mark.slow), "tp=2"])
def test_bytes_are_those_that_ranks_hold_of_a_quantised_checkpoint(plan: str) -> None:
    folder, _ = quantised()
    program = partition(folder, Plan()).traced
    stored = StoredFormat.released("bfloat16", json.loads((folder / "config.json").read_text())["quantization_config"])
    found = summarize_program(program)
    parts = compile_program(program, replace(Plan.parse(plan), weights="stored"))
    held = [sum(weight.bytes for weight in parts.rank(rank).weights) for rank in range(parts.mesh.world_size)]
    pricer = Pricer(found, Cluster.parse("2xH100"), stored=stored)
    memory = pricer.memory(Plan.parse(plan), WORKLOAD, (found.num_layers,))
    assert memory.weights == pytest.approx(max(held), rel=0.05)  # beside them, whose scale is whose
    assert max(held) < 0.7 * found.num_bytes / Plan.parse(plan).tp
    assert pricer.num_bytes < found.num_bytes


def test_plan_and_fit_take_stored_weights() -> None:
    folder = str(quantised()[0])
    found = CliRunner().invoke(
        app, ["plan", folder, "--gpus", "H100", "--weights", "stored", "--json", "--prompt", "8"]
    )
    assert found.exit_code == 0, found.output
    told = json.loads(found.output)["plans"]
    assert all("weights=stored" in each["plan"] for each in told)
    plain = CliRunner().invoke(app, ["plan", folder, "--gpus", "H100", "--json", "--prompt", "8"])
    weights = {each["plan"]: each["memory_bytes"]["weights"] for each in json.loads(plain.output)["plans"]}
    for each in told:
        same = str(replace(Plan.parse(each["plan"]), weights="expanded"))
        assert each["memory_bytes"]["weights"] < weights[same]
    assert CliRunner().invoke(app, ["fit", folder, "--gpus", "H100", "--weights", "stored"]).exit_code == 0
    for wrong in (["plan", folder, "--gpus", "H100", "--weights", "half"],
                  ["plan", str(EXAMPLE_MODEL), "--gpus", "H100", "--weights", "stored"]):  # fmt: skip
        assert CliRunner().invoke(app, wrong).exit_code == 2


def test_a_cache_in_one_byte_is_as_much_smaller() -> None:
    found, where = summary("llama"), Cluster.parse("H100")
    plain, half = (Pricer(found, where, cache_dtype=kind) for kind in (None, "fp8"))
    many = Workload(4096, 4, 64)
    layers = plain.even_stages(Plan())
    kept = [each.memory(Plan(), many, layers).cache for each in (plain, half)]
    per_head = zoo.tiny("llama")[0].config.head_dim
    assert kept[1] / kept[0] == (per_head + 4) / (per_head * ITEM[found.dtype])  # a scale beside each head's codes
    assert half.price(Plan(), many).tpot_s < plain.price(Plan(), many).tpot_s
    with pytest.raises(InputError, match="'int3'"):
        Pricer(found, where, cache_dtype="int3")
