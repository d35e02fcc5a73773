"""Routed experts on a GPU: few launches, and what depends on data stays on the device."""
