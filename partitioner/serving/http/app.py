"""The application: what is at which path. See docs/serving.md.

POST /v1/chat/completions, /v1/completions     GET /v1/models, /v1/models/NAME
GET /health                                    503 where no request can be answered; ?every=1: a replica is lost
GET /metrics                                   for Prometheus
"""

from __future__ import annotations

import logging
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import aclosing
from typing import Any, TypeVar

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from pydantic import ValidationError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import JSONResponse, Response

from partitioner.errors import PartitionerError
from partitioner.serving.http.choices import Choice, pieces_of
from partitioner.serving.http.limits import BodyLimit
from partitioner.serving.http.merged import merged
from partitioner.serving.http.metrics import CONTENT_TYPE
from partitioner.serving.http.prepare import chat_choices, completion_choices
from partitioner.serving.http.respond import EventStream, while_connected
from partitioner.serving.http.service import Service
from partitioner.serving.openai.answers import Answer, ChatAnswer, CompletionAnswer, Piece, Usage, model_list
from partitioner.serving.openai.errors import ApiError, invalid, of_exception, of_validation, shown
from partitioner.serving.openai.requests import ChatRequest, CompletionRequest, GenerationFields

__all__ = ["create_app"]

_log = logging.getLogger("partitioner.serving")
_CLIENT_LEFT = 499
Asked = TypeVar("Asked", ChatRequest, CompletionRequest)


def create_app(service: Service) -> FastAPI:
    """Answers requests by `service`."""
    app = FastAPI(title="partitioner", docs_url=None, redoc_url=None)

    async def chat(request: Request) -> Response:
        asked = _read(request, ChatRequest, await request.body())
        choices = await chat_choices(service, asked)
        answer = ChatAnswer(service.name, Usage(), bool(asked.logprobs), asked.with_usage)
        return await _answered(request, asked, choices, answer)

    async def completions(request: Request) -> Response:
        asked = _read(request, CompletionRequest, await request.body())
        choices = await completion_choices(service, asked)
        answer = CompletionAnswer(service.name, Usage(), asked.logprobs is not None, asked.with_usage)
        return await _answered(request, asked, choices, answer)

    async def _answered(
        request: Request, asked: GenerationFields, choices: Sequence[Choice], answer: Answer
    ) -> Response:
        answer.usage.prompt = sum(len(choice.prompt) for choice in choices[:: asked.n or 1])
        service.metrics.prompt_tokens.inc(answer.usage.prompt)
        if asked.stream:
            events = merged(_events(service, choices, answer))
            # the first is waited for, so that what is refused has a status of its own
            first = await while_connected(request.receive, anext(events))
            left = service.metrics.left.inc
            return EventStream(first, events, left=left, timeout_s=service.limits.request_s)
        return JSONResponse(await while_connected(request.receive, _whole(service, choices, answer)))

    _post(app, service, "/v1/chat/completions", chat, ChatRequest)
    _post(app, service, "/v1/completions", completions, CompletionRequest)
    _get(app, service)
    _errors(app, service)
    app.add_middleware(BodyLimit, limits=service.limits)
    return app


async def _whole(service: Service, choices: Sequence[Choice], answer: Answer) -> dict[str, Any]:
    pieces: list[list[Piece]] = [[] for _ in choices]
    async with service.admitted(len(choices)), aclosing(_pieces(service, choices, answer)) as come:
        async for piece in come:
            pieces[piece.index].append(piece)
    return answer.whole(pieces)


async def _events(service: Service, choices: Sequence[Choice], answer: Answer) -> AsyncGenerator[dict[str, Any]]:
    async with service.admitted(len(choices)), aclosing(_pieces(service, choices, answer)) as come:
        begun: set[int] = set()
        async for piece in come:
            if piece.index not in begun:
                begun.add(piece.index)
                if (first := answer.first(piece.index)) is not None:
                    yield first
            if (
                isinstance(answer, ChatAnswer)
                and piece.reason is not None
                and (piece.text or piece.tokens or piece.calls)
            ):
                # the event with the reason has no text, as OpenAI has it
                yield answer.event(Piece(piece.index, piece.text, piece.tokens, None, piece.calls))
                yield answer.event(Piece(piece.index, "", (), piece.reason))
            else:
                yield answer.event(piece)
        if (last := answer.last()) is not None:
            yield last


def _pieces(service: Service, choices: Sequence[Choice], answer: Answer) -> AsyncGenerator[Piece]:
    return pieces_of(choices, service.llm, service.tokenizer, answer.usage, service.metrics)


def _read(request: Request, kind: type[Asked], body: bytes) -> Asked:
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise invalid("The body must be JSON, with the header 'Content-Type: application/json'.", status=415)
    try:
        return kind.model_validate_json(body)
    except ValidationError as error:
        raise of_validation(error) from error


def _post(
    app: FastAPI,
    service: Service,
    path: str,
    answer: Callable[[Request], Awaitable[Response]],
    kind: type[GenerationFields],
) -> None:
    async def guarded(request: Request) -> Response:
        service.keys.require(request.headers.get("authorization"))
        service.require_open()
        try:
            response = await answer(request)
        except ClientDisconnect:
            service.metrics.left.inc()
            return Response(status_code=_CLIENT_LEFT)
        service.metrics.requests.labels(path, "200").inc()
        return response

    schema = {"content": {"application/json": {"schema": kind.model_json_schema()}}, "required": True}
    app.add_api_route(path, guarded, methods=["POST"], response_model=None, openapi_extra={"requestBody": schema})


def _get(app: FastAPI, service: Service) -> None:
    models = model_list(service.name, service.created)

    @app.get("/v1/models")
    async def list_models(request: Request) -> dict[str, Any]:
        service.keys.require(request.headers.get("authorization"))
        return models

    @app.get("/v1/models/{name:path}")
    async def one_model(request: Request, name: str) -> dict[str, Any]:
        service.keys.require(request.headers.get("authorization"))
        if name != service.name:
            raise invalid(
                f"The model '{shown(name)}' does not exist.", status=404, param="model", code="model_not_found"
            )
        found: dict[str, Any] = models["data"][0]
        return found

    @app.get("/health")
    async def health(every: bool = False) -> Response:
        status, body = service.health(every=every)
        return JSONResponse(body, status_code=status)

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(service.metrics.text(service.replicas(), service.llm.status()), media_type=CONTENT_TYPE)


def _errors(app: FastAPI, service: Service) -> None:
    def respond(request: Request, error: ApiError) -> Response:
        path = request.scope["path"] if request.scope.get("route") is not None else "unknown"
        service.metrics.requests.labels(path, str(error.status)).inc()
        headers = {"connection": "close"} if error.code == "shutting_down" else {}
        if error.status in (429, 503):
            headers["retry-after"] = "1"
        return JSONResponse(error.body, status_code=error.status, headers=headers)

    @app.exception_handler(HTTPException)
    async def of_framework(request: Request, error: HTTPException) -> Response:
        said = f"{request.method} {shown(request.scope['path'])}: {error.detail}"
        return respond(request, invalid(said, status=error.status_code))

    @app.exception_handler(Exception)
    async def of_anything(request: Request, error: Exception) -> Response:
        failure = of_exception(error)
        if failure.status == 500:
            _log.error("a request has failed", exc_info=error)
        return respond(request, failure)

    @app.exception_handler(RequestValidationError)
    async def of_parameters(request: Request, error: RequestValidationError) -> Response:
        return respond(request, invalid(f"{error.errors()[0]['loc'][-1]}: {error.errors()[0]['msg']}"))

    for kind in (ApiError, PartitionerError):
        app.add_exception_handler(kind, of_anything)
