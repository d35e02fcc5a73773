"""From a checked request to the rows that answer it: texts become tokens, lengths are checked."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

from partitioner.errors import InputError
from partitioner.serving.http.choices import Choice
from partitioner.serving.http.service import NotOffered, Service
from partitioner.serving.openai.errors import invalid
from partitioner.serving.openai.options import generate_options
from partitioner.serving.openai.requests import ChatRequest, CompletionRequest, GenerationFields
from partitioner.serving.text.chat_template import TemplateFailed

__all__ = ["chat_choices", "completion_choices"]


async def chat_choices(service: Service, request: ChatRequest) -> list[Choice]:
    """The rows of a chat."""
    _require_model(service, request, request.not_offered())
    messages = [_message(message.role, message.text, message.name) for message in request.messages]
    prompt = await asyncio.to_thread(_chat_ids, service, messages)
    scores = (request.top_logprobs or 0) if request.logprobs else None
    grammar = None
    if (schema := request.schema_asked) is not None:
        grammar = await asyncio.to_thread(_grammar, service, schema)
    return _choices(service, request, [prompt], ["messages"], request.most_tokens, scores, grammar=grammar)


async def completion_choices(service: Service, request: CompletionRequest) -> list[Choice]:
    """The rows of a completion: `n` of each prompt, those of the first prompt first."""
    _require_model(service, request, request.not_offered())
    prompts = request.prompts
    if not prompts:
        raise invalid("prompt must hold at least one text.", param="prompt")
    if len(prompts) * (request.n or 1) > service.limits.max_choices:
        raise _too_many(service, len(prompts) * (request.n or 1))
    ids = await asyncio.to_thread(lambda: [_ids(service.tokenizer, prompt) for prompt in prompts])
    texts = [""] * len(ids)
    if request.echo:
        texts = [
            prompt if isinstance(prompt, str) else _decoded(service.tokenizer, prompt) for prompt in request.prompts
        ]
    names = ["prompt"] if len(ids) == 1 else [f"prompt[{number}]" for number in range(len(ids))]
    return _choices(service, request, ids, names, request.most_tokens, request.logprobs, texts)


def _choices(
    service: Service,
    request: GenerationFields,
    prompts: Sequence[list[int]],
    names: Sequence[str],
    most: int | None,
    scores: int | None,
    texts: Sequence[str] = ("",),
    grammar: str | None = None,
) -> list[Choice]:
    n = request.n or 1
    if len(prompts) * n > service.limits.max_choices:
        raise _too_many(service, len(prompts) * n)
    own = service.generation
    ends = frozenset(() if request.ignore_eos else own["eos_token_id"])
    of_model = own.get("stop_strings") or ()
    stops = (*request.stops, *((of_model,) if isinstance(of_model, str) else of_model))
    found = []
    for number, (prompt, name) in enumerate(zip(prompts, names, strict=True)):
        new = _new_tokens(service, prompt, name, most)
        for index in range(number * n, (number + 1) * n):
            options = generate_options(request, own, max_new_tokens=new, top_logprobs=scores)
            # the same seed must not say the same n times
            options["request_ids"] = [index]
            if grammar is not None:
                options["grammar"] = grammar
            found.append(Choice(index, prompt, options, ends, stops, texts[number]))
    return found


def _grammar(service: Service, schema: dict[str, Any]) -> str:
    """Of JSON that is valid by a schema."""
    try:
        return service.grammars(schema)
    except NotOffered as error:
        raise invalid(
            f"'response_format' is not offered by this server: {error}",
            param="response_format",
            code="unsupported_parameter",
        ) from error
    except InputError as error:
        raise invalid(
            f"Invalid value for 'response_format': {error}", param="response_format", code="invalid_value"
        ) from error


def _new_tokens(service: Service, prompt: Sequence[int], name: str, most: int | None) -> int:
    """How many tokens may be written after a prompt."""
    longest = service.limits.max_length
    if not prompt:
        raise invalid(f"{name} is empty: there must be at least one token.", param=name)
    asked = 1 if most is None else most
    if len(prompt) + asked > longest:
        raise invalid(
            f"This model's maximum context length is {longest} tokens. However, you requested {len(prompt) + asked} "
            f"tokens ({len(prompt)} in {name}, {asked} in the answer). Please reduce the length of either.",
            param=name,
            code="context_length_exceeded",
        )
    return longest - len(prompt) if most is None else most


def _require_model(service: Service, request: GenerationFields, not_offered: str | None) -> None:
    if request.model != service.name:
        raise invalid(
            f"The model '{request.model}' does not exist; here is '{service.name}'.",
            param="model",
            code="model_not_found",
            status=404,
        )
    if not_offered is not None:
        raise invalid(
            f"'{not_offered}' is not offered by this server with this value.",
            param=not_offered,
            code="unsupported_parameter",
        )


def _too_many(service: Service, rows: int) -> Exception:
    most = service.limits.max_choices
    return invalid(f"A request may have {most} choices, its prompts times n; this one has {rows}.", param="n")


def _message(role: str, text: str, name: str | None) -> dict[str, str]:
    # newer clients say developer where templates say system
    message = {"role": "system" if role == "developer" else role, "content": text}
    return message if name is None else {**message, "name": name}


def _chat_ids(service: Service, messages: list[dict[str, str]]) -> list[int]:
    tokenizer = service.tokenizer
    if tokenizer.chat_template is None:
        raise invalid(
            "This model has no chat template, so it cannot take messages: ask /v1/completions, or start the server "
            "with --chat-template FILE.",
            param="messages",
        )
    try:
        text = service.chats.render(messages)
    except TemplateFailed as error:
        raise invalid(f"The model's chat template refuses these messages: {error}", param="messages") from error
    # the template has written the special tokens
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def _ids(tokenizer: Any, prompt: str | list[int]) -> list[int]:
    return list(tokenizer(prompt)["input_ids"]) if isinstance(prompt, str) else prompt


def _decoded(tokenizer: Any, ids: list[int]) -> str:
    return str(tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))
