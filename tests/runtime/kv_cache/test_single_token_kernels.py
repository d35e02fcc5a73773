"""What a cache hands to the kernels for one token per row, which here are the same sums written out.

They add the token and attend to what is cached, as the kernels do: so generation says what it says without them.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor

from partitioner import CacheSize, Plan, partition
from runtime.communication.thread_communicator import ThreadGroup
from runtime.execution.executable import Executable
from runtime.execution.fusion.operations import rotated
from runtime.execution.prompts import packed_pieces
from runtime.execution.prompts.packed_pieces import PackedPieces
from runtime.generation import steps
from runtime.generation.decode_graphs.decoder import Decoder
from runtime.kv_cache import cache as cache_module
from runtime.ops.attention import allowed, attention
from runtime.ops.kernels import decode_attention as kernels
from runtime.ops.kernels.decode_attention import Rotation
from runtime.ops.kernels.float8_rows import from_float8, to_float8
from tests.runtime.generation.batching import many_requests
from tests.runtime.generation.batching.many_requests import Case, assert_as_alone, mixed, on_all_ranks
from tests.runtime.generation.replayed import capturing_prompts, decoding
from tests.support import zoo
from tests.support.generated import prompts
from tests.support.partitioned import EXACT, compiled, compiled_for


def kept(new: Tensor, positions: Tensor, held: Tensor, scales: Tensor | None, table: Tensor | None) -> Tensor:
    """Adds `new` [B, G, 1, D] to a cache in place; what its rows hold then, [B, G, slots, D]."""
    parts = [held] if scales is None else [held, scales]
    for part, added in zip(parts, [new] if scales is None else to_float8(new), strict=True):
        for row, position in enumerate(positions[:, 0].tolist()):
            if table is None:
                part[row, :, position % part.shape[2]] = added[row, :, 0]
            else:
                size = part.shape[2]
                part[:, table[row, position // size], position % size] = added[row, :, 0]
    if table is not None:
        parts = [part[:, table].transpose(0, 1).flatten(2, 3) for part in parts]
    else:
        parts = [part[: len(new)] for part in parts]
    return parts[0] if scales is None else from_float8(parts[0], parts[1], new.dtype)


def hidden(positions: Tensor, slots: int, window: int | None, chunk: int | None, dtype: torch.dtype) -> Tensor:
    lies = positions - (positions - torch.arange(slots)) % slots
    seen = allowed(positions[:, :, None], lies[:, None], causal=True, window=window, chunk=chunk)
    return torch.zeros(seen.shape, dtype=dtype).masked_fill(~seen, -torch.inf)[:, None]


@pytest.fixture
def counts(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    counts: Counter[str] = Counter()

    def decode_attention(
        q: Tensor, k: Tensor, v: Tensor, positions: Tensor, keys: Tensor, values: Tensor, sinks: Tensor | None,
        *, scale: float, window: int | None, chunk: int | None, softcap: float | None, table: Tensor | None,
        key_scales: Tensor | None, value_scales: Tensor | None, rotation: Rotation | None, ahead: bool,
    ) -> Tensor:  # fmt: skip
        counts["key_value"] += 1
        counts["ahead"] += ahead
        if rotation is not None:
            counts["rotated"] += 1
            q, k = rotated(q, *rotation), rotated(k, *rotation)
        held = kept(k, positions, keys, key_scales, table), kept(v, positions, values, value_scales, table)
        mask = hidden(positions, held[0].shape[2], window, chunk, q.dtype)
        return attention(q, *held, mask, sinks, scale=scale, softcap=softcap)

    def latent_decode(
        q: Tensor, row: Tensor, positions: Tensor, rows: Tensor, sinks: Tensor | None,
        *, latent: int, scale: float, window: int | None, chunk: int | None, softcap: float | None,
        table: Tensor | None, scales: Tensor | None,
    ) -> Tensor:  # fmt: skip
        counts["latent"] += 1
        held = kept(row[:, None], positions, rows, scales, table)
        mask = hidden(positions, held.shape[2], window, chunk, q.dtype)
        return attention(q, held, held[..., :latent].contiguous(), mask, sinks, scale=scale, softcap=softcap)

    monkeypatch.setattr(kernels, "decode_attention", decode_attention)
    monkeypatch.setattr(kernels, "latent_decode", latent_decode)
    return counts


def by_kernels(monkeypatch: pytest.MonkeyPatch, *, there: bool = True) -> None:
    for name in ("can_decode", "can_decode_latent"):
        monkeypatch.setattr(cache_module, name, lambda *given: there)


@pytest.mark.parametrize("dtype", [None, "fp8"])
@pytest.mark.parametrize(
    ("name", "tp"),
    [
        ("deepseek_v3", 2),
        ("llama", 1),
        ("mistral", 1),  # a window
        pytest.param("gpt_oss", 1, marks=pytest.mark.slow),  # sinks
        pytest.param("deepseek_v3", 3, marks=pytest.mark.slow),
    ],
)
def test_generation_says_the_same(
    name: str, tp: int, dtype: str | None, counts: Counter[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    parts, size = compiled(name, tp), CacheSize(max_batch=4, max_length=48, dtype=dtype)
    found, cases = [], mixed(6, longest=20, new=6)
    for there in (False, True):
        by_kernels(monkeypatch, there=there)
        parts.reserve(size)
        found.append(parts.generate(prompts(name), max_new_tokens=8, eos_token_id=[], logprobs=True))
        assert bool(counts) == there
        outcome = on_all_ranks(parts, cases, CacheSize(max_batch=4, max_length=48, prefill_step=8, dtype=dtype))
        assert bool(counts) == there
        if not there:
            alone = list(outcome.tokens.values())
    assert {name for name, count in counts.items() if count} == {"latent" if name == "deepseek_v3" else "key_value"}
    plain, by_kernel = found
    assert torch.equal(plain.sequences, by_kernel.sequences)
    assert (plain.logprobs - by_kernel.logprobs).abs().max() < EXACT
    assert_as_alone(cases, outcome, alone)


def test_a_rotation_reaches_the_kernel(counts: Counter[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """As in captured steps, though nothing is captured on a CPU: alone, and of many requests over blocks."""
    parts, cases = compiled("llama", 1), mixed(6, longest=20, new=6)
    size, blocks = CacheSize(max_batch=4, max_length=48), CacheSize(max_batch=4, max_length=48, prefill_step=8)
    parts.reserve(size)
    plain = parts.generate(prompts("llama"), max_new_tokens=8, eos_token_id=[])
    alone = list(on_all_ranks(parts, cases, blocks).tokens.values())

    class Captured(Executable):
        def __init__(self, *given: Any, **named: Any) -> None:
            super().__init__(*given, **{**named, "captured": True})

    monkeypatch.setattr(steps, "Executable", Captured)
    by_kernels(monkeypatch)
    parts.reserve(size)
    assert torch.equal(parts.generate(prompts("llama"), max_new_tokens=8, eos_token_id=[]), plain)
    assert counts["rotated"] == counts["key_value"] == counts["ahead"] > 0
    before = counts["rotated"]
    assert_as_alone(cases, on_all_ranks(parts, cases, blocks), alone)
    assert counts["rotated"] > before


@pytest.mark.slow
def test_a_compiled_step_over_latents_serves_any_length(counts: Counter[str], monkeypatch: pytest.MonkeyPatch) -> None:
    parts = compiled("deepseek_v3", 1)
    plain = parts.generate([[5, 6, 7], [8]], max_new_tokens=6, eos_token_id=[])
    by_kernels(monkeypatch)
    engine = parts.engine(0, ThreadGroup(parts.mesh).communicator(0), compile=True)
    assert torch.equal(engine.generate([[5, 6, 7], [8]], max_new_tokens=6, eos_token_id=[]), plain)
    assert counts["latent"]
    loop: Any = engine._generate_loop
    assert loop.cache.any_length
    before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    decoder = loop._bound.decoder(2)
    assert isinstance(decoder, Decoder)
    engine.generate([[5] * 90, [8]], max_new_tokens=6, eos_token_id=[])  # in a larger cache
    assert loop._bound.decoder(2) is decoder
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == before


def test_what_the_kernel_does_not_keep_is_noticed(counts: Counter[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """The negative control: a kernel that does not add the token."""
    parts = compiled("deepseek_v3", 1)
    plain = parts.generate(prompts("deepseek_v3"), max_new_tokens=8, eos_token_id=[], logprobs=True)
    by_kernels(monkeypatch)
    right = kernels.latent_decode

    def forgets(q: Tensor, row: Tensor, positions: Tensor, rows: Tensor, *rest: Any, **options: Any) -> Tensor:
        found: Tensor = right(q, row, positions, rows.clone(), *rest, **options)
        return found

    monkeypatch.setattr(kernels, "latent_decode", forgets)
    parts.reserve(CacheSize(max_batch=4, max_length=48))
    wrong = parts.generate(prompts("deepseek_v3"), max_new_tokens=8, eos_token_id=[], logprobs=True)
    assert (plain.logprobs - wrong.logprobs).abs().max() > 1e-6


STAGES = "pp=2,pipeline.share_head=false"


@pytest.mark.parametrize(
    ("name", "plan"),
    [
        ("llama", "tp=1"),
        ("llama", STAGES),
        *(
            pytest.param(*each, marks=pytest.mark.slow)
            for each in (
                ("mistral", "tp=1"), ("llama", "pp=2,pipeline.share_head=true"), ("llama", "pp=3"), ("mistral", STAGES),
                ("llama", "tp=2,pp=2"),
            )
        ),
    ],
)  # fmt: skip
@pytest.mark.parametrize("decode", ["eager", pytest.param("captured", marks=pytest.mark.slow)])
def test_prompts_amid_rows_are_captured(
    name: str, plan: str, decode: str, counts: Counter[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of ever other lengths, amid more and fewer rows, in blocks that others had before: as each is told alone."""
    parts, size = compiled_for(name, plan), CacheSize(max_batch=4, max_length=48)
    cases = [Case([3 + 7 * n % 50 + at for at in range(1 + 5 * n % 17)], {"max_new_tokens": 3 + n % 5,
             "eos_token_id": [], "logprobs": True}, 2 * n) for n in range(24)]  # fmt: skip
    alone = many_requests.alone(compiled(name, 1), cases)
    by_kernels(monkeypatch)
    monkeypatch.setattr(packed_pieces, "_LEAST", 4)
    decoding_so = decoding(parts, cuda_graph=True) if decode == "captured" else contextlib.nullcontext()
    with capturing_prompts() as graphs, decoding_so:
        assert_as_alone(cases, on_all_ranks(parts, cases, size), alone)
        assert 0 < len(graphs) < (12 if decode == "eager" else 40) * parts.mesh.world_size
        assert sum(graph.count for graph in graphs) > 8
        # what fills a prompt up must lie where nobody reads
        monkeypatch.setattr(PackedPieces, "_varying", _in_the_first_block)
        with pytest.raises(AssertionError):
            assert_as_alone(cases, on_all_ranks(parts, cases, size), alone)


@pytest.mark.parametrize(
    ("name", "plan"),
    [
        ("llama", "tp=1"),
        *(
            pytest.param(*each, marks=pytest.mark.slow)
            for each in (("mistral", "tp=1"), ("deepseek_v3", "tp=1"), ("llama", STAGES), ("gemma3_text", "tp=1"))
        ),
    ],
)
def test_prompts_behind_a_prefix_are_captured(
    name: str, plan: str, counts: Counter[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the cache holds of a prompt already differs from one to the next; one capture serves several."""
    size = CacheSize(max_batch=6, max_length=48)
    if name == "deepseek_v3":  # latents; its experts ask the host in float64
        whole = parts = partition(zoo.tiny(name, first_k_dense_replace=9)[0], Plan())
    else:
        whole, parts = compiled(name, 1), compiled_for(name, plan)
    prefix = [3 + at % 50 for at in range(24)]
    cases = [
        Case([*prefix[: 4 + 3 * n % 21], *(60 + n + at for at in range(2 + 5 * n % 9))], {"max_new_tokens": 3,
             "eos_token_id": [], "logprobs": True}, 3 * n) for n in range(18)
    ]  # fmt: skip
    alone = many_requests.alone(whole, cases)
    by_kernels(monkeypatch)
    monkeypatch.setattr(packed_pieces, "_LEAST", 4)
    monkeypatch.setattr(packed_pieces, "_LEAST_PAST", 8)
    rooms: Counter[int] = Counter()
    varying = PackedPieces._varying

    def counted(pieces: PackedPieces, piece: Any, table: Any, room: packed_pieces.Room) -> list[Tensor]:
        rooms[room.past] += 1
        return varying(pieces, piece, table, room)

    with capturing_prompts() as graphs:
        monkeypatch.setattr(PackedPieces, "_varying", counted)
        assert_as_alone(cases, on_all_ranks(parts, cases, size), alone)
        assert sum(count for past, count in rooms.items() if past) > 5
        assert sum(graph.count for graph in graphs) > 4
        if name == "llama":  # where windows hide what lies far back, it may go unseen
            monkeypatch.setattr(PackedPieces, "_varying", _in_blocks_of_nobody)
            with pytest.raises(AssertionError):
                assert_as_alone(cases, on_all_ranks(parts, cases, size), alone)


def _in_blocks_of_nobody(
    pieces: PackedPieces, piece: Any, table: Any, room: Any, of: Any = PackedPieces._varying
) -> Any:
    found = of(pieces, piece, table, room)
    if room.past:
        found[4] = torch.full_like(found[4], pieces._cache.blocks)
    return found


def _in_the_first_block(pieces: PackedPieces, *given: Any, of: Any = PackedPieces._varying) -> list[Tensor]:
    found: list[Tensor] = of(pieces, *given)
    return [*found[:3], found[3] % pieces._cache.block_size, *found[4:]]
