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

from runtime.ops.kernels.experts.dispatch import sorted_choices, summed

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
    send_counts: Tensor
    """int64 [n], on the device."""
    position: Tensor
    """int32 [T, n]: which message is a token's for a rank; -1: none."""
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
        counts = torch.zeros(num_ranks, dtype=torch.int64, device=device)
        return Packed(messages, counts, torch.empty(0, num_ranks, dtype=torch.int32, device=device), form)
    index, hidden, gates = index.contiguous(), _with_rows(hidden), _with_rows(gates)
    scratch = torch.empty(tokens * (num_ranks + 2 * form.choices), dtype=torch.int32, device=device)
    ranks, owners, places = torch.split(scratch, [tokens * num_ranks, index.numel(), index.numel()])
    exchange_kernel.route[(-(-tokens // _TOKENS),)](
        index, local, owner, copies, ranks, owners, places, tokens, local.shape[1] - 1, owner.shape[1], own, own_held,
        RANKS=num_ranks, CHOICES=form.choices, COPIES=has_copies, TOKENS=_TOKENS, num_warps=4,
    )  # fmt: skip
    _, position, send_counts = sorted_choices(ranks, num_ranks)
    block = min(2 * _BLOCK, 1 << (form.width - 1).bit_length())
    exchange_kernel.pack[(tokens, -(-form.width // block))](
        hidden, gates, owners, places, position, held, messages.view(torch.uint8), form.width, hidden.stride(0),
        gates.stride(0), form.row_bytes, form.start_of_index, form.start_of_gates, RANKS=num_ranks,
        CHOICES=form.choices, LANES=1 << (form.choices - 1).bit_length(), BLOCK=block, num_warps=4,
    )  # fmt: skip
    return Packed(messages, send_counts, position.view(tokens, num_ranks), form)


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
        exchange_kernel.unpack[(-(-local.numel() // _BLOCK),)](
            messages.view(torch.uint8), receive_counts, local, kept, local.numel(), none, form.row_bytes,
            form.start_of_index, form.start_of_gates, RANKS=receive_counts.shape[0], CHOICES=form.choices,
            BLOCK=_BLOCK, num_warps=4,
        )  # fmt: skip
    return messages.view(hidden.dtype)[:, : form.width], local, kept


def returned(rows: Tensor, position: Tensor, out: Tensor) -> Tensor:
    """Into out [T, H]: of rows [M, H], which stand as the messages stood, those at position [T, n]."""
    return summed(rows, position, None, out, position.shape[1]) if out.numel() else out


def _with_rows(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _up(num_bytes: int) -> int:
    return -(-num_bytes // _ALIGNED) * _ALIGNED
