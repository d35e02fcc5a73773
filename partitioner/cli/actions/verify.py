"""Verify: the partitioned model against the original, at several lengths and precisions.

    verify(Case("config:tiny.json", Compile(tp=2)))                              all ranks in this process
    verify_in_processes(Case("config:tiny.json", Compile(tp=2)), timeout_s=60)   one process per rank, over gloo
    cache_losses(Case(.., cache_dtype="fp8"))                                    a cache of that dtype against bfloat16

The original in eager mode is the reference; where an outcome is not within its tolerance, `explain` names the first
node that differs. Comparing in float64 separates a wrong result from a rounded one.
"""

from __future__ import annotations

import contextlib
import functools
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from partitioner.analysis.report.report import Report
from partitioner.cli.jobs.compile import Compile
from partitioner.cli.jobs.verify import Case
from partitioner.compile.compare import Divergence, difference, first_divergence, tolerance
from partitioner.compile.partition import compile_program
from partitioner.compile.parts import Parts
from partitioner.compile.tracing.trace import trace
from partitioner.errors import InputError, WeightError
from partitioner.proof.float64 import ExactArithmetic, in_float64
from partitioner.storage.dtypes import dtype_named
from partitioner.storage.named_model import load_config, load_model
from runtime.kv_cache.cache_size import CacheSize
from runtime.processes.capacity import require_threads
from runtime.processes.launch import launch
from runtime.processes.place import Place

__all__ = [
    "CacheLoss",
    "Outcome",
    "cache_losses",
    "cache_losses_in_processes",
    "compiled",
    "explain",
    "losses_of",
    "outcomes_of",
    "verify",
    "verify_in_processes",
]

_BATCH = 2
_NO_RESULT = -1.0
"""The error on a rank whose stage is not the last: the last one's ranks have what is compared."""


@dataclass(frozen=True)
class Outcome:
    """One comparison: the largest absolute difference over the largest magnitude of the original's result."""

    dtype: str
    length: int
    error: float
    accepted: float

    @property
    def equal(self) -> bool:
        return self.error <= self.accepted


@dataclass(frozen=True)
class CacheLoss:
    """Of texts of random tokens: the mean of minus the log-probability of a token after those before it, in nats.

    expected: with a cache in the model's dtype, bfloat16; found: with one of `dtype`. largest: difference of a token.
    """

    dtype: str
    length: int
    expected: float
    found: float
    largest: float

    def __str__(self) -> str:
        return (
            f"cache in {self.dtype} against bfloat16, texts of {self.length} tokens: loss {self.found:.4f} against "
            f"{self.expected:.4f} ({self.found - self.expected:+.4f}), a token's log-probability by at most "
            f"{self.largest:.4f}"
        )


def cache_losses(case: Case) -> list[CacheLoss]:
    """Every rank in this process."""
    require_threads(case.plan.mesh.world_size)
    model = load_model(case.model, dtype=torch.bfloat16, seed=case.seed)
    parts = compiled(model, case.compile)

    def run(size: CacheSize, texts: list[list[int]]) -> Tensor:
        parts.reserve(size)
        return parts.log_probabilities(texts)

    return list(losses_of(case, model, run))


def cache_losses_in_processes(case: Case, *, timeout_s: float) -> list[CacheLoss]:
    """One process per rank; all of them say the same."""
    return [CacheLoss(**fields) for fields in json.loads(_answers(case, timeout_s)[0])]


def losses_of(case: Case, model: Any, run: Callable[[CacheSize, list[list[int]]], Tensor]) -> Iterator[CacheLoss]:
    """run: log-probabilities [B, L - 1] of texts over a cache of that size. Texts of one token have none."""
    for length in case.lengths:
        if length > 1:
            texts = _input_ids(case, model, length).tolist()
            size = CacheSize(max_batch=len(texts), max_length=length)
            expected, found = (run(each, texts) for each in (size, replace(size, dtype=case.cache_dtype)))
            largest = (found - expected).abs().max().item()
            assert case.cache_dtype is not None
            yield CacheLoss(case.cache_dtype, length, -expected.mean().item(), -found.mean().item(), largest)


def verify(case: Case) -> Iterator[Outcome]:
    """Simulate every rank in this process."""
    require_threads(case.plan.mesh.world_size)
    for dtype in case.dtypes:
        model = load_model(case.model, dtype=dtype_named(dtype), seed=case.seed)
        parts = compiled(model, case.compile)
        yield from outcomes_of(case, dtype, model, functools.partial(_simulated, parts))


def verify_in_processes(case: Case, *, timeout_s: float) -> list[Outcome]:
    """Start one process per rank; each builds the model, partitions it, and runs its part over gloo."""
    answers = _answers(replace(case, cache_dtype=None), timeout_s)
    ranks = [[Outcome(**fields) for fields in json.loads(answer)] for answer in answers]
    worst = [max(same, key=lambda outcome: outcome.error) for same in zip(*ranks, strict=True)]
    return [replace(each, error=float("inf")) if each.error == _NO_RESULT else each for each in worst]


def _answers(case: Case, timeout_s: float) -> list[bytes]:
    # here once, rather than on every rank: a wrong name should be one line
    load_config(case.model, small=True)
    return launch(
        ["partitioner.cli.ranks.verify_rank"],
        num_ranks=case.plan.mesh.world_size,
        timeout_s=timeout_s,
        given=case.to_json().encode(),
        name=Place(case.plan.replica_mesh, 0, 0, case.plan.replicas).name_of_all,
    )


def _simulated(parts: Parts[Any], input_ids: Tensor) -> list[Tensor | None]:
    try:
        return parts.simulate_ranks(input_ids=input_ids)
    except (InputError, WeightError):
        raise
    except Exception:
        # ranks that fail differ from the original: no result, and `explain` says at which node
        return []


def outcomes_of(case: Case, dtype: str, model: Any, run: Callable[[Tensor], list[Tensor | None]]) -> Iterator[Outcome]:
    """Compare the results of `run`, one per rank, with that of `model` at every length; None: another stage's."""
    for length in case.lengths:
        input_ids = _input_ids(case, model, length)
        results = run(input_ids)  # first, because it refuses what does not fit in words
        exact = ExactArithmetic() if model.dtype is torch.float64 else contextlib.nullcontext()
        with torch.no_grad(), exact:
            expected = model(input_ids=input_ids, use_cache=False)[0]
        errors = [_NO_RESULT if result is None else difference(result, expected) for result in results]
        error = max(errors, default=float("inf"))
        yield Outcome(dtype, length, error, tolerance(dtype_named(dtype)))


def compiled(model: Any, how: Compile) -> Parts[Report]:
    """The partitioned model; in float64 without the model's detours through float32, as the reference is taken."""
    traced = trace(model, max_length=how.max_length)
    return compile_program(in_float64(traced) if model.dtype is torch.float64 else traced, how.plan)


def explain(case: Case, outcome: Outcome) -> Divergence | None:
    """The first node that differs; None: in float64 the partitioned graph does what the traced one does."""
    model = load_model(case.model, dtype=dtype_named(outcome.dtype), seed=case.seed)
    parts = compiled(model, case.compile)
    return first_divergence(parts, input_ids=_input_ids(case, model, outcome.length))


def _input_ids(case: Case, model: Any, length: int) -> Tensor:
    generator = torch.Generator().manual_seed(case.seed + length)
    vocabulary: int = model.config.get_text_config().vocab_size
    # the first few are special tokens, which some models treat as padding
    lowest = min(3, vocabulary - 1)
    return torch.randint(lowest, vocabulary, (_BATCH, length), generator=generator)
