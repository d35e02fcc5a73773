"""One rank's graph, bound to weights and collectives, run, and recorded."""
