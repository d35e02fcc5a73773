"""Sums with a residual and a norm behind them, by rows: they say what the ops one after the other say."""

import operator
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx

from partitioner.sharding.mesh import Mesh
from runtime.communication.channels import Channel, OwnRows
from runtime.communication.thread_communicator import ThreadGroup
from runtime.execution.fusion.operations import added_norm
from runtime.execution.prompts.sum_norms import begin_sum_norm, sum_norms
from runtime.generation import steps
from tests.support.generated import prompts
from tests.support.partitioned import compiled


def by_rows(
    channel: Channel, x: Tensor, residual: Tensor | OwnRows | None, weight: Tensor | None, eps: float
) -> Callable[[], tuple[OwnRows, Tensor]]:
    """As GPUs do it through each other's memory, by primitives that every channel has."""
    width = x.shape[-1]
    rows = x.reshape(-1, width)
    shares = [OwnRows.share(len(rows), len(channel.ranks), each) for each in range(len(channel.ranks))]
    own, sizes = shares[channel.coordinate], [of.stop - of.start for of in shares]
    total = channel.reduce_scatter(rows, 0, sizes)
    if residual is not None:
        total = total + (residual.reshape(-1, width)[own] if isinstance(residual, Tensor) else residual.rows)
    normed = channel.all_gather(torch.rms_norm(total, [width], weight, eps), 0, sizes)
    return lambda: (OwnRows(total, x.shape), normed.view(x.shape))


def on_ranks(count: int, run: Callable[[Channel], Any]) -> list[Any]:
    group, found = ThreadGroup(Mesh.of(tp=count)), [None] * count

    def one(rank: int) -> None:
        found[rank] = run(group.communicator(rank).channel("tp", node="test"))

    threads = [threading.Thread(target=one, args=(rank,)) for rank in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


@pytest.mark.parametrize(("count", "shape"), [(2, (1, 5, 6)), (3, (2, 4, 6)), (4, (1, 3, 6))])
def test_two_in_a_row_say_what_the_ops_say(count: int, shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    brought = torch.randn(2, count, *shape, dtype=torch.float64, generator=generator)
    residual, weight = torch.randn(*shape, dtype=torch.float64), torch.randn(6, dtype=torch.float64)
    wanted, total = [], residual
    for x in brought:
        total = total + x.sum(0)
        wanted.append(weight * torch.rms_norm(total, [6], None, 1e-6))

    def run(channel: Channel, spoil: Callable[[Any], Any] = lambda total: total) -> list[Tensor]:
        found, total = [], residual
        for x in brought:
            finish = begin_sum_norm(channel, total, x[channel.coordinate], [6], weight, 1e-6, scales=True)
            total, normed = finish()  # type: ignore[assignment]
            total = spoil(total)
            found.append(normed)
        return found

    for takes in (lambda *given: None, by_rows):
        monkeypatch.setattr(Channel, "sum_norm_begin", takes)
        for found in on_ranks(count, run):
            torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)

    def shifted(total: OwnRows) -> OwnRows:
        return OwnRows(total.rows.roll(1, -1), total.shape)

    # negative control: the residual's rows count
    for found in on_ranks(count, lambda channel: run(channel, shifted)):
        torch.testing.assert_close(found[0], wanted[0], rtol=1e-12, atol=1e-12)
        assert not torch.allclose(found[1], wanted[1])


def test_rows_become_whole_where_the_next_sum_is_taken_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    brought = torch.randn(2, 2, 1, 5, 6, dtype=torch.float64)
    residual = torch.randn(1, 5, 6, dtype=torch.float64)

    def run(channel: Channel) -> tuple[Tensor, Tensor]:
        total, _ = by_rows(channel, brought[0, channel.coordinate], residual, None, 1e-6)()
        return begin_sum_norm(channel, total, brought[1, channel.coordinate], [6], None, 1e-6, scales=False)()  # type: ignore[return-value]

    for found in on_ranks(2, run):
        wanted = residual + brought.sum((0, 1))
        torch.testing.assert_close(found, (wanted, torch.rms_norm(wanted, [6], None, 1e-6)), rtol=1e-12, atol=1e-12)


def graph(*, read_besides: bool) -> fx.Graph:
    """Two sums with a norm each, the second on the total of the first."""
    made = fx.Graph()
    x, y, residual = (made.placeholder(name) for name in ("x", "y", "residual"))
    first = made.call_function(added_norm, (residual, made.call_function(torch.neg, (x,)), [6], None, 1e-6))
    total = made.call_function(operator.getitem, (first, 0))
    second = made.call_function(added_norm, (made.call_function(torch.neg, (y,)), total, [6], None, 1e-6))
    normed = made.call_function(operator.getitem, (second, 1))
    made.output((normed, total) if read_besides else (normed, made.call_function(operator.getitem, (first, 1))))
    return made


def names(made: fx.Graph, axes: Callable[[fx.Node], Any] = lambda node: "tp") -> list[str]:
    return [each.norm.name for each in sum_norms(made, (n for n in made.nodes if n.target is torch.neg), axes)]


def test_a_total_that_others_read_stays_whole() -> None:
    assert names(graph(read_besides=False)) == ["added_norm", "added_norm_1"]
    assert names(graph(read_besides=True)) == ["added_norm_1"]


def test_rows_of_other_ranks_are_no_residual() -> None:
    assert names(graph(read_besides=False), axes=lambda node: node.name) == ["added_norm_1"]


def test_a_prompt_in_turns_says_the_same_by_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(steps, "TURNS_ON", frozenset({"cpu"}))
    monkeypatch.setattr(steps, "TURNS_FROM", 2)
    called: list[bool] = []

    def counted(channel: Channel, x: Tensor, residual: Any, weight: Any, eps: float) -> Any:
        called.append(isinstance(residual, OwnRows))
        return by_rows(channel, x, residual, weight, eps)

    monkeypatch.setattr(Channel, "sum_norm_begin", counted)
    texts = prompts("llama", (9,))
    options = {"max_new_tokens": 4, "eos_token_id": [], "logprobs": True}
    wanted = compiled("llama", 1).generate(texts, **options)
    found = compiled("llama", 2).generate(texts, **options)
    assert {True, False} == set(called)  # on rows, and on the whole residual of the first
    assert torch.equal(found.sequences, wanted.sequences)
    torch.testing.assert_close(found.logprobs, wanted.logprobs, rtol=1e-10, atol=1e-10)
