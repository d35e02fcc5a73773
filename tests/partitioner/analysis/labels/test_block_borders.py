"""Cuts at the borders of blocks of scales: which are chosen, and that the model stays what it was."""

from __future__ import annotations

import functools
import itertools
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from partitioner import Plan, partition
from partitioner.analysis.labels.assign_owners import even_sizes
from partitioner.analysis.labels.block_borders import Borders, ScaleBlocks, on_borders
from partitioner.compile.partition import compile_program
from partitioner.errors import PartitionerError
from partitioner.sharding.index_set import IndexSet
from tests.support import zoo
from tests.supported_models import quantise
from tests.supported_models.checkpoints import same_bits

slow = pytest.mark.slow


def of_blocks(count: int, *sizes: int) -> Borders:
    """Atoms of one index each, of weights in blocks of these sizes."""
    divided = tuple(sum(place % size > 0 for size in sizes) if 0 < place < count else 0 for place in range(count + 1))
    return Borders(divided, min(sizes), ("weight",))


def by_count(first: int, last: int) -> float:
    return last - first


@pytest.mark.parametrize(
    ("count", "ranks", "blocks", "expected"),
    [
        (14336, 3, (128,), [4864, 4736, 4736]),
        (14336, 5, (128,), [2944, 2816, 2944, 2816, 2816]),
        (14336, 5, (32, 32), [2880, 2880, 2848, 2880, 2848]),
        (1536, 8, (128,), [192] * 8),  # even parts stay
        (2048, 3, (128, 64), [683, 683, 682]),  # of the smaller blocks more than one would be needed
        (100, 3, (64,), [34, 33, 33]),  # fewer blocks than ranks
        (10, 4, (5,), [3, 2, 3, 2]),  # an equal choice, with one cut on a border
        (43, 2, (1,), [22, 21]),
    ],
)
def test_sizes(count: int, ranks: int, blocks: tuple[int, ...], expected: list[int]) -> None:
    assert on_borders(even_sizes(count, ranks), of_blocks(count, *blocks), by_count) == expected


@given(count=st.integers(2, 60), ranks=st.integers(2, 4), blocks=st.lists(st.integers(2, 9), min_size=1, max_size=2))
def test_cuts_are_moved_to_borders_and_no_further(count: int, ranks: int, blocks: list[int]) -> None:
    """Never more blocks are divided than by even sizes, no rank has more than the rule allows, and equal parts stay. Of
    one size of blocks none is divided where that is possible at all.
    """
    ranks = min(ranks, count)
    sizes, borders = even_sizes(count, ranks), of_blocks(count, *blocks)
    found = on_borders(sizes, borders, by_count)
    assert (sum(found), len(found), min(found) > 0) == (count, ranks, True)

    def price(sizes: list[int]) -> int:
        return sum(borders.divided[cut] for cut in itertools.accumulate(sizes[:-1]))

    if len(set(sizes)) == 1:
        assert found == sizes
        return
    assert price(found) <= price(sizes)
    assert max(found) <= max(sizes) + (0 if price(found) else min(blocks))
    if len(set(blocks)) == 1 and price(found):
        units = -(-count // blocks[0])
        assert units < ranks or -(-units // ranks) * blocks[0] > max(sizes) + blocks[0]


SIZES = {
    "llama": {"intermediate_size": 352},  # 11 blocks of 32
    "qwen3_moe": {"moe_intermediate_size": 160},
    "deepseek_v3": {"moe_intermediate_size": 160, "intermediate_size": 224},
    "gpt_oss": {"intermediate_size": 160},
}


@functools.cache
def traced(name: str, form: str) -> tuple[Any, Any]:
    """Of a quantised folder, with numbers of 64 bits."""
    kept = tempfile.TemporaryDirectory()
    model, _ = zoo.tiny(name, **SIZES[name])
    with tempfile.TemporaryDirectory() as plain:
        model.bfloat16().save_pretrained(plain)
        quantise.quantise(Path(plain), Path(kept.name), form)
    return partition(Path(kept.name), Plan(), dtype=torch.float64).traced, kept


def shared_scales(parts: Any, weight: str) -> set[int]:
    """The columns of the table of a weight's scales that more than one rank holds, of those with the same experts."""
    held: dict[Any, list[IndexSet]] = {}
    for rank in range(parts.mesh.world_size):
        program = parts.rank(rank)
        (scales,) = (found for found in program.weights if found.name == f"{weight}.scales")
        experts = parts.mesh.coordinates(rank).get("ep")
        held.setdefault(experts, []).append(scales.indices[1])
    pairs = (pair for each in held.values() for pair in itertools.combinations(each, 2))
    return {index for one, other in pairs for index in (one & other).indices()}


DOWN = {
    "llama": "model.layers.0.mlp.down_proj.weight",
    "qwen3_moe": "model.layers.1.mlp.experts.down_proj",
    "deepseek_v3": "model.layers.1.mlp.experts.down_proj",
    "gpt_oss": "model.layers.0.mlp.experts.down_proj",
}


@pytest.mark.parametrize(
    ("name", "form", "plan"),
    [
        ("llama", "fp8", "tp=3"),
        pytest.param("llama", "gptq", "tp=3", marks=slow),
        pytest.param("llama", "awq", "tp=5", marks=slow),
        pytest.param("llama", "packed", "tp=3", marks=slow),
        pytest.param("qwen3_moe", "fp8", "tp=3", marks=slow),
        pytest.param("qwen3_moe", "fp8", "ep=2,etp=3", marks=slow),
        pytest.param("deepseek_v3", "fp8", "tp=3", marks=slow),
        pytest.param("gpt_oss", "mxfp4", "tp=3", marks=slow),
    ],
)
def test_ranks_share_no_scale_and_compute_the_same(
    name: str, form: str, plan: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    program, _ = traced(name, form)
    ids = torch.arange(2, 18).reshape(2, 8)
    whole = compile_program(program, Plan()).simulate(input_ids=ids)
    given = Plan.parse(plan)
    expanded = compile_program(program, given)
    torch.testing.assert_close(expanded.simulate(input_ids=ids), whole, rtol=1e-10, atol=1e-10)
    stored = compile_program(program, replace(given, weights="stored"))
    assert same_bits(stored.simulate(input_ids=ids), expanded.simulate(input_ids=ids))
    notes = [note for note in stored.report.notes if "for the borders of blocks of scales" in note]
    assert any(DOWN[name].split(".")[-1] in note or "experts" in note for note in notes), stored.report.notes
    assert not shared_scales(stored, DOWN[name])

    monkeypatch.setattr(ScaleBlocks, "deal", lambda self, sizes, *others: sizes)  # as if nothing were known of blocks
    even = compile_program(program, replace(given, weights="stored"))
    assert shared_scales(even, DOWN[name])
    assert not [note for note in even.report.notes if "scales" in note]


def test_a_weight_that_is_cut_otherwise_than_those_cut_with_it_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    program, _ = traced("llama", "fp8")
    ids = torch.arange(2, 18).reshape(2, 8)
    right = compile_program(program, Plan(tp=3)).simulate(input_ids=ids)
    parts = compile_program(program, Plan(tp=3))
    layouts = parts.program.weight_layouts
    split = layouts[DOWN["llama"]].split(1)
    moved = replace(split, owned=tuple(IndexSet.range(*ends) for ends in ((0, 118), (118, 235), (235, 352))))
    layouts[DOWN["llama"]] = layouts[DOWN["llama"]].with_dim(1, moved)
    try:
        wrong = parts.simulate(input_ids=ids)
    except (PartitionerError, RuntimeError):
        return
    assert not torch.allclose(wrong, right)


@slow
def test_a_bundle_is_cut_where_its_checkpoint_would_be(tmp_path: Path) -> None:
    program, folder = traced("llama", "fp8")
    stored = Plan(tp=3, weights="stored")
    partition(folder.name, Plan(tp=2, weights="stored"), dtype=torch.float64).save(tmp_path / "saved")
    again, once = partition(tmp_path / "saved", stored), compile_program(program, stored)
    assert again.program.weight_layouts == once.program.weight_layouts
    assert not shared_scales(again, DOWN["llama"])
