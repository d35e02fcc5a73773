"""Continuous batching: the scheduler, where sequences lie in the cache, and their next tokens."""
