"""What users hold: the engine of one rank, and the simulator of all of them."""

from runtime.engine.engine import Engine

__all__ = ["Engine"]
