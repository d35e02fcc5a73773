"""What may be asked: the bodies of /v1/chat/completions and /v1/completions, checked field by field.

A field that OpenAI does not have is refused, as OpenAI does, but for four that models here take: top_k, min_p,
repetition_penalty, ignore_eos. Fields that say something about an account or a bill (user, metadata, store, ...) are
read and change nothing. What would change the answer and is not offered (images, sound, ...) is refused by name,
unless its value asks for nothing.

Lists fail with their first wrong entry: of a body with a million of them, an error for each takes gigabytes.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from partitioner.serving.openai.tools import MadeCall, NamedTool, Tool, ToolChoice

__all__ = ["ChatRequest", "CompletionRequest", "GenerationFields", "Message", "StreamOptions"]

_STRICT = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, frozen=True)
_MOST_STOPS = 16
_LONGEST_STOP = 1000
_BIAS = 100.0
_MOST_BIASES = 1024
_MOST_TOOLS = 128

Count = Annotated[int, Field(ge=1, lt=2**31)]
TokenId = Annotated[int, Field(ge=0, lt=2**31)]
Ids = Annotated[list[TokenId], Field(fail_fast=True)]
Biases = dict[str, Annotated[float, Field(ge=-_BIAS, le=_BIAS)]]
Penalty = Annotated[float, Field(ge=-2, le=2)]
Stop = Annotated[str, Field(min_length=1, max_length=_LONGEST_STOP)]


class StreamOptions(BaseModel):
    """`include_usage`: one more event at the end that counts tokens."""

    model_config = _STRICT
    include_usage: bool = False
    include_obfuscation: bool = False


class GenerationFields(BaseModel):
    """What both kinds of request have."""

    model_config = _STRICT
    model: str
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    max_tokens: Count | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None
    n: Annotated[int, Field(ge=1, le=128)] | None = 1
    stop: Stop | Annotated[list[Stop], Field(fail_fast=True, max_length=_MOST_STOPS)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    logit_bias: Annotated[Biases, Field(max_length=_MOST_BIASES)] | None = None
    # ours
    top_k: Annotated[int, Field(ge=-1, lt=2**31)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=100)] | None = None
    ignore_eos: bool | None = False
    # read, and without effect here
    user: str | None = None
    metadata: dict[str, str] | None = None
    store: bool | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None

    @model_validator(mode="after")
    def _together(self) -> Self:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options is for stream=true")
        return self

    @property
    def stops(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @property
    def with_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage


class TextPart(BaseModel):
    """A piece of a message; other kinds (images, sound, files) are not offered."""

    model_config = _STRICT
    type: Literal["text"]
    text: str


class Message(BaseModel):
    """One message of a chat."""

    model_config = _STRICT
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | Annotated[list[TextPart], Field(fail_fast=True)] | None = None
    name: str | None = None
    refusal: None = None
    tool_calls: Annotated[list[MadeCall], Field(fail_fast=True, max_length=_MOST_TOOLS)] | None = None
    tool_call_id: str | None = None
    # what answers of OpenAI's have as well, with nothing in it
    audio: None = None
    function_call: None = None
    annotations: Annotated[list[Any], Field(max_length=0)] | None = None

    @model_validator(mode="after")
    def _by_role(self) -> Self:
        if self.tool_calls and self.role != "assistant":
            raise ValueError(f"tool_calls are in messages of the role 'assistant', not {self.role!r}")
        if (self.tool_call_id is not None) != (self.role == "tool"):
            raise ValueError("tool_call_id is for messages of the role 'tool', which need it")
        return self

    @property
    def text(self) -> str:
        if isinstance(self.content, list):
            return "".join(part.text for part in self.content)
        return self.content or ""


class SchemaFormat(BaseModel):
    """A JSON schema with a name. strict or not, the answer is valid by it."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)
    name: Annotated[str, Field(min_length=1, max_length=64)]
    description: str | None = None
    schema_: Annotated[dict[str, Any], Field(alias="schema")] = {}
    strict: bool | None = None


class ResponseFormat(BaseModel):
    """`text` asks for nothing."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)
    type: Literal["text", "json_object", "json_schema"]
    json_schema: SchemaFormat | None = None

    @model_validator(mode="after")
    def _schema(self) -> Self:
        if (self.json_schema is not None) != (self.type == "json_schema"):
            raise ValueError("json_schema is for the type 'json_schema', which needs it")
        return self


class ChatRequest(GenerationFields):
    """The body of /v1/chat/completions."""

    messages: Annotated[list[Message], Field(fail_fast=True, min_length=1)]
    max_completion_tokens: Count | None = None
    logprobs: bool | None = False
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    response_format: ResponseFormat | None = None
    tools: Annotated[list[Tool], Field(fail_fast=True, max_length=_MOST_TOOLS)] | None = None
    tool_choice: ToolChoice | None = None
    parallel_tool_calls: bool | None = None
    # not offered, unless they ask for nothing
    functions: list[Any] | None = None
    function_call: Any = None
    modalities: Annotated[list[str], Field(fail_fast=True)] | None = None
    audio: Any = None
    prediction: Any = None
    web_search_options: Any = None
    reasoning_effort: str | None = None
    verbosity: str | None = None

    @model_validator(mode="after")
    def _offered(self) -> Self:
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs=true")
        if self.max_tokens is not None and self.max_completion_tokens is not None:
            raise ValueError("max_tokens and max_completion_tokens say the same: give one of them")
        if self.schema_asked is not None and self.ignore_eos:
            raise ValueError("ignore_eos goes on after an end, and an answer in the form of response_format has one")
        return self

    @model_validator(mode="after")
    def _tools(self) -> Self:
        names = [tool.function.name for tool in self.tools or ()]
        if len(set(names)) < len(names):
            raise ValueError(f"two tools have the same name: {', '.join(names)}")
        if not names and self.tool_choice not in (None, "none", "auto"):
            raise ValueError("tool_choice is for tools, and there are none")
        if isinstance(self.tool_choice, NamedTool) and self.tool_choice.function.name not in names:
            raise ValueError(f"tool_choice names {self.tool_choice.function.name!r}, and tools has {', '.join(names)}")
        if self.must_call and self.ignore_eos:
            raise ValueError("ignore_eos goes on after an end, and an answer that must be a call has one")
        if self.callable and not self.must_call and self.schema_asked is not None:
            raise ValueError(
                "response_format beside tools that may be called is not offered: an answer in its form is no call; "
                "give tool_choice 'none' or 'required'"
            )
        return self

    @property
    def callable(self) -> list[Tool]:
        """The tools that the answer may call."""
        if isinstance(self.tool_choice, NamedTool):
            return [tool for tool in self.tools or () if tool.function.name == self.tool_choice.function.name]
        return [] if self.tool_choice == "none" else list(self.tools or ())

    @property
    def must_call(self) -> bool:
        return bool(self.tools) and (self.tool_choice == "required" or isinstance(self.tool_choice, NamedTool))

    def not_offered(self) -> str | None:
        """The name of a field that asks for something that there is not."""
        asked = {
            "functions": bool(self.functions),
            "function_call": self.function_call not in (None, "none", "auto"),
            "modalities": self.modalities not in (None, ["text"]),
            "audio": self.audio is not None,
            "prediction": self.prediction is not None,
            "web_search_options": self.web_search_options is not None,
            "reasoning_effort": self.reasoning_effort not in (None, "none"),
            "verbosity": self.verbosity not in (None, "medium"),
        }
        return next((name for name, is_asked in asked.items() if is_asked), None)

    @property
    def schema_asked(self) -> dict[str, Any] | None:
        """The JSON schema by which the answer must be valid; None: any text will do."""
        form = self.response_format
        if form is None or form.type == "text":
            return None
        return {"type": "object"} if form.json_schema is None else form.json_schema.schema_

    @property
    def most_tokens(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens


class CompletionRequest(GenerationFields):
    """The body of /v1/completions."""

    prompt: str | Annotated[list[str], Field(fail_fast=True)] | Ids | Annotated[list[Ids], Field(fail_fast=True)]
    logprobs: Annotated[int, Field(ge=0, le=5)] | None = None
    echo: bool | None = False
    best_of: Annotated[int, Field(ge=1, le=128)] | None = None
    suffix: str | None = None

    def not_offered(self) -> str | None:
        """The name of a field that asks for something that there is not."""
        asked = {
            "suffix": bool(self.suffix),
            "best_of": self.best_of is not None and self.best_of != (self.n or 1),
            "echo": bool(self.echo) and self.logprobs is not None,
        }
        return next((name for name, is_asked in asked.items() if is_asked), None)

    @property
    def most_tokens(self) -> int:
        return self.max_tokens or 16  # as OpenAI has it

    @property
    def prompts(self) -> list[str] | list[list[int]]:
        """One entry per prompt: a text, or ids."""
        given: Any = self.prompt
        if isinstance(given, str) or (given and isinstance(given[0], int)):
            given = [given]
        return list(given)
