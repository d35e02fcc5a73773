"""Attention whose tokens ranks share out: whatever travels, the same as on one rank."""

from __future__ import annotations

import itertools
import threading
from typing import Any

import pytest
import torch
from torch import Tensor

from partitioner.errors import CommunicationError
from partitioner.sharding.mesh import Mesh
from runtime.communication.channels import Handle
from runtime.communication.thread_communicator import ThreadChannel
from runtime.ops.attention import attention
from runtime.ops.rows.attend_runs import Block, RankQueries, few_parts
from runtime.ops.rows.token_order import TokenOrder
from tests.runtime.ops.rows.sp_cases import Counting, drawn, over_ranks, tensors

HOWS = ("ring", "gather", "ulysses")

OPTIONS: dict[str, dict[str, Any]] = {
    "causal": {"causal": True},
    "all": {},
    "window": {"causal": True, "window": 4},
    "window of one": {"causal": True, "window": 1},
    "window both ways": {"window": 3},
    "chunk": {"causal": True, "chunk": 5},
    "softcap": {"causal": True, "softcap": 2.0},
    "softcap, window": {"causal": True, "softcap": 2.0, "window": 6},
}


def check(given: list[Tensor], parts: int, how: str, **options: Any) -> None:
    order, mask, sinks = (
        options.pop(name, default) for name, default in (("order", "zigzag"), ("mask", None), ("sinks", None))
    )
    only = {"neighbours": options.pop("neighbours")} if "neighbours" in options else {}
    expected = attention(*given, mask, sinks, scale=0.4, **options)
    found = over_ranks(given, parts, how=how, order=order, mask=mask, sinks=sinks, scale=0.4, **only, **options)
    assert found.dtype == expected.dtype
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("how", HOWS)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_options(how: str, options: dict[str, Any]) -> None:
    check(tensors(2, 23), 3, how, **options)


@pytest.mark.parametrize("how", HOWS)
@pytest.mark.parametrize("parts", [1, 2, 3, 4])
@pytest.mark.parametrize("size", [1, 2, 3, 5, 16, 17, 40])
def test_sizes(how: str, parts: int, size: int) -> None:
    """One token, fewer than ranks, odd ones."""
    for batch in (1, 3):
        check(tensors(batch, size), parts, how, causal=True)
    check(tensors(1, size), parts, how, causal=True, window=3, order="blocks")


@pytest.mark.parametrize("how", HOWS)
@pytest.mark.parametrize(
    ("heads", "kv", "kv_map"),
    [(4, 4, None), (4, 1, None), (5, 2, [0, 0, 0, 1, 1]), (1, 1, None), (7, 3, [0, 2, 1, 1, 0, 2, 2]), (0, 1, None)],
)
def test_heads(how: str, heads: int, kv: int, kv_map: list[int] | None) -> None:
    """Each its own keys, all the same, uneven shares, fewer heads than ranks, and none."""
    check(tensors(2, 11, heads=heads, kv=kv), 3, how, causal=True, kv_map=kv_map)


@pytest.mark.parametrize("how", HOWS)
@pytest.mark.parametrize(("width", "value"), [(6, 4), (4, 6)])
def test_values_of_another_width(how: str, width: int, value: int) -> None:
    check(tensors(2, 13, width=width, value=value), 3, how, causal=True)
    check(tensors(2, 13, width=width, value=value), 3, how, causal=True, softcap=1.5, window=5)


@pytest.mark.parametrize("how", HOWS)
@pytest.mark.parametrize("shape", [(13, 13), (2, 1, 13, 13), (1, 4, 13, 13), (2, 4, 1, 13), (1, 13), (2, 1, 13, 1)])
def test_masks(how: str, shape: tuple[int, ...]) -> None:
    mask = drawn(*shape, seed=9)
    if shape[-1] == 13:
        mask[..., 3] = -torch.inf
    for options in ({}, {"causal": True}, {"causal": True, "window": 6}, {"softcap": 2.0}):
        check(tensors(2, 13), 3, how, mask=mask, **options)


@pytest.mark.parametrize("how", HOWS)
@pytest.mark.parametrize("shape", [(4,), (1, 4, 1, 1), (2, 4, 1, 1)])
def test_sinks(how: str, shape: tuple[int, ...]) -> None:
    given, sinks = tensors(2, 13), drawn(*shape, seed=9)
    for options in ({"causal": True}, {"causal": True, "window": 3}):
        check(given, 3, how, sinks=sinks, **options)
    # the control: sinks do count
    assert not torch.allclose(
        over_ranks(given, 3, how=how, scale=0.4, causal=True), attention(*given, sinks=sinks, scale=0.4, causal=True)
    )


@pytest.mark.parametrize("how", HOWS)
def test_long_runs_behind_masks_of_a_tile(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("runtime.ops.rows.attend_runs._TILE", 4)
    for options in ({"window": 7}, {"chunk": 9}, {"window": 7, "mask": drawn(70, 70)}):
        check(tensors(1, 70), 3, how, causal=True, **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("how", HOWS)
def test_other_dtypes(how: str, dtype: torch.dtype) -> None:
    given = tensors(2, 23, dtype=dtype)
    found = over_ranks(given, 3, how=how, causal=True, scale=0.4)
    expected = attention(*(x.double() for x in given), scale=0.4, causal=True)
    assert found.dtype == dtype
    assert (found.double() - expected).abs().max() < (1e-5 if dtype == torch.float32 else 2e-2)


@pytest.mark.parametrize("how", HOWS)
def test_another_order_of_tokens_is_not_the_same(how: str) -> None:
    """The control: what is dealt out in blocks and taken for zig-zag order sees other keys."""
    given = tensors(1, 24)
    shuffled = [
        torch.cat([x[:, :, start:stop] for runs in TokenOrder.of(24, 3).runs for start, stop in runs], 2) for x in given
    ]
    found = over_ranks(shuffled, 3, how=how, causal=True, scale=0.4, order="blocks")
    wrong = torch.cat([found[:, :, start:stop] for start, stop in TokenOrder.of(24, 3).joined], 2)
    assert not torch.allclose(wrong, attention(*given, scale=0.4, causal=True))


@pytest.mark.parametrize("parts", [2, 3, 4])
def test_bytes_of_a_ring(parts: int) -> None:
    batch, kv, width, value, size = 2, 2, 6, 4, 8 * parts
    given = tensors(batch, size, width=width, value=value)
    local = batch * kv * (size // parts) * (width + value) * 8  # keys and values of one rank
    group = Counting(Mesh.of(sp=parts))
    over_ranks(given, parts, how="ring", causal=True, scale=0.4, group=group)
    assert group.sent == {(rank, "permute"): (parts - 1) * local for rank in range(parts)}
    assert set(group.met.values()) == {parts - 1}
    for options in ({"window": 2}, {"chunk": 3}):
        limited = Counting(Mesh.of(sp=parts))
        over_ranks(given, parts, how="ring", causal=True, scale=0.4, group=limited, **options)
        assert set(limited.met.values()) == {parts - 1}
        assert all(sent < 0.7 * (parts - 1) * local for sent in limited.sent.values())
    # no row is sent twice, and none is missing: as many as a gather brings
    gathering = Counting(Mesh.of(sp=parts))
    over_ranks(given, parts, how="gather", causal=True, scale=0.4, group=gathering)
    assert gathering.sent == {(rank, "all_gather"): (parts - 1) * local for rank in range(parts)}


@pytest.mark.parametrize(("parts", "kv"), [(2, 2), (4, 4), (4, 2)])
def test_bytes_of_ulysses(parts: int, kv: int) -> None:
    batch, heads, width, value, size = 2, 8, 6, 4, 8 * parts
    group = Counting(Mesh.of(sp=parts))
    over_ranks(
        tensors(batch, size, heads=heads, kv=kv, width=width, value=value), parts, how="ulysses", scale=0.4, group=group
    )
    rows = batch * size // parts * 8
    kv_sent = max(kv / parts, 1) * parts  # one that several ranks need goes to each
    formula = (parts - 1) / parts * rows * (heads * (width + value) + kv_sent * (width + value))
    assert group.sent == {(rank, "all_to_all"): formula for rank in range(parts)}


@pytest.mark.parametrize("options", [{}, {"window": 3}])
def test_the_next_block_is_under_way_before_one_is_attended_to(
    options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    events: dict[int, list[str]] = {}
    permute, attend = ThreadChannel.permute_begin, RankQueries.add

    def begin(self: ThreadChannel, x: Tensor, shift: int) -> Handle:
        events.setdefault(threading.get_ident(), []).append("begin")
        return permute(self, x, shift)

    def add(self: RankQueries, block: Block) -> None:
        events.setdefault(threading.get_ident(), []).append("attend")
        attend(self, block)

    monkeypatch.setattr(ThreadChannel, "permute_begin", begin)
    monkeypatch.setattr(RankQueries, "add", add)
    over_ranks(tensors(1, 18), 3, how="ring", causal=True, scale=0.4, **options)
    assert [*events.values()] == [["begin", "attend", "begin", "attend", "attend"]] * 3


@pytest.mark.parametrize(("parts", "neighbours"), [(4, 2), (6, 2), (6, 3), (4, 4), (3, 1)])
@pytest.mark.parametrize("order", ["zigzag", "blocks"])
def test_a_ring_of_groups_that_exchange_heads(parts: int, neighbours: int, order: str) -> None:
    shared: dict[str, Any] = {"neighbours": neighbours, "order": order}
    for size in (1, 5, 23, 48):
        check(tensors(2, size), parts, "ring-ulysses", causal=True, **shared)
    check(tensors(1, 23, heads=5, kv=3), parts, "ring-ulysses", causal=True, kv_map=[0, 2, 1, 1, 0], **shared)
    for options in ({}, {"causal": True, "window": 5, "sinks": drawn(4)}, {"causal": True, "softcap": 2.0, "chunk": 7}):
        check(tensors(2, 29), parts, "ring-ulysses", **options, **shared)


def test_bytes_of_a_ring_of_groups() -> None:
    """Ulysses of 2 neighbours, and a ring of 3 with half the heads and twice the tokens."""
    batch, heads, kv, width, value, size = 2, 8, 4, 6, 4, 48
    group, rows = Counting(Mesh.of(sp=6)), 2 * 8 * 8
    given = tensors(batch, size, heads=heads, kv=kv, width=width, value=value)
    over_ranks(given, 6, how="ring-ulysses", neighbours=2, causal=True, scale=0.4, group=group)
    exchanged = rows * (heads * (width + value) + kv * (width + value)) // 2
    ring = 2 * rows * kv * (width + value)
    for rank in range(6):
        assert (group.sent[rank, "all_to_all"], group.sent[rank, "permute"]) == (exchanged, ring)
        assert (group.met[rank, "all_to_all"], group.met[rank, "permute"]) == (2, 2)
    with pytest.raises(CommunicationError, match="between 4 ranks, which must divide the 6"):
        over_ranks(given, 6, how="ring-ulysses", neighbours=4, scale=0.4)
    with pytest.raises(CommunicationError, match="has a mask, which ring-ulysses does not take"):
        over_ranks(given, 6, how="ring-ulysses", neighbours=2, scale=0.4, mask=drawn(1, size))


def test_what_does_not_fit_is_refused() -> None:
    given = tensors(1, 8)
    with pytest.raises(CommunicationError, match="not by 'merge'"):
        over_ranks(given, 2, how="merge", scale=0.4)
    given[1] = given[1][:, :, :6]
    with pytest.raises(CommunicationError, match="must bring 4; its queries are"):
        over_ranks(given, 2, how="ring", scale=0.4)
    with pytest.raises(CommunicationError, match="these are"):
        over_ranks(tensors(1, 8), 2, how="ulysses", scale=0.4, sinks=drawn(1, 4, 8, 1))


@pytest.mark.parametrize("causal", [True, False])
def test_few_parts_are_what_is_seen(causal: bool) -> None:
    """Every pair that a query sees once, and no other; also behind what is kept of earlier tokens."""
    for total, parts, past in itertools.product((1, 2, 5, 24), (1, 2, 3, 4), (0, 7)):
        order = TokenOrder.of(total, parts)
        runs = [tuple((first + past, last + past) for first, last in each) for each in order.runs]
        for own, source in itertools.product(range(parts), range(parts)):
            keys = ((0, past), *runs[source]) if past else runs[source]
            at = [
                torch.tensor([p for run in each for p in range(*run)], dtype=torch.long) for each in (runs[own], keys)
            ]
            expected = at[1] <= at[0][:, None] if causal else torch.ones(len(at[0]), len(at[1]), dtype=torch.bool)
            found, few = torch.zeros(expected.shape), few_parts(runs[own], keys, causal)
            assert few is not None
            for rows, columns, is_causal in few:
                part = found[slice(*rows), slice(*columns)]
                part += torch.ones(part.shape).tril() if is_causal else 1
            assert torch.equal(found, expected.float())
            assert len(few) <= (2 if past else 1)
    # runs that overlap, and are not the same
    assert few_parts(((3, 7),), ((0, 5),), True) is None
