"""What all the others speak of: the Program, its values, weights and states; the Plan; the ranks that come of both.

Nothing is imported here: a Plan needs no torch, and a Program does.
"""
