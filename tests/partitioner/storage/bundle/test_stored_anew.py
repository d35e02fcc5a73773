"""Bundles of quantised weights as stored, split anew without the checkpoint: the same codes, scales and numbers."""

from __future__ import annotations

import functools
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import partitioner
from partitioner import Plan, partition
from partitioner.compile.partition import compile_program
from partitioner.program.ranks import Ranks
from runtime.ops.kernels.codes import nibbles
from runtime.program.rank_program import RankProgram
from runtime.program.shards import WeightShard
from runtime.weights.load_weights import load_weights
from tests.support import zoo
from tests.supported_models import quantise
from tests.supported_models.checkpoints import same_bits

IDS = torch.arange(2, 18).reshape(2, 8)
SIZES = {"qwen3_moe": {"moe_intermediate_size": 96}, "deepseek_v3": {"moe_intermediate_size": 96}}
slow = pytest.mark.slow
Roles = dict[str, Tensor]


@functools.cache
def original(name: str, form: str) -> tuple[Any, Any]:
    """A program of the checkpoint, and the folder that keeps that."""
    kept = tempfile.TemporaryDirectory()
    model, _ = zoo.tiny(name, **SIZES.get(name, {}))
    with tempfile.TemporaryDirectory() as plain:
        model.bfloat16().save_pretrained(plain)
        quantise.quantise(Path(plain), Path(kept.name), form)
    return partition(kept.name, Plan()), kept


def from_checkpoint(name: str, form: str, plan: Plan) -> Any:
    return compile_program(original(name, form)[0].traced, plan)


@functools.cache
def bundle(name: str, form: str, plan: str) -> tuple[Path, Any]:
    kept = tempfile.TemporaryDirectory()
    checkpoint = original(name, form)[1].name
    partition(checkpoint, replace(Plan.parse(plan), weights="stored")).save(Path(kept.name, "bundle"))
    return Path(kept.name, "bundle"), kept


def tensors(program: RankProgram) -> dict[str, tuple[WeightShard, Tensor]]:
    loaded = load_weights(program.weights, program.weight_data, program.source, torch.device("cpu"))
    return {shard.name: (shard, tensor) for shard, tensor in zip(program.weights, loaded, strict=True)}


def stored(found: dict[str, tuple[WeightShard, Tensor]]) -> dict[str, tuple[WeightShard, Roles]]:
    names = {shard.codes_of.weight.name for shard, _ in found.values() if shard.codes_of is not None}
    roles = ("codes", "scales", "zeros", "rows", "columns")
    return {
        name: (
            found[f"{name}.codes"][0],
            {role: found[f"{name}.{role}"][1] for role in roles if f"{name}.{role}" in found},
        )
        for name in names
    }


def meaning(shard: WeightShard, parts: Roles) -> tuple[Tensor, ...]:
    """Codes, and the scale and zero of each: what is stored, whatever place it has in a table."""
    of = shard.codes_of
    assert of is not None
    count = parts["columns"].shape[0]
    codes = parts["codes"] if of.code == "float8" else nibbles(parts["codes"], 0, count)
    place = parts["rows"].long()[..., None], parts["columns"].long()
    return (codes, *(parts[role][place] for role in ("scales", "zeros") if role in parts))


def number_of(ranks: Ranks) -> int:
    return ranks.mesh.world_size


CASES = [
    ("llama", "gptq-ordered", "tp=3", "tp=2"),
    pytest.param("llama", "fp8", "tp=2", "tp=3", marks=slow),
    pytest.param("llama", "fp8", "tp=3", "pp=2", marks=slow),
    pytest.param("llama", "fp8", "pp=2", "tp=3", marks=slow),
    pytest.param("llama", "awq", "tp=2", "tp=3", marks=slow),
    pytest.param("llama", "awq", "tp=3", "tp=1", marks=slow),
    pytest.param("llama", "gptq-ordered", "tp=2", "tp=2,pp=2", marks=slow),
    pytest.param("llama", "packed", "tp=3", "tp=2", marks=slow),
    pytest.param("llama", "fp8-channel", "tp=2", "tp=3", marks=slow),
    pytest.param("llama", "fp8-tensor", "tp=3", "tp=2", marks=slow),
    pytest.param("gpt_oss", "mxfp4", "ep=2", "tp=3", marks=slow),
    pytest.param("gpt_oss", "mxfp4", "tp=3", "ep=2", marks=slow),
    pytest.param("qwen3_moe", "fp8", "ep=2,etp=2", "tp=3", marks=slow),
    pytest.param("qwen3_moe", "fp8", "tp=3", "ep=2", marks=slow),
    pytest.param("deepseek_v3", "fp8", "tp=3", "tp=2", marks=slow),
]


@pytest.mark.parametrize(("name", "form", "was", "plan"), CASES)
def test_what_is_stored_stays_as_it_is(name: str, form: str, was: str, plan: str) -> None:
    wanted = replace(Plan.parse(plan), weights="stored")
    anew, direct = partition(bundle(name, form, was)[0], wanted), from_checkpoint(name, form, wanted)
    compared = 0
    for rank in range(number_of(direct)):
        loaded, required = tensors(anew.rank(rank)), tensors(direct.rank(rank))
        assert list(loaded) == list(required)
        mine, theirs = stored(loaded), stored(required)
        assert mine.keys() == theirs.keys()
        for each in theirs:
            (shard, found), (other, expected) = mine[each], theirs[each]
            assert shard.codes_of == other.codes_of
            assert same_bits(found["codes"], expected["codes"])
            for got, meant in zip(meaning(shard, found), meaning(other, expected), strict=True):
                assert same_bits(got, meant)
            assert found["scales"].numel() <= expected["scales"].numel(), "a scale is held twice"
            compared += 1
        inside = {f"{each}.{role}" for each in theirs for role in ("codes", "scales", "zeros", "rows", "columns")}
        assert all(same_bits(loaded[key][1], required[key][1]) for key in required.keys() - inside)
    assert compared
    assert same_bits(anew.simulate(input_ids=IDS), direct.simulate(input_ids=IDS))


@pytest.mark.parametrize(("name", "form", "was", "plan"), CASES)
def test_it_is_expanded_to_the_numbers_of_the_checkpoint(name: str, form: str, was: str, plan: str) -> None:
    anew, direct = (
        partition(bundle(name, form, was)[0], Plan.parse(plan)),
        from_checkpoint(name, form, Plan.parse(plan)),
    )
    for rank in range(number_of(direct)):
        loaded, required = tensors(anew.rank(rank)), tensors(direct.rank(rank))
        assert list(loaded) == list(required)
        assert all(same_bits(loaded[key][1], required[key][1]) for key in required)


@pytest.mark.parametrize("role", ["codes", "scales", "columns"])
def test_what_is_not_as_stored_would_be_noticed(role: str) -> None:
    """The comparison above tells a code or a scale that is another, and inputs that have their neighbours' scales."""
    program = partition(bundle("llama", "gptq-ordered", "tp=3")[0], Plan(tp=2, weights="stored")).rank(0)
    shard, parts = stored(tensors(program))["model.layers.0.mlp.down_proj.weight"]
    other = parts[role].clone()
    if role == "columns":
        other = other.flip(0)
    else:
        other.view(-1)[0] += 1
    right, wrong = meaning(shard, parts), meaning(shard, parts | {role: other})
    assert not all(same_bits(mine, theirs) for mine, theirs in zip(right, wrong, strict=True))


@slow
def test_it_is_split_anew_again_and_again(tmp_path: Path) -> None:
    """Codes of four bits whose parts begin within a byte, through three bundles."""
    folder = bundle("llama", "awq", "tp=2")[0]
    for number, tp in enumerate((3, 1, 2)):
        partition(folder, Plan(tp=tp, weights="stored")).save(tmp_path / str(number))
        folder = tmp_path / str(number)
    again, first = partitioner.load(folder), partitioner.load(bundle("llama", "awq", "tp=2")[0])
    again.verify()
    for rank in range(2):
        mine, theirs = stored(tensors(again.rank(rank))), stored(tensors(first.rank(rank)))
        assert mine.keys() == theirs.keys()
        for each in theirs:
            (shard, found), (other, expected) = mine[each], theirs[each]
            assert shard.codes_of == other.codes_of
            assert all(same_bits(found[role], expected[role]) for role in expected)
