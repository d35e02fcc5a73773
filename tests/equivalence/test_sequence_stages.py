"""Tokens shared out over sp, on pipeline stages: a rank hands on its own tokens, and its cache keeps its share."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import pytest
import torch

from partitioner import Parts, Plan, partition
from partitioner.compile.emit import emit
from partitioner.errors import BundleError, InputError, LayoutError, PartitionerError
from partitioner.program.stages import crossings
from partitioner.proof.layouts import check
from partitioner.sharding.layout import Layout, Rows, Split
from partitioner.sharding.mesh import Mesh
from partitioner.storage.bundle.bundle import load
from partitioner.storage.bundle.format.stage_format import read_stage, stage_data
from partitioner.storage.bundle.format.untrusted_json import Record
from runtime.engine.simulator import Simulator
from runtime.pipeline.chunks import chunk_ends
from runtime.pipeline.links import shape_of
from runtime.pipeline.message import message_bytes
from runtime.program.rank_program import Crossing, OwnRows, Stage
from tests.support import generated
from tests.support.partitioned import EXACT, compiled_for, error, tokens, traced

ZIGZAG = (OwnRows(1, ("sp",), "zigzag"),)


@functools.cache
def compiled(name: str, plan: str) -> Parts[Any]:
    return compiled_for(name, plan)


@pytest.mark.parametrize(
    ("name", "plan"),
    [
        pytest.param("llama", "pp=2,sp=2", marks=pytest.mark.slow),
        ("llama", "pp=2,sp=2,tp=2,sp_attention=ring"),
        pytest.param("gpt2", "pp=3,sp=2", marks=pytest.mark.slow),
        ("gemma2", "pp=2,sp=3,sp_attention=gather"),  # windows, a soft cap; more ranks than some texts have tokens
    ],
)
def test_texts_prompts_and_new_tokens(name: str, plan: str) -> None:
    parts = compiled(name, plan)
    for length, batch in ((1, 1), (2, 2), (7, 3), (12, 1)):
        assert error(name, parts, length, batch=batch) < EXACT
    assert generated.error(name, parts, generated.prompts(name, (1, 2, 5, 11)), new=5) < 1e-9
    assert generated.error(name, parts, generated.prompts(name, (3, 11)), new=3, prefill_step=4) < 1e-9


def test_a_long_prompt_goes_in_chunks_that_share_out_evenly() -> None:
    parts = compiled("llama", "pp=2,sp=2")
    assert generated.error("llama", parts, generated.prompts("llama", (201, 150)), new=2) < 1e-9
    for longest in (2, 7, 31, 64, 200):
        ends = chunk_ends(201, stages=4, longest=longest, pairs_per_token=50, multiple_of=3)
        assert ends[-1] == 201
        sizes = [end - start for start, end in zip([0, *ends], ends, strict=False)]
        assert max(sizes) <= longest
        assert longest < 3 or all(size % 3 == 0 for size in sizes[:-1])


def test_what_crosses_is_a_ranks_own() -> None:
    parts = compiled("llama", "pp=2,sp=2")
    (nodes,) = crossings(parts.program.graph, 2)
    assert all(node.meta["layout"].dims[1] == Rows(("sp",), "sequence", "zigzag") for node in nodes)
    stage = parts.entry("text", 0).stage
    assert stage is not None
    assert all(crossing.rows == ZIGZAG for crossing in stage.sends)
    assert [crossing.shape for crossing in stage.sends] == [("batch", "sequence", 64)] * len(stage.sends)
    # of a single token every rank has all
    decode = parts.entry("decode", 0).stage
    assert decode is not None
    assert all(not crossing.rows for crossing in decode.sends)


def test_how_much_comes_is_known_on_both_sides() -> None:
    mesh = Mesh.of(pp=2, sp=2, tp=2)
    crossing = Crossing("hidden", ("batch", "sequence", 3), torch.float32, ZIGZAG)
    nested = dataclasses.replace(crossing, rows=(*ZIGZAG, OwnRows(1, ("tp",), "blocks")))
    sizes = {"batch": 2, "sequence": 7}
    assert [shape_of(crossing, sizes, mesh, rank)[1] for rank in range(4)] == [4, 4, 3, 3]
    assert [shape_of(nested, sizes, mesh, rank)[1] for rank in range(8)] == [2, 2, 2, 1] * 2
    with pytest.raises(InputError, match="cannot go round a ring"):
        message_bytes((crossing,), 2)


def test_a_bundle_of_stages_knows_whose_tokens_cross(tmp_path: Any) -> None:
    parts = partition(traced("llama")[0], Plan(pp=2, sp=2))
    ids = tokens("llama", 9)
    parts.save(tmp_path / "bundle")
    loaded = load(tmp_path / "bundle")
    assert torch.equal(loaded.simulate(input_ids=ids), parts.simulate(input_ids=ids))
    assert torch.equal(loaded.generate(ids, max_new_tokens=4), parts.generate(ids, max_new_tokens=4))  # type: ignore[arg-type]
    assert loaded.entry("text", 0).stage == parts.entry("text", 0).stage


# -- what is refused, and negative controls ----------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [{"axes": ["pp"]}, {"axes": []}, {"dim": 2}, {"order": "any"}, {"axes": ["sp", "sp"]}])
def test_a_bundle_that_deals_out_what_it_cannot(rows: dict[str, Any]) -> None:
    stage = Stage(0, 2, (), (Crossing("hidden", ("batch", "sequence", 3), torch.float32, ZIGZAG),))
    data = stage_data(stage)
    assert read_stage(Record(data, "here"), {"pp": 0}) == stage
    data["sends"][0]["rows"][0] |= rows
    with pytest.raises(BundleError):
        read_stage(Record(data, "here"), {"pp": 0})


@pytest.mark.parametrize("layout", [Layout((None, None, None), frozenset({"tp"})), "split", "routed"])
def test_parts_of_other_kinds_do_not_cross(layout: Any) -> None:
    program = compiled("llama", "pp=2,sp=2,tp=2,sp_attention=ring").program.copy()
    check(program)
    (nodes,) = crossings(program.graph, 2)
    if layout == "split":
        layout = Layout((None, None, Split(("tp",), ())))
    elif layout == "routed":
        layout = Layout((None, Rows(("sp",), "routed"), None))
    nodes[0].meta["layout"] = layout
    with pytest.raises(LayoutError, match="cannot cross to another stage"):
        emit(program, {})


def test_stages_that_disagree_whose_tokens_cross_are_told() -> None:
    """A receiver that takes all tokens meets a sender of its own."""
    parts = compiled("llama", "pp=2,sp=2")
    ranks = [parts.entry("text", rank) for rank in range(4)]
    for rank in (2, 3):
        stage = ranks[rank].stage
        assert stage is not None
        whole = tuple(dataclasses.replace(crossing, rows=()) for crossing in stage.receives)
        ranks[rank] = dataclasses.replace(ranks[rank], stage=dataclasses.replace(stage, receives=whole))
    with pytest.raises(PartitionerError):
        Simulator(ranks)(input_ids=tokens("llama", 9))
