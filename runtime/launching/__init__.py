"""Replicas of a model on this machine, started and served by one process that is no rank itself."""
