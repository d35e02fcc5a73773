"""Heads exchanged by rows that are written where they belong: the same as by all-to-alls, and as on one rank."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from partitioner.sharding.mesh import Mesh
from runtime.ops.attention import attention
from runtime.ops.rows.row_moves import Move, loadable
from runtime.ops.rows.ulysses_in_place import InPlace
from tests.runtime.kv_cache.sharded_cases import on_one, on_sharded, text
from tests.runtime.ops.kernels.in_tritons_interpreter import assert_interpreted, needs_triton
from tests.runtime.ops.rows.sp_cases import Counting, drawn, over_ranks, tensors
from tests.runtime.ops.rows.written_rows import writing


@pytest.mark.parametrize("parts", [2, 3])
@pytest.mark.parametrize("size", [1, 5, 16])
@pytest.mark.parametrize(("heads", "kv"), [(4, 2), (5, 5), (6, 1), (1, 1)])
def test_it_is_the_whole(parts: int, size: int, heads: int, kv: int, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = writing(monkeypatch, parts)
    given = tensors(2, size, heads=heads, kv=kv, value=4)
    group = Counting(Mesh.of(sp=parts))
    found = over_ranks(given, parts, group=group, how="ulysses", scale=0.4, causal=True)
    torch.testing.assert_close(found, attention(*given, scale=0.4, causal=True), rtol=1e-12, atol=1e-12)
    assert sorted(asked) == list(range(parts))
    assert not any(kind == "all_to_all" for _, kind in group.met)  # nothing went the other way


def test_sinks_masks_and_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    writing(monkeypatch, 3)
    given, mask, sinks = tensors(1, 17), drawn(1, 4, 17, 17, seed=5), drawn(4, seed=6)
    found = over_ranks(given, 3, how="ulysses", order="blocks", mask=mask, sinks=sinks, scale=0.4)
    torch.testing.assert_close(found, attention(*given, mask, sinks, scale=0.4), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kv_map", [[0, 0, 0, 1], [0, 1, 0, 1]])
def test_heads_that_do_not_share_in_order(kv_map: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    writing(monkeypatch, 2)
    given = tensors(1, 9)
    found = over_ranks(given, 2, how="ulysses", kv_map=kv_map, scale=0.4, causal=True)
    torch.testing.assert_close(found, attention(*given, kv_map=kv_map, scale=0.4, causal=True), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("parts", [2, 3])
def test_behind_what_is_kept(parts: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pieces of a prompt; in blocks, where ranks have kept unlike numbers of tokens, too."""
    asked = writing(monkeypatch, parts)
    runs = text((23,), 8, 0)
    expected = on_one(runs, 1)
    for order in ("zigzag", "blocks"):
        found, _ = on_sharded(runs, 1, parts, "ulysses", order=order)
        for of_run, one in zip(found, expected, strict=True):
            torch.testing.assert_close(of_run, one, rtol=1e-12, atol=1e-12)
    assert len(asked) > 2 * parts  # some behind a past, though queries travel where they are less


@pytest.mark.parametrize("name", ["there", "back"])
def test_the_second_run_of_a_rank_is_not_behind_the_first(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The control: moves as if a rank's tokens were one run."""
    original = getattr(InPlace, name)

    def changed(self: InPlace, *where: int) -> list[Move]:
        return [dataclasses.replace(move, cut=move.rows) for move in original(self, *where)]

    monkeypatch.setattr(InPlace, name, changed)
    writing(monkeypatch, 2)
    given = tensors(1, 12)
    found = over_ranks(given, 2, how="ulysses", scale=0.4, causal=True)
    assert not torch.allclose(found, attention(*given, scale=0.4, causal=True), rtol=1e-3)


def test_too_little_memory_goes_the_other_way(monkeypatch: pytest.MonkeyPatch) -> None:
    writing(monkeypatch, 2, most=64)
    given, group = tensors(1, 12), Counting(Mesh.of(sp=2))
    found = over_ranks(given, 2, group=group, how="ulysses", scale=0.4, causal=True)
    torch.testing.assert_close(found, attention(*given, scale=0.4, causal=True), rtol=1e-12, atol=1e-12)
    assert group.met[0, "all_to_all"] == 2


def test_rows_that_loads_cannot_take_are_copied() -> None:
    x = drawn(1, 2, 9, 8, dtype=torch.bfloat16)
    assert loadable(x) is x
    for other in (x[:, :, :, 1:], x.transpose(2, 3)[:, :, :, :8], x.view(-1)[4:132].view(1, 2, 8, 8)):
        found = loadable(other)
        assert found is not other
        assert torch.equal(found, other)
        assert found.data_ptr() % 16 == 0


INTERPRETED = """
import torch
from runtime.communication.peer_memory.rows.push_rows_kernel import FIELDS, write_rows
from runtime.ops.rows.row_moves import loadable
from runtime.ops.rows.token_order import TokenOrder
from runtime.ops.rows.ulysses_in_place import InPlace
from tests.runtime.ops.rows.written_rows import put_rows

ranks, past = 2, (3, 5)
order = TokenOrder.of(75, ranks)
where = InPlace(order, ((0, 2), (2, 5)), ((0,), (0, 1)), past, 2, 8, 24, 2)
memories = [torch.zeros(sum(where.areas), dtype=torch.uint8) for _ in range(ranks)]
wanted = [each.clone() for each in memories]
starts = torch.tensor([each.data_ptr() for each in memories])
for rank in range(ranks):
    shapes = [(5, order.counts[rank], 8), *[(2, past[rank] + order.counts[rank], width) for width in (8, 24)]]
    there = [torch.randn(2, *shape).to(torch.bfloat16) for shape in shapes]
    out = torch.randn(2, 75, where.count(rank), 24).to(torch.bfloat16).transpose(1, 2)
    for moves, sources in ((where.there(rank), there), (where.back(rank, where.areas[0]), [out])):
        is_back = len(sources) == 1
        table = torch.tensor([each.fields() for each in moves])
        results = [torch.zeros(2, order.counts[rank], 5, 24, dtype=torch.bfloat16) for _ in range(2)]
        put_rows(table, sources, 75, wanted, own=results[0] if is_back else None, rank=rank)
        given = []
        for x in (*sources, *[sources[-1]] * (3 - len(sources))):
            given += [x.data_ptr(), *(stride * 2 for stride in x.stride()[:3])]
        items = len(table) * 2 * 2
        own = (results[1] if is_back else memories[rank]).data_ptr()
        write_rows[(5,)](
            table, starts, own, *given, items, 2, 2, RANK=rank, FIELDS=FIELDS, WORDS=16, ROWS=64,
        )
        assert torch.equal(*results) and results[0].any() == is_back
assert all(torch.equal(*each) for each in zip(memories, wanted))
assert all(each.any() for each in wanted)
"""


@pytest.mark.slow
@needs_triton
def test_the_kernel_is_the_plain_form_in_tritons_interpreter() -> None:
    assert_interpreted(INTERPRETED)
