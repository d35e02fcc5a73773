"""Routed experts that ranks share out: what each rank computes of the choices of all tokens.

    localise_experts   index, gates [T, K]  ->  the same for one rank's experts; no communication
    expert_send        hidden [T, H], index, gates [T, K]  ->  rows for this rank's experts [R, H], [R, K], [R, K]
    expert_return      rows [R, H]  ->  [T, H]     one row from each rank that a token was sent to, summed

`experts` lists the experts of coordinate 0, then those of coordinate 1, and so on, each in ascending order; `counts`
says how many each has. Numbers may differ, and an expert may stand with several ranks (a copy): each token uses one of
them. A choice whose expert is elsewhere becomes "no expert" (the number of the rank's experts) with a gate of 0: what
an activation makes of rows of zeros must not count.

A token goes once to each rank that has one of its experts, whatever their number, and one row comes back from there
(arXiv:2412.19437, section 3.2.2, limits the number of nodes per token for the same reason).
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from runtime.ops.collectives import filling, unbound
from runtime.ops.kernels.experts import dispatch as kernels
from runtime.ops.kernels.experts.exchange import packed, returned, unpacked

__all__ = [
    "expert_return",
    "expert_send",
    "localise_experts",
    "receive_from_experts",
    "send_to_experts",
]


def localise_experts(
    index: Tensor, gates: Tensor, rank: int, *, axes: Sequence[str], experts: Sequence[int], counts: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """The choices of every token as coordinate `rank` of `axes` computes them; see the module's docstring.

    Every rank has the same tokens: of the copies of an expert, token t uses number t modulo their number.
    """
    owners = _owners(tuple(experts), tuple(counts), index.device)
    none = counts[rank]
    if kernels.takes(index):
        return kernels.localised(
            index, gates, owners.local[rank], owners.ranks, owners.copies, rank, none, owners.has_copies
        )
    expert = index.clamp(max=owners.local.shape[1] - 1)
    local = owners.local[rank][expert]
    if owners.has_copies:
        token = torch.arange(index.shape[0], device=index.device)[:, None]
        local = torch.where(owners.rank_of(expert, token) == rank, local, none)
    return local, torch.where(local < none, gates, 0)


def expert_send(
    hidden: Tensor,
    index: Tensor,
    gates: Tensor,
    axis: str | tuple[str, ...],
    *,
    experts: Sequence[int],
    counts: Sequence[int],
    ahead: bool = False,
    alike: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Rows, index and gates for the experts of this rank, from all ranks of `axis`; and the way back.

    ahead: they are on their way, and may be read once they are `landed`. alike: every rank brings as many tokens, so
    that there may be room for all of them, and no host waits for numbers; rows beyond those that came are of no expert.
    """
    unbound("expert_send", axis)


def expert_return(rows: Tensor, back: Tensor, axis: str | tuple[str, ...], *, ahead: bool = False) -> Tensor:
    """What the experts made of this rank's tokens; `back` is what expert_send gave with the rows. ahead: as there."""
    unbound("expert_return", axis)


def send_to_experts(
    channel: Any,
    hidden: Tensor,
    index: Tensor,
    gates: Tensor,
    *,
    experts: Sequence[int],
    counts: Sequence[int],
    ahead: bool = False,
    alike: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`expert_send` over a channel: the counts, then one message per (token, rank), as bytes."""
    if kernels.takes(hidden) and not torch.compiler.is_compiling():
        tokens = (hidden, index, gates)
        return _send_by_kernels(channel, tokens, tuple(experts), tuple(counts), ahead=ahead, alike=alike)  # type: ignore[return-value]
    owners = _owners(tuple(experts), tuple(counts), index.device)
    num_ranks, num_tokens = len(counts), hidden.shape[0]
    expert = index.clamp(max=owners.local.shape[1] - 1)
    token = torch.arange(num_tokens, device=index.device)
    to_rank = owners.rank_of(expert, token[:, None] + channel.coordinate)
    if owners.has_copies:  # its own copy, if this rank has one: that row does not travel
        mine = owners.local[channel.coordinate][expert] < counts[channel.coordinate]
        to_rank = torch.where(mine, channel.coordinate, to_rank)
    wanted = torch.zeros(num_tokens, num_ranks + 1, dtype=torch.bool, device=index.device)
    wanted.scatter_(1, to_rank, True)
    rank, sent = wanted[:, :num_ranks].t().nonzero(as_tuple=True)
    there = to_rank[sent] == rank[:, None]
    none = torch.tensor(counts, device=index.device)[rank][:, None]
    local = torch.where(there, owners.local[rank[:, None], expert[sent]], none)
    weights = torch.where(there, gates[sent], 0)

    send_counts = torch.bincount(rank, minlength=num_ranks)
    ones = [1] * num_ranks
    receive_counts = channel.all_to_all(send_counts, ones, ones)
    given, taken = send_counts.tolist(), receive_counts.tolist()
    parts: list[Tensor] = [hidden[sent], local.to(torch.int32), weights]
    message = torch.cat([_bytes(part) for part in parts], dim=1)
    widths = [part.shape[1] * part.element_size() for part in parts]
    size = torch.tensor([num_tokens], device=index.device)
    back = torch.cat([size, send_counts, receive_counts, sent])
    if ahead:
        handle = channel.all_to_all_begin(message, given, taken, sizes_from=channel.node)
        coming = [each.new_empty(sum(taken), each.shape[1]) for each in (hidden, index, gates)]

        def unpack(received: Tensor) -> None:
            for into, piece, part in zip(coming, torch.split(received, widths, dim=1), parts, strict=True):
                into.copy_(piece.clone(memory_format=torch.contiguous_format).view(part.dtype))

        filling(handle, unpack, *coming)
        return (*coming, back)  # type: ignore[return-value]
    received = channel.all_to_all(message, given, taken, sizes_from=channel.node)
    rows, local, weights = (
        piece.clone(memory_format=torch.contiguous_format).view(part.dtype)  # a part of a row need not be aligned
        for piece, part in zip(received.split(widths, dim=1), parts, strict=True)
    )
    return rows, local.to(index.dtype), weights, back


def receive_from_experts(channel: Any, rows: Tensor, back: Tensor, *, ahead: bool = False) -> Tensor:
    """`expert_return` over a channel. What comes back to a token is summed in order of coordinate."""
    if back.dim() == 2:
        return _return_by_kernels(channel, rows, back, ahead=ahead)
    num_ranks = len(channel.ranks)
    size, given, taken, sent = torch.split(back, [1, num_ranks, num_ranks, back.shape[0] - 1 - 2 * num_ranks])
    counts = taken.tolist(), given.tolist()
    found = rows.new_zeros(int(size), rows.shape[1])
    if ahead:
        handle = channel.all_to_all_begin(rows.contiguous(), *counts, sizes_from=channel.node)
        filling(handle, lambda returned: found.index_add_(0, sent, returned), found)
        return found
    return found.index_add_(0, sent, channel.all_to_all(rows.contiguous(), *counts, sizes_from=channel.node))


def _send_by_kernels(
    channel: Any,
    tokens: tuple[Tensor, Tensor, Tensor],
    experts: tuple[int, ...],
    counts: tuple[int, ...],
    *,
    ahead: bool,
    alike: bool,
) -> tuple[Tensor, ...]:
    """The same on a GPU. The host waits for the number of rows that come, once; not at all where ranks bring alike."""
    owners, own, num_ranks = _owners(experts, counts, tokens[0].device), channel.coordinate, len(counts)
    ones = [1] * num_ranks
    waits = not (alike and channel.counts_on_device)

    sent = packed(
        *tokens, local=owners.local, owner=owners.ranks, copies=owners.copies, held=owners.counts, own=own,
        own_held=counts[own], has_copies=owners.has_copies,
    )  # fmt: skip
    on_device = (sent.back[0], sent.back[1])
    sent.back[1].copy_(channel.all_to_all(sent.back[0], ones, ones))

    def unpack(came: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return unpacked(came, sent.back[1], sent.form, none=counts[own], like=tokens)

    if waits:
        given, taken = _numbers(sent.back)
        num_rows = sum(taken)
        handle = _sent(channel, sent.messages[: sum(given)], (given, taken), on_device, ahead=ahead)
    else:
        num_rows = num_ranks * tokens[0].shape[0]
        handle = _Done(channel.all_to_all_within(sent.messages, num_rows, *on_device))
    if handle.is_finished:
        return (*unpack(handle.finish()), sent.back)
    coming = [each.new_empty(num_rows, each.shape[1]) for each in tokens]
    filling(handle, lambda came: _fill(coming, unpack(came)), *coming)
    return (*coming, sent.back)


def _fill(into: Sequence[Tensor], parts: Sequence[Tensor]) -> None:
    for each, part in zip(into, parts, strict=True):
        each.copy_(part)


def _return_by_kernels(channel: Any, rows: Tensor, back: Tensor, *, ahead: bool) -> Tensor:
    given, taken, position = back[0], back[1], back[2:]
    rows = rows.contiguous()
    found = rows.new_empty(position.shape[0], rows.shape[1])
    if channel.counts_on_device:
        num_rows = sum(_on_host[back][0]) if back in _on_host else position.numel()
        return returned(channel.all_to_all_within(rows, num_rows, taken, given), position, found)
    counts = _numbers(back)[::-1]
    handle = _sent(channel, rows, counts, (taken, given), ahead=ahead)
    if not ahead:
        return returned(handle.finish(), position, found)
    filling(handle, lambda came: returned(came, position, found), found)
    return found


_on_host: Any = WeakIdKeyDictionary()
"""By what leads back, the numbers of rows that are sent and that come, where the host has read them."""


def _numbers(back: Tensor) -> tuple[list[int], list[int]]:
    if back not in _on_host:
        _on_host[back] = tuple(back[:2].tolist())
    return _on_host[back]  # type: ignore[no-any-return]


class _Done(NamedTuple):
    """What has come already."""

    result: Tensor
    is_finished: bool = True

    def finish(self) -> Tensor:
        return self.result


def _sent(
    channel: Any, x: Tensor, counts: tuple[list[int], list[int]], on_device: tuple[Tensor, Tensor], *, ahead: bool
) -> Any:
    if channel.counts_on_device:
        return _Done(channel.all_to_all_within(x, sum(counts[1]), *on_device))
    if ahead:
        return channel.all_to_all_begin(x, *counts, sizes_from=channel.node)
    return _Done(channel.all_to_all(x, *counts, sizes_from=channel.node))


def _bytes(x: Tensor) -> Tensor:
    """[N, bytes of a row]"""
    return x.contiguous().view(torch.uint8) if x.numel() else x.new_empty(_byte_shape(x), dtype=torch.uint8)


def _byte_shape(x: Tensor) -> tuple[int, int]:
    return x.shape[0], x.shape[1] * x.element_size()


class _Owners(NamedTuple):
    """By expert, and one more column for "no expert"."""

    local: Tensor
    """[ranks, E + 1]: its place among a rank's experts; the number of those where the rank does not have it."""
    ranks: Tensor
    """[E + 1, copies]: who has its copies."""
    copies: Tensor
    """[E + 1]: how many there are."""
    counts: Tensor
    """[ranks]: how many experts each has."""
    has_copies: bool

    def rank_of(self, expert: Tensor, turn: Tensor) -> Tensor:
        """Whose copy is used; the number of ranks where there is no expert."""
        if not self.has_copies:
            return self.ranks[expert, 0]
        return self.ranks[expert, turn % self.copies[expert]]


@functools.lru_cache(maxsize=256)
def _owners(experts: tuple[int, ...], counts: tuple[int, ...], device: torch.device) -> _Owners:
    num_experts, num_ranks = max(experts) + 1, len(counts)
    held: list[list[int]] = [[] for _ in range(num_experts)]
    local = [[count] * (num_experts + 1) for count in counts]
    start = 0
    for rank, count in enumerate(counts):
        for place, expert in enumerate(experts[start : start + count]):
            held[expert].append(rank)
            local[rank][expert] = place
        start += count
    most = max(map(len, held))
    ranks = [*(each + [num_ranks] * (most - len(each)) for each in held), [num_ranks] * most]
    copies = [*map(len, held), 1]
    return _Owners(
        torch.tensor(local, device=device),
        torch.tensor(ranks, device=device),
        torch.tensor(copies, device=device),
        torch.tensor(counts, device=device),
        has_copies=most > 1,
    )
