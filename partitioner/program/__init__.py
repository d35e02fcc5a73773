"""What all the others speak of: the Program, its values, weights and states; the Plan; the ranks that come of both."""

from partitioner.program.program import Entry, Input, Origins, PerRankInt, Program, State, Value, Weight

__all__ = ["Entry", "Input", "Origins", "PerRankInt", "Program", "State", "Value", "Weight"]
