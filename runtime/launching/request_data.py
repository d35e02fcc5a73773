"""A request as plain data, for a rank in another process: its rows and its settings, complete and checked.

Stop strings stay behind. They need a tokenizer, and whoever hears of every token can tell where a row ends; what a row
is told does not depend on when another ended.
"""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import Any

import torch

from runtime.generation.generation_options import Settings
from runtime.generation.generation_request import GenerationRequest
from runtime.generation.token_rules import TokenRules
from runtime.sampling.sampling_options import Sampling

__all__ = ["read_request", "request_data"]


def request_data(request: GenerationRequest) -> dict[str, Any]:
    """What `read_request` reads, after JSON."""
    settings = replace(request.settings, stop_strings=(), tokenizer=None)
    return {
        "prompts": request.prompts,
        "numbers": request.numbers,
        "width": request.ids.shape[1],
        "settings": asdict(settings),
    }


def read_request(data: dict[str, Any]) -> GenerationRequest:
    fields = {name: _tuples(value) for name, value in data["settings"].items()}
    sampling = Sampling(**{name: _tuples(value) for name, value in fields.pop("sampling").items()})
    rules = TokenRules(**{name: _tuples(value) for name, value in fields.pop("rules").items()})
    prompts: tuple[tuple[int, ...], ...] = _tuples(data["prompts"])
    # rules count from the width of the whole batch; what the rows were padded with, nothing reads
    ids = torch.zeros((len(prompts), data["width"]), dtype=torch.int64)
    numbers: tuple[int, ...] = _tuples(data["numbers"])
    return GenerationRequest(prompts, ids, Settings(**fields, sampling=sampling, rules=rules), numbers=numbers)


def _tuples(value: Any) -> Any:
    return tuple(map(_tuples, value)) if isinstance(value, (list, tuple)) else value
