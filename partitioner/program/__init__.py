"""The Program with its values, weights and states; the Plan; the ranks of both: what all other rooms use."""

from partitioner.program.program import Entry, Input, Origins, PerRankInt, Program, State, Value, Weight

__all__ = ["Entry", "Input", "Origins", "PerRankInt", "Program", "State", "Value", "Weight"]
