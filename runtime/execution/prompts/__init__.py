"""Prompts as they run on several ranks: two halves in turn, sums with their norms by rows, pieces captured once."""
