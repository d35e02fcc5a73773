"""Collectives between ranks: over process groups, shared memory, or threads of one process."""
