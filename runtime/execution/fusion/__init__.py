"""Ops that become one: chains of elementwise ops, and products with what stands before and behind them."""
