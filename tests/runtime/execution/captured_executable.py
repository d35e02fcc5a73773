"""An executable as in captured steps, where nothing can be captured."""

from typing import Any

from runtime.execution.executable import Executable


class Captured(Executable):
    def __init__(self, *given: Any, **named: Any) -> None:
        super().__init__(*given, **{**named, "captured": True})
