"""One pass per file; each rewrites the graph of a Program for one kind of parallelism.

Passes never import each other. Their order, and which plans need which, is in
`partitioner/compile/pass_manager/pass_order.py`.
"""
