"""Bundles of quantised weights as stored, split anew without the checkpoint: the same codes, scales and numbers."""

from __future__ import annotations

import functools
import json
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import partitioner
from partitioner import BundleError, Plan, WeightError, partition
from partitioner.compile.partition import compile_program
from partitioner.program.ranks import Ranks
from runtime.ops.kernels.stored.codes import nibbles
from runtime.program.rank_program import RankProgram
from runtime.program.shards import WeightShard
from runtime.weights.load_weights import load_weights
from runtime.weights.read_shards import digest_of
from tests.support import zoo
from tests.support.bundle_forger import Forger
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


# -- bundles that were forged or damaged, hashes and all ---------------------------------------------------------------

DOWN = "model.layers.0.mlp.down_proj.weight"
Data = dict[str, Any]


def _weight(role: str, **fields: Any) -> Callable[[Data], None]:
    def change(data: Data) -> None:
        next(each for each in data["weights"] if each["name"] == f"{DOWN}.{role}").update(fields)

    return change


def _of(**fields: Any) -> Callable[[Data], None]:
    def change(data: Data) -> None:
        next(each for each in data["weights"] if each["name"] == f"{DOWN}.codes")["codes_of"].update(fields)

    return change


def _without(data: Data) -> None:
    del next(each for each in data["weights"] if each["name"] == f"{DOWN}.codes")["codes_of"]


def _not_of_its_program(data: Data) -> None:
    place = next(i for i, each in enumerate(data["weights"]) if each["name"] == f"{DOWN}.rows")
    for program in data["programs"].values():
        program["weights"].remove(place)


HOSTILE: dict[str, tuple[Callable[[Data], None], str]] = {
    "codes of nothing": (_without, r"does not say which part of which weight.*down_proj.weight.codes"),
    "codes of a vector": (_of(global_shape=[64], indices=[None]), "'global_shape' must be of a matrix"),
    "codes of numbers that are none": (_of(dtype="int32"), "'dtype' must be a dtype of floating-point"),
    "codes of another kind": (_of(code="int3"), "'code' must be one of float8, float4, int4"),
    "codes of another width": (_of(code="float8"), r"down_proj.weight.codes' is uint8.*required: float8_e4m3fn"),
    "codes the other way round": (_of(turned=True), r"down_proj.weight.codes' is uint8.*required: uint8 \[32, 32\]"),
    "codes that are turned if true": (_of(turned=1), "'turned' must be true or false"),
    "codes of more than there are": (_of(indices=[None, None]), r"down_proj.weight.codes' is uint8.*required: uint8"),
    "codes of a part of another shape": (_of(global_shape=[64, 10**9]), "in different forms or shapes"),
    "codes of another rank's part": (
        _of(indices=[None, [[0, 32]]]),
        r"two ranks name different scales.*down_proj|does not hold all of the weight 'model.layers.0.mlp.down_proj",
    ),
    "codes of beyond the end": (_of(indices=[None, [[90, 122]]]), "'indices' must be within the 96 indices of dim 1"),
    "codes with a field too many": (_of(hook="os.system"), "unknown field 'hook'"),
    "scales by other codes": (_weight("scales", codes_of={}), "'codes_of' must be given for codes only"),
    "scales of another part of the table": (
        _weight("scales", global_shape=[70, 3], indices=[[[6, 70]], None]),
        "zeros' is uint8.*required: the same part of the table as the scales",
    ),
    "no rows": (_not_of_its_program, r"down_proj.weight.rows|lacks its rows"),
}


@pytest.mark.parametrize("what", HOSTILE)
def test_a_forged_description_is_refused(what: str, tmp_path: Path) -> None:
    change, message = HOSTILE[what]
    folder = Path(shutil.copytree(bundle("llama", "gptq-ordered", "tp=3")[0], tmp_path / "bundle"))
    with Forger(folder).json("ranks/1.json") as data:
        change(data)
    with pytest.raises((BundleError, WeightError), match=message):
        partition(folder, Plan(tp=2, weights="stored")).rank(0)


@pytest.mark.parametrize(
    ("role", "number"),
    [
        ("rows", -1),
        ("columns", 1000),
        *(pytest.param(*case, marks=slow) for case in (("rows", 1000), ("columns", -1))),
    ],
)
def test_an_index_of_no_scale_is_refused(role: str, number: int, tmp_path: Path) -> None:
    """Before it is used: on a GPU, what lies there would be read."""
    folder = Path(shutil.copytree(bundle("llama", "gptq-ordered", "tp=3")[0], tmp_path / "bundle"))
    _forge(folder, f"{DOWN}.{role}", number)
    with pytest.raises(BundleError, match=rf"{DOWN}.{role}' names number {number} of the \d+ {role} of its scales"):
        partitioner.load(folder).verify()
    with pytest.raises(WeightError, match=rf"{DOWN}.{role}' names number {number} of the \d+ {role} of its scales"):
        partitioner.load(folder).simulate(input_ids=IDS)
    with pytest.raises(BundleError, match=rf"{DOWN}.{role}' names number {number} of the \d+ {role} of its scales"):
        partition(folder, Plan(tp=2))


def test_a_missing_file_of_codes_is_refused(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(bundle("llama", "gptq-ordered", "tp=3")[0], tmp_path / "bundle"))
    (folder / "weights/rank1-00000.safetensors").unlink()
    with pytest.raises(BundleError, match="rank1-00000"):
        partition(folder, Plan(tp=2))


def _forge(folder: Path, name: str, number: int) -> None:
    """The last of a rank's or everyone's indices becomes `number`, and its digest that of what is there now."""
    path = folder / "ranks/1.json"
    weight = next(each for each in json.loads(path.read_bytes())["weights"] if each["name"] == name)
    file = folder / weight["file"]
    held = load_file(file)
    held[weight["key"]][-1] = number
    digest = digest_of(held[weight["key"]])
    save_file(held, file)
    for rank in sorted((folder / "ranks").glob("*.json")):
        data = json.loads(rank.read_text())
        for each in data["weights"]:
            if each["key"] == weight["key"]:
                each["sha256"] = digest
        rank.write_text(json.dumps(data))
    Forger(folder).rehash()
