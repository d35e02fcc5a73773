"""The Program with its values, weights and states; the Plan; the ranks of both: what all other rooms use.

Nothing is imported here: a Plan needs no torch, and a Program does.
"""
