"""From a checked request to the rows that answer it: texts become tokens, lengths are checked."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from partitioner.errors import InputError
from partitioner.serving.grammar.check import Checks
from partitioner.serving.http.choices import Choice
from partitioner.serving.http.service import NotOffered, Service
from partitioner.serving.openai.errors import invalid, shown
from partitioner.serving.openai.options import generate_options
from partitioner.serving.openai.requests import ChatRequest, CompletionRequest, GenerationFields
from partitioner.serving.text.chat_template import TemplateFailed
from partitioner.serving.tools.call_form import CallForm
from partitioner.serving.tools.conversation import has_calls, template_messages
from partitioner.serving.tools.tool_use import ToolUse

__all__ = ["chat_choices", "completion_choices"]


async def chat_choices(service: Service, request: ChatRequest) -> list[Choice]:
    """The rows of a chat."""
    _require_model(service, request, request.not_offered())
    form = None
    if request.callable or has_calls(request.messages):
        form = await asyncio.to_thread(_call_form, service, "tools" if request.callable else "messages")
    messages = template_messages(request.messages, form)
    tools = [tool.data for tool in request.tools or ()] if request.callable else None
    prompt = await service.on_texts(lambda: _chat_ids(service, messages, tools))
    scores = (request.top_logprobs or 0) if request.logprobs else None
    use = grammar = None
    if request.callable and form is not None:
        use = ToolUse.of(request, form, service.tokenizer)
    if use is not None and request.must_call:
        write = partial(use.grammar, request, service.tokenizer)
        grammar = await asyncio.to_thread(_grammar, service, lambda checks: checks.passed(write()), "tools")
    elif (schema := request.schema_asked) is not None:
        grammar = await asyncio.to_thread(_grammar, service, lambda checks: checks.grammar(schema), "response_format")
    return _choices(service, request, [prompt], ["messages"], request.most_tokens, scores, grammar=grammar, tools=use)


async def completion_choices(service: Service, request: CompletionRequest) -> list[Choice]:
    """The rows of a completion: `n` of each prompt, those of the first prompt first."""
    _require_model(service, request, request.not_offered())
    prompts = request.prompts
    if not prompts:
        raise invalid("prompt must hold at least one text.", param="prompt")
    if len(prompts) * (request.n or 1) > service.limits.max_choices:
        raise _too_many(service, len(prompts) * (request.n or 1))
    names = ["prompt"] if len(prompts) == 1 else [f"prompt[{number}]" for number in range(len(prompts))]
    prompt: Any
    for name, prompt in zip(names, prompts, strict=True):
        if isinstance(prompt, str):
            _require_short(service, prompt, name)
        else:
            _new_tokens(service, prompt, name, request.most_tokens)
    ids: list[list[int]] = [[] if isinstance(prompt, str) else prompt for prompt in prompts]
    texts = [prompt if isinstance(prompt, str) and request.echo else "" for prompt in prompts]
    if any(isinstance(prompt, str) for prompt in prompts):
        ids = await service.on_texts(lambda: [_ids(service.tokenizer, prompt) for prompt in prompts])
    elif request.echo:
        texts = await service.on_texts(lambda: [_decoded(service.tokenizer, prompt) for prompt in ids])
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
    tools: ToolUse | None = None,
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
            found.append(Choice(index, prompt, options, ends, stops, texts[number], tools))
    return found


def _call_form(service: Service, param: str) -> CallForm:
    _require_template(service)
    try:
        return service.call_forms.form()
    except InputError as error:
        raise invalid(
            f"'{param}' with calls of tools: not offered by this server: {error}",
            param=param,
            code="unsupported_parameter",
        ) from error


def _grammar(service: Service, make: Callable[[Checks], str], param: str) -> str:
    """What `make` makes of the model's grammars."""
    try:
        return make(service.grammars())
    except NotOffered as error:
        said = f"'{param}' is not offered by this server: {error}"
        if param == "tools":
            said += "; with tool_choice 'auto' it is"
        raise invalid(said, param=param, code="unsupported_parameter") from error
    except InputError as error:
        raise invalid(f"Invalid value for '{param}': {error}", param=param, code="invalid_value") from error


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


def _require_short(service: Service, text: str, name: str) -> None:
    if len(text) > service.limits.most_letters:
        raise invalid(
            f"This model's maximum context length is {service.limits.max_length} tokens. However, {name} has "
            f"{len(text)} letters, and more than {service.limits.most_letters} are not made into tokens. Please reduce "
            "its length.",
            param=name,
            code="context_length_exceeded",
        )


def _require_model(service: Service, request: GenerationFields, not_offered: str | None) -> None:
    if request.model != service.name:
        raise invalid(
            f"The model '{shown(request.model)}' does not exist; here is '{service.name}'.",
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


def _require_template(service: Service) -> None:
    if service.tokenizer.chat_template is None:
        raise invalid(
            "This model has no chat template, so it cannot take messages: ask /v1/completions, or start the server "
            "with --chat-template FILE.",
            param="messages",
        )


def _chat_ids(service: Service, messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None) -> list[int]:
    _require_template(service)
    try:
        text = service.chats.render(messages, tools=tools)
    except TemplateFailed as error:
        raise invalid(f"The model's chat template refuses these messages: {error}", param="messages") from error
    _require_short(service, text, "messages")
    # the template has written the special tokens
    return list(service.tokenizer(text, add_special_tokens=False)["input_ids"])


def _ids(tokenizer: Any, prompt: Any) -> list[int]:
    return list(tokenizer(prompt)["input_ids"])


def _decoded(tokenizer: Any, ids: list[int]) -> str:
    return str(tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))
