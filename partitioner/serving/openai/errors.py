"""Errors as OpenAI's clients read them: a status, and a body that says what, which field, and which kind.

    {"error": {"message": "...", "type": "invalid_request_error", "param": "temperature", "code": null}}

    400 invalid_request_error    a field is wrong, unknown or not offered; the text is too long
    401 invalid_request_error    no key, or a wrong one (code invalid_api_key)
    404 invalid_request_error    no such path, or model (code model_not_found)
    408, 413                     a body that does not come, or is too large
    429 rate_limit_error         as many requests as are taken wait already (code queue_full)
    500 server_error             a fault of ours; its text stays in the log
    503 server_error             no replica is left, or the server is ending (codes replica_lost, shutting_down)
    504 server_error             not done in the time that a request may take (code timeout)

A stream that has begun has sent its status: what goes wrong later comes as an event with this body.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pydantic import ValidationError

from partitioner.errors import CommunicationError, InputError, PartitionerError, SamplingError

__all__ = ["ApiError", "invalid", "of_exception", "of_validation", "shown"]

_SHOWN = 80
"""Characters of a value that an error repeats."""


class ApiError(Exception):
    """What is answered in place of a result."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        kind: str = "server_error",
        param: str | None = None,
        code: str | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.kind, self.param, self.code = status, message, kind, param, code

    @property
    def body(self) -> dict[str, Any]:
        return {"error": {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}}


def invalid(message: str, *, param: str | None = None, code: str | None = None, status: int = 400) -> ApiError:
    """The request is wrong, and would be so tomorrow."""
    return ApiError(status, message, kind="invalid_request_error", param=param, code=code)


def of_validation(error: ValidationError) -> ApiError:
    """The first thing that pydantic found, in the words that OpenAI has for it."""
    found = error.errors(include_url=False, include_context=False)
    # where a field may be of several kinds, the one that the value came furthest with; of those the one that it is of
    first = max(
        (each for each in found if each["loc"][:1] == found[0]["loc"][:1]),
        key=lambda each: (len(_parts(each["loc"])), not each["type"].endswith("_type")),
    )
    where = shown(_place(first["loc"]))
    if first["type"] == "json_invalid":
        return invalid(f"We could not parse the JSON body of your request: {first['msg']}")
    if first["type"] == "extra_forbidden":
        return invalid(f"Unrecognized request argument supplied: {where}", param=where, code="unknown_parameter")
    if first["type"] == "missing":
        return invalid(f"Missing required parameter: '{where}'.", param=where, code="missing_required_parameter")
    said = first["msg"].removeprefix("Value error, ")
    if not where:  # of the body as a whole, which is not repeated
        return invalid(f"Invalid request: {said}", code="invalid_value")
    return invalid(
        f"Invalid value for '{where}': {said}; got {shown(repr(first['input']))}", param=where, code="invalid_value"
    )


def shown(text: str) -> str:
    """As much of what a client has sent as an error repeats."""
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."


def of_exception(error: BaseException) -> ApiError:
    """What the model's ranks, or our code, raised."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, (InputError, SamplingError)):
        return invalid(str(error))
    if isinstance(error, CommunicationError):
        return ApiError(503, f"The model was lost while it worked on this request: {error}", code="replica_lost")
    if isinstance(error, PartitionerError):
        return ApiError(500, str(error))
    return ApiError(500, "The server had an error while processing your request; its log says which.")


def _place(location: Sequence[int | str]) -> str:
    """`messages[0].content`."""
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in _parts(location)).removeprefix(".")


def _parts(location: Sequence[int | str]) -> list[int | str]:
    """Names of alternatives, which are ours, are left out."""
    kinds = ("str", "int", "list", "dict", "bool", "float")
    return [part for part in location if isinstance(part, int) or (part.isidentifier() and part not in kinds)]
