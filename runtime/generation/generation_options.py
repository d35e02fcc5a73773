"""What a user may ask of generation, under the names of transformers' GenerationConfig.

max_new_tokens=20        how many tokens to add at most; or max_length, with the prompt
do_sample=False          draw tokens; otherwise the likeliest one each time (greedy)
temperature, top_k, top_p, min_p, typical_p, epsilon_cutoff, eta_cutoff, repetition_penalty
                         as in `runtime.sampling.sampling_options`
no_repeat_ngram_size, bad_words_ids, suppress_tokens, begin_suppress_tokens, min_new_tokens, min_length,
forced_bos_token_id, forced_eos_token_id, logit_bias, presence_penalty, frequency_penalty
                         as in `runtime.generation.token_rules`
seed=0                   the same seed gives the same tokens, on any plan and in any batch
request_ids=None         one number per prompt, which tells equal prompts apart; None: their places in the batch
eos_token_id=None        an id or several after which a sequence ends; None: the model's own; [] or -1: none
pad_token_id=None        fills up sequences that ended; None: the model's own, the first eos id, or 0
stop_strings=None        texts after which a sequence ends; needs `tokenizer`
tokenizer=None
logprobs=False           True: the log-probability of each new token as well
top_logprobs=None        of ranks that `partitioner.launch` started: how many of the most probable tokens to name at
                         each step, beside the one that was taken, with their log-probabilities by the model alone
grammar=None             of ranks that `partitioner.launch` started with a vocabulary: the text that is written is a
                         word of it; see `runtime.sampling.grammar`
input_ids, inputs        the prompts, by transformers' names
prefill_step=None        how many tokens of each prompt are run at a time; None: by device and memory
pipeline_groups=None     over pipeline stages, in how many groups rows take turns; None: as many as there are stages.
                         With one more, transfers take no time of their own (`runtime.pipeline.relay`)

What is not given is what the model's generation config says (generation_config.json), as transformers takes it. Other
names of GenerationConfig are taken where their values change nothing, and refused otherwise: `not_offered.py`.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypedDict

from torch import Tensor

from partitioner.errors import InputError
from runtime.generation.not_offered import NOT_OFFERED, SAMPLING_ONLY, refuse_not_offered
from runtime.generation.token_rules import TokenRules
from runtime.sampling.grammar import LONGEST_GRAMMAR
from runtime.sampling.row_sampler import RowOptions
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
    typical_p: float | None
    epsilon_cutoff: float | None
    eta_cutoff: float | None
    repetition_penalty: float
    max_length: int | None
    min_length: int | None
    min_new_tokens: int | None
    no_repeat_ngram_size: int | None
    bad_words_ids: Sequence[Sequence[int]] | None
    suppress_tokens: Sequence[int] | None
    begin_suppress_tokens: Sequence[int] | None
    forced_bos_token_id: int | None
    forced_eos_token_id: int | Sequence[int] | None
    logit_bias: Mapping[int, float] | None
    presence_penalty: float
    frequency_penalty: float
    seed: int
    request_ids: Sequence[int] | None
    eos_token_id: int | Sequence[int] | None
    pad_token_id: int | None
    stop_strings: str | Sequence[str] | None
    tokenizer: Any
    logprobs: bool
    top_logprobs: int | None
    grammar: str | None
    prefill_step: int | None
    pipeline_groups: int | None
    num_beams: int
    num_return_sequences: int
    use_cache: bool


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The options of one call, complete and checked."""

    max_new_tokens: int = 20
    sampling: Sampling = dataclasses.field(default_factory=Sampling)
    rules: TokenRules = dataclasses.field(default_factory=TokenRules)
    request_ids: tuple[int, ...] | None = None
    eos_token_id: tuple[int, ...] = ()
    pad_token_id: int = 0
    stop_strings: tuple[str, ...] = ()
    tokenizer: Any = None
    logprobs: bool = False
    top_logprobs: int | None = None
    grammar: str | None = None
    prefill_step: int | None = None
    pipeline_groups: int | None = None

    @classmethod
    def of(
        cls,
        options: Mapping[str, Any],
        *,
        eos_token_id: tuple[int, ...],
        model: Mapping[str, Any] | None = None,
        width: int = 1,
    ) -> Settings:
        """`eos_token_id`: the model's own; `model`: what else its generation config says. width: of the prompts."""
        given = _complete(options, model or {})
        names = {field.name for field in dataclasses.fields(Sampling)}
        sampling = Sampling(**{name: given.pop(name) for name in names & given.keys()})
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
        longest = given.pop("max_length", None)
        if longest is not None and given.get("max_new_tokens") is None:
            given["max_new_tokens"] = _new_tokens(longest, width)
        return cls(
            rules=_rules(given),
            **{name: value for name, value in given.items() if name != "max_new_tokens" or value is not None},
            sampling=sampling,
            eos_token_id=ends,
            pad_token_id=pad if pad is not None else ends[0] if ends else 0,
            stop_strings=tuple(stops),
            request_ids=None if requests is None else _integers("request_ids", requests),
        )

    def row_options(self, text: Sequence[int], step: int, request_id: int) -> RowOptions:
        """What a row asks of its choice number `step`, behind `text`; without what `TokenRules.on_host` names."""
        rules = self.rules
        options = RowOptions(
            self.sampling,
            request_id,
            scored=self.logprobs,
            presence_penalty=rules.presence_penalty,
            frequency_penalty=rules.frequency_penalty,
            bias=rules.logit_bias,
            banned=rules.banned_alone(self.eos_token_id),
        )
        return self.at(options, text, step)

    def at(self, options: RowOptions, text: Sequence[int], step: int) -> RowOptions:
        """The options of the same row at another choice."""
        counts = options.presence_penalty or options.frequency_penalty
        return options.at(
            step,
            text if self.sampling.repetition_penalty != 1 else (),
            text[len(text) - step :] if counts else (),
        )

    def __post_init__(self) -> None:
        for name in ("max_new_tokens", "prefill_step", "pipeline_groups"):
            value = getattr(self, name)
            if name != "max_new_tokens" and value is None:
                continue
            if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value < 2**31:
                raise InputError(f"{name} must be a whole number, at least 1; got {value!r}")
        if not isinstance(self.logprobs, bool):
            raise InputError(f"logprobs must be True or False, got {self.logprobs!r}")
        most = self.top_logprobs
        if most is not None and (isinstance(most, bool) or not isinstance(most, int) or not 0 <= most <= _MOST_NAMED):
            raise InputError(f"top_logprobs must be None or a whole number up to {_MOST_NAMED}, got {most!r}")
        if self.grammar is not None and not (isinstance(self.grammar, str) and len(self.grammar) <= LONGEST_GRAMMAR):
            raise InputError(f"grammar must be None or a text of up to {LONGEST_GRAMMAR} characters")
        if self.stop_strings and self.tokenizer is None:
            raise InputError("stop_strings are texts: give tokenizer= as well, to know what the tokens say")


_MOST_NAMED = 1000
_LENGTHS = ("max_new_tokens", "max_length")
_RULES = {field.name for field in dataclasses.fields(TokenRules)}


def _complete(options: Mapping[str, Any], model: Mapping[str, Any]) -> dict[str, Any]:
    """The options that are offered: as they are given, or else as the model's generation config has them."""
    own = {field.name for field in dataclasses.fields(Settings)} - {"sampling", "rules"}
    known = own | _RULES | {field.name for field in dataclasses.fields(Sampling)} | {"max_length"}
    for name in options:
        if name not in known and name not in NOT_OFFERED:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"options: {', '.join(sorted(known))}"
            raise InputError(f"generate() has no option {name!r}; {hint}")
    refuse_not_offered(options, of_the_model=False)
    rest = {name: value for name, value in model.items() if name not in options and value is not None}
    if any(options.get(name) is not None for name in _LENGTHS):
        rest = {name: value for name, value in rest.items() if name not in _LENGTHS}
    if not options.get("do_sample", rest.get("do_sample", False)):
        rest = {name: value for name, value in rest.items() if name not in SAMPLING_ONLY}
    pad = rest.get("pad_token_id")
    if isinstance(pad, int) and pad < 0:  # how configurations say that there is none
        del rest["pad_token_id"]
    refuse_not_offered(rest, of_the_model=True)
    given = {**{name: value for name, value in rest.items() if name in known}, **options}
    return {name: value for name, value in given.items() if name in known}


def _new_tokens(longest: Any, width: int) -> int:
    if not isinstance(longest, int) or isinstance(longest, bool) or longest <= width:
        raise InputError(
            f"max_length must be a whole number of tokens, above the {width} that the prompts have; got {longest!r}: "
            "give max_new_tokens"
        )
    return longest - width


def _rules(given: dict[str, Any]) -> TokenRules:
    """Takes its options out of `given`."""
    found: dict[str, Any] = {}
    for name in _RULES & given.keys():
        value = given.pop(name)
        if value is None:
            continue
        if name in ("no_repeat_ngram_size", "min_new_tokens", "min_length"):
            (found[name],) = _integers(name, [value])
        elif name in ("presence_penalty", "frequency_penalty"):
            found[name] = _finite(name, value)
        elif name == "logit_bias":
            if not isinstance(value, Mapping):
                raise InputError(f"logit_bias must map ids to numbers, got {value!r}")
            ids = _integers(name, sorted(value))
            found[name] = tuple((token, _finite(name, value[token])) for token in ids)
        elif name == "bad_words_ids":
            if not isinstance(value, (list, tuple)) or not all(value):
                raise InputError(f"bad_words_ids must be a list of lists of ids, none of them empty; got {value!r}")
            found[name] = tuple(_integers(name, word) for word in value)
        else:
            found[name] = _integers(name, [value] if isinstance(value, int) else value)
    return TokenRules(**found)


def _finite(name: str, given: Any) -> float:
    if isinstance(given, bool) or not isinstance(given, (int, float)) or not math.isfinite(given):
        raise InputError(f"{name} must be a number, got {given!r}")
    return float(given)


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
