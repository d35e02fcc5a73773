"""What a rank remembers between runs, and the recurrences that make states of many tokens at once."""

from runtime.ops.state.gated_delta_rule import gated_delta_rule
from runtime.ops.state.gated_linear_attention import gated_linear_attention
from runtime.ops.state.selective_scan import selective_scan
from runtime.ops.state.states import cache_append, position_mask, rows_at, state_read, state_write

__all__ = [
    "cache_append", "gated_delta_rule", "gated_linear_attention", "position_mask", "rows_at", "selective_scan",
    "state_read", "state_write",
]  # fmt: skip
