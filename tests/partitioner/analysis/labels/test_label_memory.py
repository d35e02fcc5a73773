"""Runs that remember the steps of earlier ones, against runs that take each step themselves."""

from __future__ import annotations

from collections.abc import Set
from typing import Any

import pytest
import torch

from partitioner.analysis.labels.label_memory import LabelMemory
from partitioner.analysis.labels.label_state import Labels
from partitioner.analysis.labels.propagate_labels import LabelRun
from partitioner.program.program import Program
from partitioner.sharding.mesh import Mesh
from tests.support.partitioned import traced


def run(program: Program, memory: LabelMemory, pinned: Set[str], partial: Set[str] = frozenset()) -> Any:
    together: dict[str, int] = {}
    made = LabelRun(program, 2, pinned=pinned, partial=partial, together=together, memory=memory)
    return told(made.run(list(program.graph.nodes)))


def told(labels: Labels) -> Any:
    """What a run found, its labels by the weight, the dim and the index that they stand for."""
    meaning: dict[int, tuple[str, int, int]] = {}
    ends = sorted((base, name, dim) for (name, dim), base in labels.numbers.bases.items())
    for (base, name, dim), after in zip(ends, [*(end[0] for end in ends[1:]), labels.count], strict=True):
        meaning |= {base + i: (name, dim, i) for i in range(after - base)}

    def sets(ids: torch.Tensor) -> list[frozenset[Any]]:
        return [frozenset(meaning[label] for label in labels.joined([i])) for i in ids.reshape(-1).tolist()]

    return (
        [
            (site.node, site.kind, site.letter, sets(site.ids), site.weight and site.weight.name)
            for site in labels.sites
        ],
        [
            (each.node, each.can_be_partial, each.why, each.weights, frozenset(meaning[i] for i in each.labels))
            for each in labels.collapses
        ],
        list(labels.starts.items()),
        list(labels.unsplit.items()),
        list(labels.bases),
    )


def weights_of(program: Program) -> list[str]:
    """Of several kinds, each with what it starts or ends behind it and before it."""
    return [name for name in program.weights if "layers.0" in name and len(program.weights[name].shape) > 1][::2]


@pytest.mark.parametrize("name", ["deepseek_v3", "olmo2"])
def test_a_run_finds_what_one_without_a_memory_finds(name: str) -> None:
    program = traced(name)[1].copy(Mesh.of(tp=2))
    memory, pinned = LabelMemory(), set[str]()
    partial = frozenset(node.name for node in program.graph.nodes if "norm" in str(node.target))
    for weight in [None, *weights_of(program)]:
        pinned |= {weight} - {None}
        for sums in (frozenset[str](), partial):
            assert run(program, memory, pinned, sums) == run(program, LabelMemory(), pinned, sums)


def test_only_what_follows_from_another_weight_is_done_again(monkeypatch: pytest.MonkeyPatch) -> None:
    program, memory = traced("llama")[1].copy(Mesh.of(tp=2)), LabelMemory()
    steps: list[str] = []
    real = LabelRun._alone
    monkeypatch.setattr(
        LabelRun, "_alone", lambda self, node: (steps.append(node.meta.get("path")), real(self, node))[1]
    )
    run(program, memory, set())
    everything = len(steps)
    steps.clear()
    run(program, memory, {"model.layers.1.mlp.gate_proj.weight", "model.layers.1.mlp.up_proj.weight"})
    assert steps
    assert len(steps) < everything / 4
    assert not any("layers.0" in path for path in steps if path)


def test_a_memory_that_does_not_ask_what_is_pinned_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    program, memory = traced("llama")[1].copy(Mesh.of(tp=2)), LabelMemory()
    run(program, memory, set())
    real = LabelMemory.step

    def careless(self: LabelMemory, node: Any, operands: Any, pinned: Any, partial: Any, work: Any) -> Any:
        return real(self, node, operands, frozenset(), partial, work)

    monkeypatch.setattr(LabelMemory, "step", careless)
    pinned = {"model.layers.1.mlp.gate_proj.weight"}
    remembered = run(program, memory, pinned)
    monkeypatch.undo()
    assert remembered != run(program, LabelMemory(), pinned)
