"""Tools as OpenAI's API has them: functions with a JSON schema, which of them may be called, and calls made before."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

__all__ = ["MadeCall", "Tool", "ToolChoice"]

_STRICT = ConfigDict(extra="forbid", strict=True, frozen=True)
_NO_ARGUMENTS: dict[str, Any] = {"type": "object", "properties": {}, "additionalProperties": False}

Name = Annotated[str, Field(pattern=r"^[a-zA-Z0-9_-]{1,64}$")]


class Function(BaseModel):
    """A function, and the schema of its arguments; without one it has none."""

    model_config = _STRICT
    name: Name
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None

    @property
    def schema_(self) -> dict[str, Any]:
        return self.parameters or _NO_ARGUMENTS


class Tool(BaseModel):
    """Other kinds than functions are not offered."""

    model_config = _STRICT
    type: Literal["function"]
    function: Function

    @property
    def data(self) -> dict[str, Any]:
        """As templates take it."""
        said: dict[str, Any] = {"name": self.function.name}
        if self.function.description is not None:
            said["description"] = self.function.description
        return {"type": "function", "function": {**said, "parameters": self.function.schema_}}


class ChosenFunction(BaseModel):
    model_config = _STRICT
    name: Name


class NamedTool(BaseModel):
    """The function that must be called."""

    model_config = _STRICT
    type: Literal["function"]
    function: ChosenFunction


ToolChoice = Literal["none", "auto", "required"] | NamedTool


class CalledFunction(BaseModel):
    model_config = _STRICT
    name: Name
    arguments: str


class MadeCall(BaseModel):
    """A call in a message of the assistant."""

    model_config = _STRICT
    id: Annotated[str, Field(min_length=1, max_length=128)]
    type: Literal["function"]
    function: CalledFunction
