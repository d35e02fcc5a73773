"""Masks are recognised by what they answer, and only where they answer as one we know throughout."""

import pytest
import torch
from transformers.masking_utils import (
    and_masks,
    bidirectional_mask_function,
    blockwise_overlay,
    causal_mask_function,
    chunked_causal_mask_function,
    or_masks,
    packed_sequence_mask_function,
    sliding_window_bidirectional_mask_function,
    sliding_window_causal_mask_function,
    sliding_window_overlay,
)

from partitioner.capture.trace.recognise_masks import MaskKind, recognize

NO_PADDING = torch.zeros(2, dtype=torch.long)


@pytest.mark.parametrize(
    ("function", "kind"),
    [
        (causal_mask_function, MaskKind(causal=True)),
        (bidirectional_mask_function, MaskKind(causal=False)),
        (sliding_window_causal_mask_function(1), MaskKind(causal=True, window=1)),
        (sliding_window_causal_mask_function(7), MaskKind(causal=True, window=7)),
        (sliding_window_causal_mask_function(131072), MaskKind(causal=True, window=131072)),
        # transformers counts the distance, we count the positions
        (sliding_window_bidirectional_mask_function(64), MaskKind(causal=False, window=65)),
        (chunked_causal_mask_function(8192, NO_PADDING), MaskKind(causal=True, chunk=8192)),
        (chunked_causal_mask_function(5, NO_PADDING), MaskKind(causal=True, chunk=5)),
    ],
)
def test_known(function: object, kind: MaskKind) -> None:
    assert recognize(function, batch=2) == kind


@pytest.mark.parametrize(
    "function",
    [
        sliding_window_overlay(8),  # looks ahead without end
        and_masks(causal_mask_function, packed_sequence_mask_function(torch.zeros(2, 64))),
        or_masks(causal_mask_function, blockwise_overlay(torch.zeros(2, 64))),
        or_masks(causal_mask_function, lambda b, h, q, k: k < 4),  # a prefix that all see
        and_masks(causal_mask_function, lambda b, h, q, k: k != 700),
        and_masks(causal_mask_function, lambda b, h, q, k: (b == 0) | (k > 0)),  # differs between rows of the batch
        lambda b, h, q, k: k > q,
    ],
)
def test_unknown(function: object) -> None:
    assert recognize(function, batch=2) is None
