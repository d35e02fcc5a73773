"""Plan(weights="stored"): ranks hold codes and scales, and compute what they compute with the weights expanded."""

import functools
import json
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import partitioner
from partitioner import Plan, PlanError, partition
from partitioner.compile.partition import compile_program
from runtime.ops.kernels.stored.stored_linear import stored_grouped_linear, stored_linear, stored_weight
from runtime.weights.load_weights import load_weights
from tests.support import zoo
from tests.supported_models import quantise
from tests.supported_models.checkpoints import same_bits

IDS = torch.arange(2, 18).reshape(2, 8)
SIZES = {"qwen3_moe": {"moe_intermediate_size": 96}, "deepseek_v3": {"moe_intermediate_size": 96}}
slow = pytest.mark.slow


@functools.cache
def folder(name: str, form: str) -> tuple[Path, Any]:
    kept = tempfile.TemporaryDirectory()
    model, _ = zoo.tiny(name, **SIZES.get(name, {}))
    with tempfile.TemporaryDirectory() as plain:
        model.bfloat16().save_pretrained(plain)
        quantise.quantise(Path(plain), Path(kept.name), form)
    return Path(kept.name), kept


@functools.cache
def traced(name: str, form: str) -> Any:
    return partition(folder(name, form)[0], Plan()).traced


@pytest.mark.parametrize(
    ("name", "form", "plan", "op"),
    [
        pytest.param("llama", "fp8", "tp=2", stored_linear, marks=slow),
        ("llama", "fp8", "tp=3", stored_linear),
        ("llama", "fp8", "pp=2", stored_linear),
        ("llama", "gptq-ordered", "tp=3", stored_linear),
        pytest.param("llama", "awq", "tp=2", stored_linear, marks=slow),
        pytest.param("llama", "packed", "tp=3", stored_linear, marks=slow),
        pytest.param("llama", "fp8-channel", "tp=3", stored_linear, marks=slow),
        pytest.param("llama", "fp8-tensor", "tp=3", stored_linear, marks=slow),
        pytest.param("qwen3_moe", "fp8", "tp=3", stored_grouped_linear, marks=slow),
        ("qwen3_moe", "fp8", "ep=2,etp=2", stored_grouped_linear),
        pytest.param("gpt_oss", "mxfp4", "tp=3", stored_grouped_linear, marks=slow),
        pytest.param("gpt_oss", "mxfp4", "ep=2", stored_grouped_linear, marks=slow),
        pytest.param("deepseek_v3", "fp8", "tp=3", stored_linear, marks=slow),
    ],
)
def test_what_is_held_as_stored_computes_the_same_bits(name: str, form: str, plan: str, op: Any) -> None:
    """On a CPU, where each weight is rounded as it would be if it were held expanded. Cuts lie beside blocks of 32."""
    expanded = compile_program(traced(name, form), Plan.parse(plan))
    stored = compile_program(traced(name, form), replace(Plan.parse(plan), weights="stored"))
    assert same_bits(stored.simulate(input_ids=IDS), expanded.simulate(input_ids=IDS))
    for rank in range(stored.mesh.world_size):
        graph, program = stored.rank(rank).graph, stored.rank(rank)
        assert any(node.target is op for node in graph.nodes)
        assert not any(node.target is stored_weight for node in graph.nodes), "a weight is expanded whole"
        less = sum(weight.bytes for weight in program.weights)
        assert less < sum(weight.bytes for weight in expanded.rank(rank).weights)


def test_a_scale_of_a_neighbour_would_be_noticed() -> None:
    stored = compile_program(traced("llama", "fp8"), Plan(tp=2, weights="stored"))
    program = stored.rank(0)
    loaded = load_weights(program.weights, program.weight_data, program.source, torch.device("cpu"))
    tensors = {weight.name: tensor for weight, tensor in zip(program.weights, loaded, strict=True)}
    name = "model.layers.0.mlp.down_proj.weight"
    codes, scales, rows, columns = (tensors[f"{name}.{role}"] for role in ("codes", "scales", "rows", "columns"))
    right = stored_weight(
        codes, scales, None, rows, columns, code="float8", computed_in=torch.float32, dtype=torch.float32
    )
    wrong = stored_weight(
        codes, scales, None, rows, (columns + 1) % scales.shape[1], code="float8", computed_in=torch.float32,
        dtype=torch.float32,
    )  # fmt: skip
    assert scales.shape == (2, 2)
    assert columns.tolist() == [0] * 32 + [1] * 16, "48 inputs of blocks of 32: the second is shared with the next rank"
    assert not torch.equal(right, wrong)


def test_the_report_has_the_bytes_as_stored_and_expanded() -> None:
    stored = compile_program(traced("llama", "fp8"), Plan(tp=2, weights="stored"))
    expanded = compile_program(traced("llama", "fp8"), Plan(tp=2))
    held = tuple(sum(weight.bytes for weight in stored.rank(rank).weights) for rank in range(2))
    assert stored.report.stored_per_rank == held
    assert stored.report.bytes_per_rank == expanded.report.bytes_per_rank
    assert expanded.report.stored_per_rank == ()
    assert "held as stored: per rank 5" in str(stored.report)


def test_what_a_plan_says_of_weights() -> None:
    assert Plan.parse("tp=2,weights=stored") == Plan(tp=2, weights="stored")
    assert str(Plan(tp=2, weights="stored")) == "tp=2,weights=stored"
    assert repr(Plan(tp=2, weights="stored")) == "Plan(tp=2, weights='stored')"
    assert Plan() == Plan(weights="expanded")
    with pytest.raises(PlanError, match="weights must be one of expanded, stored; got 'packed'"):
        Plan(weights="packed")


def test_a_model_that_is_not_quantised_has_nothing_to_hold_as_stored() -> None:
    model, _ = zoo.tiny("llama")
    with pytest.raises(PlanError, match="weights='stored' is for weights that files hold quantised"):
        partition(model, Plan(weights="stored"))


@pytest.mark.parametrize("reference", [False, True])
def test_bundles_hold_what_is_stored(tmp_path: Path, reference: bool) -> None:
    quantised = folder("llama", "gptq-ordered")[0]
    parts = partition(quantised, Plan(tp=2, weights="stored"))
    parts.save(tmp_path / "bundle", reference=reference)
    bundle = partitioner.load(tmp_path / "bundle", checkpoint=quantised if reference else None)
    bundle.verify()
    assert same_bits(bundle.simulate(input_ids=IDS), parts.simulate(input_ids=IDS))
    if not reference:
        return
    path = next((tmp_path / "bundle" / "ranks").glob("0.json"))
    record = json.loads(path.read_text())
    assert {weight.get("held") for weight in record["weights"]} == {None, "codes", "zeros", "parts"}


@slow
def test_a_bundle_of_expanded_weights_is_split_anew_without_the_checkpoint(tmp_path: Path) -> None:
    quantised = folder("llama", "fp8")[0]
    partition(quantised, Plan(tp=2)).save(tmp_path / "bundle")
    again = partition(tmp_path / "bundle", Plan(tp=3)).simulate(input_ids=IDS)
    assert same_bits(again, compile_program(traced("llama", "fp8"), Plan(tp=3)).simulate(input_ids=IDS))
