"""What the kv-cache pass makes where keys and values are products of a narrower value: that value is cached."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import partitioner
from partitioner import Parts, Plan, partition
from partitioner.errors import LayoutError, PlanError
from partitioner.program.program import Program
from partitioner.proof.layouts import check
from partitioner.proof.rows import check_rows
from partitioner.sharding.layout import Layout
from runtime.kv_cache.cache_size import CacheSize
from runtime.ops.cached_attention import cached_attention
from runtime.ops.rows import collect_rows
from runtime.ops.state.latent_attention import latent_attention
from runtime.ops.state.latent_sequence_attention import latent_sequence_attention
from tests.runtime.generation.batching import many_requests
from tests.runtime.generation.batching.many_requests import assert_as_alone, mixed, on_all_ranks
from tests.support import zoo
from tests.support.generated import error, prompts
from tests.support.partitioned import EXACT, compiled_once

CARRIED_AND_LATENT = 24 + 8
SLOW = pytest.mark.slow


@pytest.mark.parametrize("tp", [*(pytest.param(tp, marks=SLOW) for tp in (1, 2)), 3])
@pytest.mark.parametrize(
    "name",
    [
        "deepseek_v3",
        pytest.param("deepseek_v2", marks=SLOW),  # what is carried is made of complex numbers
        pytest.param("minicpm3", marks=SLOW),
        pytest.param("glm4_moe_lite", marks=SLOW),
        pytest.param("youtu", marks=SLOW),
        pytest.param("axk1", marks=SLOW),
    ],
)
def test_prompts_of_any_lengths_are_continued_as_each_alone(name: str, tp: int) -> None:
    parts = compiled_once(name, tp)
    nodes = [node.target for node in parts.program_of("decode").graph.nodes]
    assert nodes.count(latent_attention) == 2
    assert cached_attention not in nodes
    # in pieces of 7, some of which are expanded; single tokens are absorbed
    assert error(name, parts, prompts(name), prefill_step=7) < EXACT
    assert error(name, parts, prompts(name, (1, 2)), new=3) < EXACT


@pytest.mark.parametrize(
    "plan", [{"pp": 2}, pytest.param({"ep": 2}, marks=SLOW), pytest.param({"pp": 2, "ep": 2}, marks=SLOW)]
)
def test_with_stages_and_experts(plan: dict[str, int]) -> None:
    parts = compiled_once("deepseek_v3", 2, **plan)
    assert error("deepseek_v3", parts, prompts("deepseek_v3"), prefill_step=7) < EXACT


@SLOW  # four heads on three ranks are above
@pytest.mark.parametrize("tp", [1, 3])
def test_sizes_that_divide_by_little(tp: int) -> None:
    parts = compiled_once("deepseek_v3", tp, odd=True)
    assert parts.entry("decode", 0).states[0].shape == (1, CARRIED_AND_LATENT)
    both = compiled_once("deepseek_v3", tp, odd=True, cache="expanded")
    found = [each.generate([[5, 6, 7], [8]], max_new_tokens=6, logprobs=True) for each in (parts, both)]
    assert torch.equal(found[0].sequences, found[1].sequences)
    assert (found[0].logprobs - found[1].logprobs).abs().max() < EXACT


def test_every_rank_keeps_all_of_what_has_no_heads() -> None:
    for tp in (1, 2):
        parts = compiled_once("deepseek_v3", tp)
        for rank in range(tp):
            assert {state.shape for state in parts.entry("decode", rank).states} == {(1, CARRIED_AND_LATENT)}
    # keys of 16 + 8 and values of 16 for each of 4 heads
    expanded = compiled_once("deepseek_v3", 1, cache="expanded")
    bytes_ = [each.cache_bytes(max_batch=1, max_length=10)[0] for each in (compiled_once("deepseek_v3", 1), expanded)]
    assert bytes_ == [2 * 10 * CARRIED_AND_LATENT * 8, 2 * 10 * 4 * 40 * 8]


def test_what_takes_fewer_bytes_is_cached_and_the_report_says_why() -> None:
    report = compiled_once("deepseek_v3", 2).generation_report
    said = "latent: 32 numbers per token on every rank, against 80 of keys and values on one"
    assert report.caches == (f"2 x model.layers.*.self_attn: {said}",)
    assert f"cache of 2 x model.layers.*.self_attn: {said}" in str(report)
    asked = compiled_once("deepseek_v3", 2, cache="expanded").generation_report
    assert asked.caches[0].endswith("expanded, as the plan says")


@pytest.mark.slow
def test_heads_of_a_rank_that_take_fewer_bytes_are_cached() -> None:
    wide = partition(zoo.tiny("deepseek_v3", kv_lora_rank=34)[0], Plan(tp=4))
    assert {state.shape for state in wide.entry("decode", 0).states} == {(1, 24), (1, 16)}
    assert "expanded: 42 numbers per token on every rank, against 40 of keys" in str(wide.generation_report)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("llama", r"'attention_default' \(attention in model.layers.0.self_attn\) .* several query heads share keys"),
        ("gpt2", "the keys are no product of a weight with a value: they come from addmm in transformer.h.0.attn"),
        pytest.param("mamba2", "no attention that is causal by itself", marks=SLOW),
    ],
)
def test_where_there_is_nothing_narrower_it_is_refused_with_the_node(name: str, reason: str) -> None:
    with pytest.raises(PlanError, match=reason):
        partition(zoo.tiny(name)[0], Plan(cache="latent")).generate([[3, 4]], max_new_tokens=2)


@pytest.mark.parametrize(
    "plan",
    [
        {"sp": 2},
        *(
            pytest.param(each, marks=SLOW)
            for each in (
                {"sp": 3},
                {"sp": 2, "sp_attention": "gather"},
                {"sp": 4, "sp_attention": "ring-ulysses"},
                {"tp": 2, "sp": 2, "passes": ("sequence-parallel",)},
                {"pp": 2, "sp": 2},
                {"ep": 2},
                {"sp": 2, "ep": 4},
            )
        ),
    ],
)
def test_ranks_that_share_out_tokens_keep_it(plan: dict[str, Any]) -> None:
    parts = compiled_once("deepseek_v3", **{"tp": 1, **plan})
    assert "latent: 32 numbers per token" in parts.generation_report.caches[0]
    target = latent_sequence_attention if "sp" in plan else latent_attention
    hows = {"prefill": "gather" if plan.get("sp_attention") == "gather" else "ring", "decode": "merge"}
    for entry, how in hows.items():
        nodes = [node for node in parts.program_of(entry).graph.nodes if node.target is target]  # type: ignore[arg-type]
        assert len(nodes) == 2
        assert "sp" not in plan or {node.kwargs["how"] for node in nodes} == {how}
    for lengths, options in (((1, 4, 11), {}), ((3, 11), {"prefill_step": 4}), ((1,), {})):
        assert error("deepseek_v3", parts, prompts("deepseek_v3", lengths), new=3, **options) < EXACT


@pytest.mark.slow
@pytest.mark.parametrize("name", ["deepseek_v2", "minicpm3", "glm4_moe_lite", "youtu", "axk1"])
def test_other_models_that_share_out_tokens(name: str) -> None:
    parts = compiled_once(name, 2, sp=2)
    nodes = [node.target for node in parts.program_of("prefill").graph.nodes]
    assert nodes.count(latent_sequence_attention) == 2
    assert error(name, parts, prompts(name), prefill_step=7) < EXACT


def test_a_rank_keeps_its_share_of_tokens() -> None:
    """Of 1,000 tokens over two ranks half each, and room for uneven ones."""
    expanded = compiled_once("deepseek_v3", 1, sp=2, cache="expanded")
    of_token = 2 * CARRIED_AND_LATENT * 8
    for parts, ratio in ((compiled_once("deepseek_v3", 1, sp=2), 1), (expanded, 4 * 40 / CARRIED_AND_LATENT)):
        (one, other) = parts.cache_bytes(max_batch=1, max_length=1000, prefill_step=8)
        assert one == other
        assert 500 <= one / of_token / ratio <= 550


def test_plans_say_it() -> None:
    plan = Plan.parse("tp=2,cache=latent")
    assert (plan.cache, str(plan), repr(plan)) == ("latent", "tp=2,cache=latent", "Plan(tp=2, cache='latent')")
    assert "cache" not in str(Plan(tp=2))
    with pytest.raises(PlanError, match="cache must be one of auto, expanded, latent; got 'narrow'"):
        Plan(cache="narrow")


@pytest.mark.parametrize(
    "plan", [{"tp": 1}, *(pytest.param(each, marks=SLOW) for each in ({"tp": 2}, {"tp": 2, "pp": 2}))]
)
def test_many_requests_at_once(plan: dict[str, int]) -> None:
    parts = compiled_once("deepseek_v3", **plan)
    cases = mixed(8, longest=20, new=6)
    found = on_all_ranks(parts, cases, CacheSize(max_batch=4, max_length=48, prefill_step=8))
    assert_as_alone(cases, found, many_requests.alone(compiled_once("deepseek_v3", 1, cache="expanded"), cases))


@pytest.mark.slow
def test_bundles_hold_it_and_are_split_anew(tmp_path: Path) -> None:
    model, ids = zoo.tiny("deepseek_v3")
    partition(model, Plan(tp=2)).save(tmp_path / "bundle")
    bundle = partitioner.load(tmp_path / "bundle")
    assert {state.name.rpartition(".")[2] for state in bundle.entry("decode", 1).states} == {"latent"}
    expected = compiled_once("deepseek_v3", 1, cache="expanded").generate(ids[:, :6], max_new_tokens=4)
    assert torch.equal(bundle.generate(ids[:, :6], max_new_tokens=4), expected)
    anew = partition(tmp_path / "bundle", Plan(tp=3, cache="latent"))
    assert torch.equal(anew.generate(ids[:, :6], max_new_tokens=4), expected)


# -- what is wrong is noticed ------------------------------------------------------------------------------------------


def _node(program: Program) -> Any:
    return next(node for node in program.graph.nodes if node.target is latent_attention)


def test_a_cache_that_not_every_rank_has_all_of_is_refused() -> None:
    program = compiled_once("deepseek_v3", 2).program_of("decode").copy()
    heads = _node(program).args[0].meta["layout"].dims[1]
    name, state = next(iter(program.states.items()))
    program.states[name] = type(state)(name, state.shape, state.dtype, Layout((heads, None)), state.sees)
    with pytest.raises(LayoutError, match="writes"):
        check(program)


def test_a_cache_of_all_tokens_where_ranks_share_them_out_is_refused() -> None:
    program = compiled_once("deepseek_v3", 1, sp=2).program_of("prefill").copy()
    name, state = next(iter(program.states.items()))
    program.states[name] = replace(state, token_axes=())
    with pytest.raises(LayoutError, match=r"writes .* tokens over \(\)"):
        check(program)


@pytest.mark.parametrize(("at", "what"), [(2, "latent"), (0, "queries")])
def test_tokens_of_all_ranks_in_place_of_own_ones_are_refused(at: int, what: str) -> None:
    program = compiled_once("deepseek_v3", 1, sp=2).program_of("prefill").copy()
    node = next(each for each in program.graph.nodes if each.target is latent_sequence_attention)
    dim, source = (1 if what == "latent" else 2), node.args[at]
    first = next(each for each in program.graph.nodes if each.op == "placeholder")
    with program.graph.inserting_before(node):
        total = program.graph.call_function(torch.ops.aten.sym_size.int, (first, 1))
        whole = program.graph.call_function(collect_rows, (source, total, "sp"), {"dim": dim, "order": "zigzag"})
    total.meta = {"val": first.meta["val"].shape[1], "path": ""}
    whole.meta = {key: value for key, value in source.meta.items() if key != "layout"}
    node.replace_input_with(source, whole)
    with pytest.raises(LayoutError):
        check(program)


def test_rows_of_other_heads_are_refused() -> None:
    program = compiled_once("deepseek_v3", 2).program_of("decode").copy()
    node = _node(program)
    weight = node.args[4]
    while weight.op != "get_attr":
        weight = weight.all_input_nodes[0]
    program.weight_layouts.pop(str(weight.target))
    with pytest.raises(LayoutError):
        check(program)


def test_keys_made_of_other_tokens_are_refused() -> None:
    program = compiled_once("deepseek_v3", 1).program_of("decode").copy()
    node = _node(program)
    with program.graph.inserting_before(node):
        turned = program.graph.call_function(torch.ops.aten.flip.default, (node.args[2], [1]))
    turned.meta = dict(node.args[2].meta)
    node.replace_input_with(node.args[2], turned)
    with pytest.raises(LayoutError, match=r"flip|one row per token"):
        check_rows(program)


def test_weights_that_change_places_change_the_tokens() -> None:
    """Keys' and values' are of one size, so that only the numbers tell."""
    parts = compiled_once("deepseek_v3", 1)
    broken = parts.program_of("decode").copy()
    for node in broken.graph.nodes:
        if node.target is latent_attention:
            node.args = (*node.args[:4], node.args[5], node.args[4], *node.args[6:])
    changed = Parts(parts.program, parts.report, generation=lambda: (broken, broken))
    found, expected = (
        each.generate([[5, 6, 7, 8]], max_new_tokens=4, eos_token_id=[], logprobs=True) for each in (changed, parts)
    )
    assert (found.logprobs - expected.logprobs).abs().max() > 1e-6
