"""The model as a graph that continues sequences, by its own use of a cache."""
