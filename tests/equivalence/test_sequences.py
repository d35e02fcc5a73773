"""Texts continued by ranks that share out their tokens: what the model itself would say, and what one rank keeps."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from partitioner import Parts, Plan, partition
from partitioner.errors import LayoutError
from partitioner.proof.layouts import check, check_entries
from partitioner.proof.rows import check_rows
from partitioner.storage.bundle.bundle import load
from runtime.generation import generate_loop
from runtime.kv_cache.sharded_cache import ShardedCache
from runtime.kv_cache.sharded_slots import FAR, KeptTokens
from runtime.ops.collectives import all_reduce
from runtime.ops.rows.sequence_attention import cached_sequence_attention
from runtime.ops.rows.share_rows import own_last_token, take_rows
from tests.support import generated
from tests.support.partitioned import EXACT, compiled_for, error, tokens, traced

NAMES = ("llama", "gpt2", "gemma2", "gpt_oss", "mixtral")


@functools.cache
def compiled(name: str, plan: str) -> Parts[Any]:
    return compiled_for(name, plan)


@pytest.mark.parametrize(
    ("name", "plan"),
    [
        pytest.param("llama", "sp=2,sp_attention=ring", marks=pytest.mark.slow),
        ("llama", "tp=2,sp=3,sp_attention=ulysses"),
        ("gemma2", "sp=3,sp_attention=gather"),  # windows and a soft cap
        ("gpt_oss", "sp=2,sp_attention=ring"),  # windows and sinks
        pytest.param("deepseek_v3", "tp=2,sp=2", marks=pytest.mark.slow),  # keys wider than values
    ],
)
def test_prompts_of_different_lengths_are_continued_as_the_model_would(name: str, plan: str) -> None:
    parts = compiled(name, plan)
    assert generated.error(name, parts, generated.prompts(name, (1, 2, 5, 11)), new=6) < 1e-9
    # a prompt in pieces: what came before lies with the ranks that computed it
    assert generated.error(name, parts, generated.prompts(name, (3, 11)), new=3, prefill_step=4) < 1e-9


def test_each_rank_keeps_its_share_of_the_tokens() -> None:
    one, shared = compiled("llama", "sp=1"), compiled("llama", "sp=4")
    (whole,) = one.cache_bytes(max_batch=2, max_length=65536)
    each = shared.cache_bytes(max_batch=2, max_length=65536)
    assert all(whole / 4 <= kept <= 1.02 * whole / 4 for kept in each)
    fits = min(shared.tokens_that_fit("100 MB"))  # type: ignore[type-var]
    assert fits >= 3.9 * one.tokens_that_fit("100 MB")[0]  # type: ignore[operator]
    assert "of one token in 4, over sp" in str(shared.generation_report)


@pytest.mark.parametrize("way", ["ring", "ulysses"])
def test_a_batch_of_any_lengths_keeps_each_token_once(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What fills up the shorter prompts of a batch is kept by no rank, in no piece: no query can see it."""
    caches = noted(monkeypatch)
    parts, lengths = compiled("llama", f"sp=3,sp_attention={way}"), (1, 2, 7, 11)
    assert generated.error("llama", parts, generated.prompts("llama", lengths), new=4, prefill_step=5) < 1e-9
    assert len(caches) == 3
    for cache in caches:
        for count, held in cache.kept.held.items():
            for row, length in enumerate(lengths):
                kept = held[:, row, :count]
                assert sorted(kept[kept < FAR].tolist()) == list(range(length + 3))  # the last new token is not run


def test_what_fills_up_would_be_seen_if_it_were_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """The control: tokens that repeat the last one of a prompt are keys a second time, and logits are others."""
    note = KeptTokens._note

    def everything(self: Any, rank: Any, rows: Any, place: Any, positions: Any, is_token: Any) -> Any:
        return note(self, rank, rows, place, positions, torch.ones_like(is_token))

    monkeypatch.setattr(KeptTokens, "_note", everything)
    parts = compiled("llama", "sp=3,sp_attention=ring")
    assert generated.error("llama", parts, generated.prompts("llama", (1, 2, 7, 11)), new=4, prefill_step=5) > 1e-6


def test_pieces_shorter_than_the_ranks_are_shared_out_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """By pieces of one token the first rank would keep them all: of a long prompt more than it has room for."""
    parts = compiled("llama", "sp=3,sp_attention=ring")

    def kept() -> list[int]:
        cache = parts._simulator.engines[0]._generate_loop.cache
        assert isinstance(cache, ShardedCache)
        return [each[0] for each in cache.kept.kept]

    texts = generated.prompts("llama", (20, 4))
    assert generated.error("llama", parts, texts, new=1, prefill_step=1) < 1e-9
    assert kept() == [7, 7, 6]
    # the control: pieces as short as they were asked for
    monkeypatch.setattr(generate_loop, "step_of", lambda _, step, most: min(step, most))
    assert generated.error("llama", parts, texts, new=1, prefill_step=1) < 1e-9
    assert kept() == [20, 0, 0]


def noted(monkeypatch: pytest.MonkeyPatch) -> list[ShardedCache]:
    """The caches that are made from now on."""
    made, make = list[ShardedCache](), ShardedCache.__init__

    def init(self: ShardedCache, *given: Any, **options: Any) -> None:
        make(self, *given, **options)
        made.append(self)

    monkeypatch.setattr(ShardedCache, "__init__", init)
    return made


def test_prompts_travel_and_single_tokens_are_merged() -> None:
    parts = compiled("llama", "tp=2,sp=3,sp_attention=ring")
    for entry, how in (("prefill", "ring"), ("decode", "merge")):
        nodes = [n for n in parts.program_of(entry).graph.nodes if n.target is cached_sequence_attention]
        assert [node.kwargs["how"] for node in nodes] == [how] * 2
        assert all(state.token_axes == ("sp",) for state in parts.program_of(entry).states.values())


def test_a_bundle_runs_as_what_it_was_saved_from(tmp_path: Any) -> None:
    parts = partition(traced("llama")[0], Plan(tp=2, sp=2, sp_attention="ulysses"))
    ids = tokens("llama", 9)
    parts.save(tmp_path / "bundle")
    loaded = load(tmp_path / "bundle")
    assert loaded.manifest.plan["sp_attention"] == "ulysses"
    assert torch.equal(loaded.simulate(input_ids=ids), parts.simulate(input_ids=ids))
    assert torch.equal(loaded.generate(ids, max_new_tokens=4), parts.generate(ids, max_new_tokens=4))  # type: ignore[arg-type]
    assert loaded.entry("decode", 0).states[0].token_axes == ("sp",)


plans = st.builds(
    lambda tp, sp, way: f"tp={tp},sp={sp}" + (f",sp_attention={way}" if sp > 1 else ""),
    st.sampled_from([1, 2, 3, 4]),
    st.sampled_from([1, 2, 3, 4]),
    st.sampled_from(["auto", "ring", "gather", "ulysses"]),
)


def whole_texts_and_new_ones(name: str, plan: str, length: int, batch: int) -> None:
    parts = compiled(name, plan)
    assert error(name, parts, length, batch=batch) < EXACT
    texts = generated.prompts(name, (length, max(1, length // 2)))
    assert generated.error(name, parts, texts, new=2) < 1e-9


@settings(max_examples=4)
@given(st.sampled_from(NAMES[:2]), plans, st.integers(1, 20), st.integers(1, 3))
def test_any_plan_computes_the_same(name: str, plan: str, length: int, batch: int) -> None:
    whole_texts_and_new_ones(name, plan, length, batch)


@pytest.mark.slow
@settings(max_examples=max(20, settings().max_examples))
@given(st.sampled_from(NAMES), plans, st.integers(1, 48), st.integers(1, 3))
def test_any_plan_computes_the_same_for_long(name: str, plan: str, length: int, batch: int) -> None:
    whole_texts_and_new_ones(name, plan, length, batch)


# -- negative controls -------------------------------------------------------------------------------------------------


def changed(change: Any, *, entry: str = "prefill") -> Any:
    program = compiled("llama", "sp=2").program_of(entry).copy()
    check(program)
    check_rows(program)
    change(program, {op: [n for n in program.graph.nodes if n.target is op] for op in _OPS})
    for node in program.graph.nodes:
        node.meta = {key: value for key, value in node.meta.items() if key != "layout"}
    return program


_OPS = (cached_sequence_attention, own_last_token, take_rows, all_reduce)


def test_the_last_token_of_one_rank_is_no_result() -> None:
    def alone(program: Any, nodes: Any) -> None:
        (node,) = nodes[all_reduce]
        node.replace_all_uses_with(node.args[0])
        program.graph.erase_node(node)

    with pytest.raises(LayoutError):
        check(changed(alone))


def test_the_last_token_is_not_that_of_another_part() -> None:
    def other(program: Any, nodes: Any) -> None:
        (node,) = nodes[own_last_token]
        node.args = (*node.args[:3], 0)

    with pytest.raises(LayoutError, match="picks as part 0"):
        check(changed(other))


def test_parts_are_not_merged_of_own_queries() -> None:
    def merged(program: Any, nodes: Any) -> None:
        (node, *_) = nodes[cached_sequence_attention]
        node.kwargs = {**node.kwargs, "how": "merge"}

    with pytest.raises(LayoutError):
        check(changed(merged))


def test_positions_of_all_are_not_those_of_own_tokens() -> None:
    def whole(program: Any, nodes: Any) -> None:
        (node, *_) = nodes[cached_sequence_attention]
        positions = next(n for n in program.graph.nodes if n.op == "placeholder" and n.target == "position_ids")
        node.args = (*node.args[:3], positions, *node.args[4:])

    with pytest.raises(LayoutError):
        check(changed(whole))


def test_a_cache_is_shared_out_alike_in_both_entries() -> None:
    parts = compiled("llama", "sp=2")
    check_entries(parts.program_of("prefill"), parts.program_of("decode"))
    with pytest.raises(LayoutError, match="share the state"):
        check_entries(parts.program_of("prefill"), compiled("llama", "sp=1").program_of("decode"))


def test_a_cache_of_all_tokens_is_not_one_of_own() -> None:
    def whole(program: Any, nodes: Any) -> None:
        for name, state in program.states.items():
            program.states[name] = type(state)(state.name, state.shape, state.dtype, state.layout)

    with pytest.raises(LayoutError, match="tokens over"):
        check(changed(whole, entry="decode"))
