"""Choosing the next token from logits whose vocabulary is split."""
