"""An exchange of tokens on a GPU: what is sent is found, packed and unpacked by the kernels of `exchange_kernel`.

    packed     a rank's tokens      ->  messages in order of the rank that gets them, their numbers, and the way back
    unpacked   messages that came   ->  rows, index and gates, as `expert_send` yields them
    returned   rows that came back  ->  their sums [T, H], in order of the rank that they came from

Numbers stay on the device; the host needs them where it makes room for messages, unless it knows a bound.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from runtime.ops.kernels.experts.dispatch import sort_choices, summed
from runtime.ops.kernels.triton_needs import launch

__all__ = ["Form", "Packed", "packed", "returned", "unpacked"]

_ALIGNED = 16
_TOKENS, _BLOCK = 128, 1024


class Form(NamedTuple):
    """Of a message; numbers of bytes."""

    width: int
    choices: int
    start_of_index: int
    start_of_gates: int
    row_bytes: int

    @classmethod
    def of(cls, hidden: Tensor, gates: Tensor) -> Form:
        width, choices = hidden.shape[1], gates.shape[1]
        index = _up(width * hidden.element_size())
        weights = index + _up(choices * torch.int32.itemsize)
        return cls(width, choices, index, weights, weights + _up(choices * gates.element_size()))


class Packed(NamedTuple):
    messages: Tensor
    """int64 [most, bytes of a message / 8]; the first ones are filled."""
    back: Tensor
    """int64 [2 + T, n], on the device, of each rank: how many messages go there, room for how many come from there, and
    which message is a token's; -1: none."""
    form: Form


def packed(
    hidden: Tensor,
    index: Tensor,
    gates: Tensor,
    *,
    local: Tensor,
    owner: Tensor,
    copies: Tensor,
    held: Tensor,
    own: int,
    own_held: int,
    has_copies: bool,
) -> Packed:
    """Local [n, E + 1], owner [E + 1, most], copies [E + 1]: see the kernels. held [n]: experts of each rank; own,
    own_held: this rank and how many it has.
    """
    from runtime.ops.kernels.experts import exchange_kernel  # Triton comes with torch for GPUs only

    num_ranks, tokens, device = local.shape[0], hidden.shape[0], hidden.device
    form = Form.of(hidden, gates)
    most = tokens * min(num_ranks, form.choices)
    messages = torch.empty(most, form.row_bytes // 8, dtype=torch.int64, device=device)
    if not tokens:
        return Packed(messages, torch.zeros(2, num_ranks, dtype=torch.int64, device=device), form)
    back = torch.empty(2 + tokens, num_ranks, dtype=torch.int64, device=device)
    index, hidden, gates = index.contiguous(), _with_rows(hidden), _with_rows(gates)
    scratch = torch.empty(tokens * (num_ranks + 2 * form.choices), dtype=torch.int32, device=device)
    ranks, owners, places = torch.split(scratch, [tokens * num_ranks, index.numel(), index.numel()])
    numbers = (tokens, local.shape[1] - 1, owner.shape[1], own, own_held)
    launch(
        exchange_kernel.route,
        (-(-tokens // _TOKENS), 1, 1),
        (index, local, owner, copies, ranks, owners, places, *numbers),
        RANKS=num_ranks,
        CHOICES=form.choices,
        COPIES=has_copies,
        TOKENS=_TOKENS,
    )
    unread = torch.empty(ranks.numel() + num_ranks, dtype=torch.int32, device=device)
    order, ends = unread[: ranks.numel()], unread[ranks.numel() :]
    sort_choices(ranks, num_ranks, order, back[2:], back[0], ends)
    block = min(2 * _BLOCK, 1 << (form.width - 1).bit_length())
    measures = (form.width, hidden.stride(0), gates.stride(0), form.row_bytes, form.start_of_index, form.start_of_gates)
    launch(
        exchange_kernel.pack,
        (tokens, -(-form.width // block), 1),
        (hidden, gates, owners, places, back[2:], held, messages.view(torch.uint8), *measures),
        RANKS=num_ranks,
        CHOICES=form.choices,
        LANES=1 << (form.choices - 1).bit_length(),
        BLOCK=block,
    )
    return Packed(messages, back, form)


def unpacked(
    messages: Tensor, receive_counts: Tensor, form: Form, *, none: int, like: tuple[Tensor, Tensor, Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    """Rows [R, H], index and gates [R, K], of the dtypes of `like`; rows are a part of the messages."""
    from runtime.ops.kernels.experts import exchange_kernel

    hidden, index, gates = like
    num_rows = messages.shape[0]
    local = torch.empty(num_rows, form.choices, dtype=index.dtype, device=messages.device)
    kept = torch.empty(num_rows, form.choices, dtype=gates.dtype, device=messages.device)
    if num_rows:
        numbers = (local.numel(), none, form.row_bytes, form.start_of_index, form.start_of_gates)
        launch(
            exchange_kernel.unpack,
            (-(-local.numel() // _BLOCK), 1, 1),
            (messages.view(torch.uint8), receive_counts, local, kept, *numbers),
            RANKS=receive_counts.shape[0],
            CHOICES=form.choices,
            BLOCK=_BLOCK,
        )
    return messages.view(hidden.dtype)[:, : form.width], local, kept


def returned(rows: Tensor, position: Tensor, out: Tensor) -> Tensor:
    """Into out [T, H]: of rows [M, H], which stand as the messages stood, those at position [T, n]."""
    return summed(rows, position, None, out, position.shape[1]) if out.numel() else out


def _with_rows(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _up(num_bytes: int) -> int:
    return -(-num_bytes // _ALIGNED) * _ALIGNED
