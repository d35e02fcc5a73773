"""Graphs that continue sequences, traced from the model's own use of a cache."""
