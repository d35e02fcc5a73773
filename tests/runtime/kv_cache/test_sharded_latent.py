"""Attention over narrow values that ranks share out, against the cache of one rank, in float64."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from partitioner.errors import InputError
from partitioner.sharding.mesh import Mesh
from runtime.communication.communicator import Communicator
from runtime.communication.thread_communicator import ThreadGroup
from runtime.kv_cache.cache import Cache
from runtime.kv_cache.sharded_cache import ShardedCache
from runtime.ops.rows.token_order import TokenOrder
from runtime.ops.state import latent_heads
from runtime.ops.state.latent_attention import latent_attention
from runtime.ops.state.latent_sequence_attention import latent_sequence_attention, without_latent_cache
from runtime.program.shards import StateShard
from tests.runtime.kv_cache.sharded_cases import CPU, F64, Run, of_tokens, text
from tests.runtime.ops.rows.sp_cases import Counting, drawn, on_ranks

HEADS, KEY, VALUE, LATENT, CARRIED = 3, 5, 4, 6, 2
WEIGHTS = (drawn(HEADS, KEY, LATENT, seed=8), drawn(HEADS, VALUE, LATENT, seed=9))


def states(sees: int | None = None, *, float8: bool = False) -> list[StateShard]:
    return [StateShard("s.latent", (1, LATENT + CARRIED), F64, sees, token_axes=("sp",), float8=float8)]


def tokens(run: Run, rows: int) -> list[Tensor]:
    """q, carried_q, latent and carried of a run's tokens; those of a position are the same whenever they come."""
    at, found = run.batch().positions, []
    for seed, shape in enumerate(((HEADS, KEY), (HEADS, CARRIED), (LATENT,), (CARRIED,))):
        all_tokens = drawn(8, 80, *shape, seed=seed)[:rows]
        picked = all_tokens[torch.arange(rows)[:, None], at]
        found.append(picked.transpose(1, 2) if len(shape) == 2 else picked)
    return found


def own(x: Tensor, positions: Sequence[int]) -> Tensor:
    return x[:, :, positions] if x.dim() == 4 else x[:, positions]


def on_one(runs: Sequence[Run], rows: int, mask: Tensor | None, sinks: Tensor | None, **options: Any) -> Any:
    cache = Cache(states(options.pop("sees", None)), max_batch=8, max_length=80, step=40, device=CPU)
    attend = cache.bind(latent_attention, "s", {"scale": 0.4, **options}, masked=mask is not None)
    found = []
    for run in runs:
        cache.begin(run.batch())
        given = tokens(run, rows)
        found.append(of_tokens(run, attend(*given, *WEIGHTS, run.batch().positions, mask, sinks)))
    return found


def on_rank(
    communicator: Communicator, runs: Sequence[Run], rows: int, how: str, mask: Tensor | None, sinks: Tensor | None,
    **options: Any,
) -> tuple[list[Tensor], ShardedCache]:  # fmt: skip
    number, parts = communicator.rank, communicator.mesh.size("sp")
    cache = ShardedCache(
        states(options.pop("sees", None)), max_batch=8, max_length=80, step=40, device=CPU, parts=parts,
        coordinate=number,
    )  # fmt: skip
    channel, given = communicator.channel("sp", node="attend"), {"state": "s", "parts": parts, "scale": 0.4, **options}
    prefill, decode = (
        cache.bind_over_ranks(channel, {**given, "how": each}, op=latent_sequence_attention) for each in (how, "merge")
    )
    found = []
    for run in runs:
        cache.begin(run.batch(), decode=run.decode)
        whole, positions = tokens(run, rows), run.batch().positions
        if run.decode:
            found.append(decode(*whole, *WEIGHTS, positions, mask, sinks))
            continue
        mine = TokenOrder.of(max(run.counts), parts, "zigzag").positions(number)
        found.append(prefill(*(own(x, mine) for x in whole), *WEIGHTS, positions[:, mine], mask, sinks))
    return found, cache


def check(
    runs: Sequence[Run], rows: int, parts: int, how: str, *, group: ThreadGroup | None = None,
    mask: Tensor | None = None, sinks: Tensor | None = None, **options: Any,
) -> float:  # fmt: skip
    """The largest difference to one rank's."""
    bodies = [lambda communicator: on_rank(communicator, runs, rows, how, mask, sinks, **options)] * parts
    each = on_ranks(group or ThreadGroup(Mesh.of(sp=parts)), *bodies)
    worst = 0.0
    for at, (run, expected) in enumerate(zip(runs, on_one(runs, rows, mask, sinks, **options), strict=True)):
        outs = [outputs[at] for outputs, _ in each]
        whole = outs[0]
        if run.decode:
            assert all(torch.equal(outs[0], out) for out in outs), "not the same bits on all ranks"
        else:
            whole = torch.empty(rows, HEADS, max(run.counts), VALUE, dtype=F64)
            for number, out in enumerate(outs):
                whole[:, :, TokenOrder.of(max(run.counts), parts, "zigzag").positions(number)] = out
        for one, other in zip(of_tokens(run, whole), expected, strict=True):
            worst = max(worst, float((one - other).abs().max()))
    return worst


@pytest.mark.parametrize("way", ["absorbed", "expanded", "expanded by head", "by products"])
@pytest.mark.parametrize("how", ["ring", "gather"])
@pytest.mark.parametrize(("parts", "prompts", "step"), [(2, (9, 4), 40), (3, (1, 2), 40), (3, (17, 30), 12)])
def test_prompts_and_steps(
    how: str, way: str, parts: int, prompts: tuple[int, ...], step: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With ranks that have no token, uneven ones, and pieces behind others."""
    if way != "by products":
        monkeypatch.setattr(latent_heads, "absorbs", lambda *sizes, **more: way == "absorbed")
    if way == "expanded by head":
        monkeypatch.setattr(latent_heads, "EXPANDED_BYTES", 1)
    assert check(text(prompts, step, 3), 2, parts, how) < 1e-12


@pytest.mark.parametrize(
    "options", [{"window": 7, "sees": 7}, {"chunk": 6, "sees": 6}, {"softcap": 1.5}, {"window": 30}]
)
def test_options(options: dict[str, Any]) -> None:
    assert check(text((20, 13), 9, 6), 2, 3, "ring", **options) < 1e-12


@pytest.mark.parametrize("absorbed", [True, False])
def test_sinks_and_masks(absorbed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A mask of heads; heads are made one at a time."""
    monkeypatch.setattr(latent_heads, "absorbs", lambda *sizes, **more: absorbed)
    monkeypatch.setattr(latent_heads, "EXPANDED_BYTES", 1)
    of_heads = drawn(1, HEADS, 1, 1, seed=4)
    assert check(text((11, 11), 40, 2), 2, 2, "ring", sinks=drawn(HEADS, seed=3)) < 1e-12
    assert check(text((11, 11), 40, 2), 2, 2, "gather", mask=of_heads, sinks=drawn(1, HEADS, 1, 1)) < 1e-12


def test_another_order_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The negative control: values of another rank's rows give other numbers."""
    made_of = latent_heads.HeadGroup.made_of
    monkeypatch.setattr(latent_heads.HeadGroup, "made_of", lambda self, rows: made_of(self, rows.flip(2)))
    assert check(text((9, 4), 40, 1), 2, 2, "ring") > 1e-3


def test_what_travels_is_narrow() -> None:
    """A prompt's ring, its later piece behind what is kept, and a step's merge of values, not of narrow ones."""
    group = Counting(Mesh.of(sp=3))
    check(text((18,), 40, 1), 1, 3, "ring", group=group)
    local = (18 // 3) * (LATENT + CARRIED) * 8
    assert {kind: sent for (rank, kind), sent in group.sent.items() if rank == 1} == {
        "permute": 2 * local,
        "all_gather": 2 * HEADS * (VALUE + 1) * 8,
    }
    later = Counting(Mesh.of(sp=3))
    check(text((24,), 12, 0), 1, 3, "ring", group=later)
    assert later.sent[0, "permute"] == 2 * (4 + 8) * (LATENT + CARRIED) * 8


def test_codes_travel_in_its_place() -> None:
    cache = ShardedCache(states(float8=True), max_batch=1, max_length=20, step=9, device=CPU, parts=2, coordinate=0)
    assert sorted(cache.buffers) == ["s.latent", "s.latent.scales"]
    assert cache._rows_of("s.latent").packed(slice(0, 1), 4).shape == (1, 1, 4, LATENT + CARRIED + 4)


def test_it_is_for_a_cache() -> None:
    with pytest.raises(InputError, match="latent_sequence_attention of 's' is not bound to a cache"):
        without_latent_cache(None, state="s")
