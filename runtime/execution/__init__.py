"""One rank's graph, bound to weights and collectives and run; and records of what it did."""
