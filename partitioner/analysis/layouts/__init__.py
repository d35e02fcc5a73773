"""The layout of every value: inferred op by op, propagated through the graph, moves made local."""
