"""Attention of parts, put together."""
