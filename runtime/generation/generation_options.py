"""What a user may ask of generation, under the names of transformers' GenerationConfig.

max_new_tokens=20        how many tokens to add at most
do_sample=False          draw tokens; otherwise the likeliest one each time (greedy)
temperature, top_k, top_p, min_p, repetition_penalty    as in `runtime.sampling.sampling_options`
seed=0                   the same seed gives the same tokens, on any plan and in any batch
request_ids=None         one number per prompt, which tells equal prompts apart; None: their places in the batch
eos_token_id=None        an id or several after which a sequence ends; None: the model's own; [] or -1: none
pad_token_id=None        fills up sequences that ended; None: the first eos id, or 0
stop_strings=None        texts after which a sequence ends; needs `tokenizer`
tokenizer=None
output_logits... are not offered; logprobs=True returns the log-probability of each new token as well
input_ids, inputs        the prompts, by transformers' names
num_beams=1, ...         what changes no token is taken too: see `runtime.generation.neutral_options`
prefill_step=512         how many tokens of each prompt are run at a time
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypedDict

from torch import Tensor

from partitioner.errors import InputError
from runtime.generation.neutral_options import without_neutral
from runtime.sampling.sampling_options import Sampling

__all__ = ["Options", "Settings"]


class Options(TypedDict, total=False):
    """The keywords of `generate`; see the module's docstring."""

    input_ids: Any
    inputs: Any
    max_new_tokens: int
    do_sample: bool
    temperature: float
    top_k: int | None
    top_p: float
    min_p: float | None
    repetition_penalty: float
    seed: int
    request_ids: Sequence[int] | None
    eos_token_id: int | Sequence[int] | None
    pad_token_id: int | None
    stop_strings: str | Sequence[str] | None
    tokenizer: Any
    logprobs: bool
    prefill_step: int
    num_beams: int
    num_return_sequences: int
    use_cache: bool


_NOT_OFFERED = {
    "num_beams": "beam search", "num_return_sequences": "several sequences per prompt", "penalty_alpha":
    "contrastive search", "assistant_model": "assisted generation", "constraints": "constrained beam search",
    "prompt_lookup_num_tokens": "prompt lookup", "typical_p": "typical sampling", "epsilon_cutoff": "epsilon sampling",
    "eta_cutoff": "eta sampling", "no_repeat_ngram_size": "forbidding n-grams", "bad_words_ids": "forbidding words",
    "logits_processor": "processors of your own", "stopping_criteria": "criteria of your own",
    "guidance_scale": "classifier-free guidance", "streamer": "streamers: use stream()",
    "max_length": "a total length: give max_new_tokens", "min_new_tokens": "a least number of tokens",
    "generation_config": "a GenerationConfig: give its fields as keywords",
    "token_type_ids": "types of tokens: call the tokenizer with return_token_type_ids=False",
    "position_ids": "positions of your own: they follow from the prompts",
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The options of one call, complete and checked."""

    max_new_tokens: int = 20
    sampling: Sampling = dataclasses.field(default_factory=Sampling)
    request_ids: tuple[int, ...] | None = None
    eos_token_id: tuple[int, ...] = ()
    pad_token_id: int = 0
    stop_strings: tuple[str, ...] = ()
    tokenizer: Any = None
    logprobs: bool = False
    prefill_step: int = 512

    @classmethod
    def of(cls, options: Mapping[str, Any], *, eos_token_id: tuple[int, ...]) -> Settings:
        """`eos_token_id`: the model's own."""
        of_sampling = {field.name for field in dataclasses.fields(Sampling)}
        own = {field.name for field in dataclasses.fields(cls)} - {"sampling"}
        given = without_neutral(options, own | of_sampling)
        for name in given:
            if name in _NOT_OFFERED:
                raise InputError(f"generate() does not offer {name!r} ({_NOT_OFFERED[name]})")
            if name not in own | of_sampling:
                near = difflib.get_close_matches(name, own | of_sampling, n=1)
                hint = f"did you mean {near[0]!r}?" if near else f"options: {', '.join(sorted(own | of_sampling))}"
                raise InputError(f"generate() has no option {name!r}; {hint}")
        sampling = Sampling(**{name: given.pop(name) for name in of_sampling & given.keys()})
        ends = given.pop("eos_token_id", None)
        ends = eos_token_id if ends is None else _ends(ends)
        pad = given.pop("pad_token_id", None)
        if pad is not None:
            (pad,) = _integers("pad_token_id", [pad])
        stops = given.pop("stop_strings", None) or ()
        stops = (stops,) if isinstance(stops, str) else stops
        if not isinstance(stops, (list, tuple)) or not all(isinstance(stop, str) for stop in stops):
            raise InputError(f"stop_strings must be a text or a list of texts, got {stops!r}")
        if "" in stops:
            raise InputError("stop_strings must not be empty: every text contains one that is")
        requests = given.pop("request_ids", None)
        return cls(
            **given,
            sampling=sampling,
            eos_token_id=ends,
            pad_token_id=pad if pad is not None else ends[0] if ends else 0,
            stop_strings=tuple(stops),
            request_ids=None if requests is None else _integers("request_ids", requests),
        )

    def __post_init__(self) -> None:
        for name in ("max_new_tokens", "prefill_step"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value < 2**31:
                raise InputError(f"{name} must be a whole number, at least 1; got {value!r}")
        if not isinstance(self.logprobs, bool):
            raise InputError(f"logprobs must be True or False, got {self.logprobs!r}")
        if self.stop_strings and self.tokenizer is None:
            raise InputError("stop_strings are texts: give tokenizer= as well, to know what the tokens say")


def _ends(given: Any) -> tuple[int, ...]:
    """Ids; -1 is that of no token, so that nothing ends there."""
    if isinstance(given, Tensor):
        given = given.reshape(-1).tolist() if given.dim() <= 1 else given.tolist()
    given = [given] if isinstance(given, int) else given
    if isinstance(given, (list, tuple)):
        given = [end for end in given if end != -1]
    return _integers("eos_token_id", given)


def _integers(name: str, given: Any) -> tuple[int, ...]:
    """Ids, as Python integers that fit into 64 bits."""
    if isinstance(given, Tensor):
        given = given.reshape(-1).tolist() if given.dim() <= 1 else given.tolist()
    right = isinstance(given, (list, tuple, range)) and all(
        isinstance(i, int) and not isinstance(i, bool) and 0 <= i < 2**63 for i in given
    )
    if not right:
        raise InputError(f"{name} must be whole numbers from 0 on, got {given!r}")
    return tuple(given)
