"""Proofs about tokens: whether they depend on each other, on their number, or on the cache's size."""
