"""One pass per file; each rewrites the graph of a Program for one kind of parallelism.

Passes never import each other. `partitioner/compile/pass_order.py` has their order, and which plans need which.
"""
