"""The kernels that bring tokens to experts, in Triton's interpreter: what the plain form yields, and to the bit where
nothing is summed. On a GPU: `tests/gpu/kernels/test_expert_kernels.py`.
"""

from __future__ import annotations

import pytest

from tests.runtime.ops.kernels.in_tritons_interpreter import assert_interpreted, needs_triton

INTERPRETED = """
import functools, threading
import torch
from runtime.ops.collectives import landed
from runtime.ops import expert_exchange
from runtime.ops.expert_exchange import _owners, localise_experts
from runtime.ops.experts import expert_combine, expert_dispatch
from runtime.ops.kernels.experts import dispatch
from tests.runtime.ops import test_expert_exchange as cases

torch.manual_seed(0)
for tokens, choices, num_experts, width, dtype in [
    (1, 2, 5, 33, torch.float32), (70, 8, 6, 40, torch.float32), (90, 7, 5, 16, torch.float64),
    (0, 2, 3, 4, torch.float32),
]:
    hidden, index = torch.randn(tokens, width, dtype=dtype), torch.randint(0, num_experts + 2, (tokens, choices))
    gates = torch.rand(tokens, choices, dtype=dtype)
    rows, order, counts = expert_dispatch(hidden, index, num_experts)
    found = dispatch.dispatched(hidden, index, num_experts)
    own = int(counts.sum())
    assert torch.equal(found[2], counts) and torch.equal(found[0][:own], rows[:own])
    assert torch.equal(found[1][:own], order[:own]) and bool((found[1][own:] < 0).all())
    assert torch.equal((-1 - found[1][own:]).sort()[0], order[own:].sort()[0])
    rows[own:] = 0
    found[0][own:] = torch.nan  # must not be read
    expected = expert_combine(rows, order, gates)
    torch.testing.assert_close(dispatch.combined(found[0], found[1], gates), expected)
    torch.testing.assert_close(dispatch.combined(found[0][:own], found[1][:own], gates), expected)
    if own < index.numel():  # the control: a slot that says nothing of its row
        wrong = torch.where(found[1] < 0, -1 - found[1], found[1])
        assert not torch.allclose(dispatch.combined(found[0], wrong, gates), expected)

for held, counts in [((0, 1, 2, 3, 4), (2, 3)), ((0, 1, 2, 1, 2, 3, 4, 1), (3, 4, 1))]:
    index, gates = torch.randint(0, 7, (50, 3)), torch.rand(50, 3)
    for rank in range(len(counts)):
        expected = localise_experts(index, gates, rank, axes=("ep",), experts=held, counts=counts)
        owners = _owners(held, counts, index.device)
        found = dispatch.localised(
            index, gates, owners.local[rank], owners.ranks, owners.copies, rank, counts[rank], owners.has_copies
        )
        assert all(map(torch.equal, found, expected))

# the whole exchange, over threads; the interpreter is one thread's at a time
lock = threading.RLock()
def alone(run):
    @functools.wraps(run)
    def locked(*args, **options):
        with lock:
            return run(*args, **options)
    return locked
for module, names in ((expert_exchange, ("packed", "unpacked", "returned")), (dispatch, ("dispatched", "combined"))):
    for name in names:
        setattr(module, name, alone(getattr(module, name)))
given = cases.make(5, 6, 3, seed=3)
expected = cases.experts(*given)
dispatch.takes = lambda *tensors: True
for owners, cuts in [([[0, 1, 2], [3, 4, 5]], [2]), ([[0, 1, 2], [2, 3, 4, 5, 0], []], [0, 3])]:
    assert cases.close(cases.exchanged(given, owners, cuts), expected)


class CountsOnDevice:
    # A channel as GPUs have it that write into each other's memory: what nobody sent is no number.

    counts_on_device = True

    def __init__(self, channel):
        self.channel = channel

    def __getattr__(self, name):
        return getattr(self.channel, name)

    def all_to_all_within(self, x, num_rows, send_counts, receive_counts):
        given, taken = send_counts.tolist(), receive_counts.tolist()
        came = self.channel.all_to_all(x[: sum(given)], given, taken, sizes_from=self.channel.node)
        out = torch.full((num_rows, *x.shape[1:]), torch.nan if x.is_floating_point() else -1, dtype=x.dtype)
        out[: len(came)] = came
        return out


given = cases.make(6, 6, 3, seed=4)
expected = cases.experts(*given)
owners = [[0, 1, 2], [3, 4, 5]]
for how in [{}, {"alike": True}, {"ahead": True}]:  # under way or not is all one where devices exchange
    def rank(number):
        def work(communicator):
            send, back_channel = (CountsOnDevice(communicator.channel("ep", node=node)) for node in ("send", "return"))
            own = slice(3 * number, 3 * number + 3)
            tokens = [each[own] for each in given[:3]]
            *sent, back = expert_exchange.send_to_experts(send, *tokens, **cases.flat(owners), **how)
            rows, local, kept = map(landed, sent)
            assert len(rows) == 6 if how.get("alike") else len(rows) <= 6
            made = cases.experts(rows, local, kept, given[3][owners[number]], given[4][owners[number]], trim=True)
            ahead = how.get("ahead", False)
            return landed(expert_exchange.receive_from_experts(back_channel, made, back, ahead=ahead))
        return work
    found = cases.run(cases.ThreadGroup(cases.Mesh.of(ep=2, dp=2)), rank(0), rank(1))
    assert cases.close(torch.cat(found), expected), (how, found)
"""


@pytest.mark.slow
@needs_triton
def test_the_kernels_are_the_plain_form_in_tritons_interpreter() -> None:
    assert_interpreted(INTERPRETED, timeout_s=300)
