"""Fusion on a GPU: chains of elementwise ops, and products with norms before and gates behind them."""
