"""Rows that ranks share out, and attention over tokens that they share out."""

from runtime.ops.rows.share_rows import collect_rows, row_counts, scatter_rows, take_rows

__all__ = ["collect_rows", "row_counts", "scatter_rows", "take_rows"]
