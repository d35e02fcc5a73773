"""`partitioner run`: text after a prompt, from a model partitioned over processes, streamed as it comes.

    answer(question)                    what one rank does: load, partition, generate; rank 0 prints
    run_in_processes(question, ...)     start the ranks of this machine and wait for them
    under torchrun                      the process is a rank already, and answers by itself

The text goes to standard output, all else to standard error.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TextIO

from transformers import AutoTokenizer
from transformers.utils import logging as transformers_logging

from partitioner.compile import partition
from partitioner.errors import InputError
from partitioner.named_model import dtype_named, load_model
from partitioner.parts import Parts
from partitioner.plan import Plan
from runtime.engine import Engine
from runtime.launch import begin_worker, launch

__all__ = ["Question", "answer", "answer_here", "is_rank", "run_in_processes"]


@dataclass(frozen=True)
class Question:
    """What to run: MODEL (a checkpoint folder with a tokenizer), the plan, the prompts, and how to continue them."""

    model: str
    tp: int
    prompts: tuple[str, ...]
    dtype: str = "float32"
    chat: bool = False
    options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        dtype_named(self.dtype)
        if not Path(self.model).is_dir():
            raise InputError(f"{self.model!r} is no folder: to write text, a checkpoint with its tokenizer is needed")

    @property
    def plan(self) -> Plan:
        return Plan(tp=self.tp)

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Question:
        fields = json.loads(text)
        return cls(**{**fields, "prompts": tuple(fields["prompts"])})


def is_rank() -> bool:
    """Whether torchrun started this process."""
    return {"RANK", "WORLD_SIZE", "MASTER_ADDR"} <= os.environ.keys()


def run_in_processes(question: Question, *, timeout_s: float) -> None:
    """Start one process per rank here."""
    with tempfile.TemporaryDirectory(prefix="partitioner-") as folder:
        path = Path(folder, "question.json")
        path.write_text(question.to_json())
        num_ranks = question.plan.mesh.world_size
        launch(["partitioner.run_rank", str(path)], num_ranks=num_ranks, timeout_s=timeout_s, folder=folder)


def answer(question: Question) -> None:
    """One rank of several."""
    begin_worker()
    parts, tokenizer = _load(question)
    with Engine.connect(parts) as engine:
        is_first = engine.program.rank == 0
        _write(question, tokenizer, engine, sys.stdout if is_first else None)


def answer_here(question: Question) -> None:
    """All ranks in this process, one thread each."""
    parts, tokenizer = _load(question)
    _write(question, tokenizer, parts, sys.stdout)


def _load(question: Question) -> tuple[Parts[Any], Any]:
    transformers_logging.disable_progress_bar()
    started = time.perf_counter()
    tokenizer = _tokenizer(question.model)
    model = load_model(question.model, dtype=dtype_named(question.dtype))
    loaded = time.perf_counter()
    parts = partition(model, question.plan)
    _say(f"loaded in {loaded - started:.1f} s, partitioned in {time.perf_counter() - loaded:.1f} s")
    return parts, tokenizer


def _tokenizer(folder: str) -> Any:
    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError) as error:
        raise InputError(
            f"transformers finds no tokenizer in {folder!r}: {' '.join(str(error).split())[:300]}"
        ) from error


def _write(question: Question, tokenizer: Any, engine: Engine | Parts[Any], out: TextIO | None) -> None:
    prompts = [_ids(question, tokenizer, prompt) for prompt in question.prompts]
    options = dict(question.options)
    if options.get("stop_strings"):
        options["tokenizer"] = tokenizer
    said: list[list[int]] = [[] for _ in prompts]
    # one sequence is written as it comes; several would run into each other
    stream = _Stream(tokenizer, prompts[0], out) if len(prompts) == 1 else None
    started = time.perf_counter()
    first = started
    for count, step in enumerate(engine.stream(prompts, **options)):
        if count == 0:
            first = time.perf_counter()
        for row, token in enumerate(step.tokens):
            if token is not None:
                said[row].append(token)
        if stream is not None:
            stream.show(said[0])
    ended = time.perf_counter()
    if out is None:
        return
    if stream is not None:
        stream.end(said[0])
    else:
        for prompt, tokens in zip(question.prompts, said, strict=True):
            out.write(f"{prompt}{_text(tokenizer, tokens)}\n\n")
    out.flush()
    later = sum(map(len, said)) - len(said)
    rate = f"{later / (ended - first):.1f} tokens/s" if later and ended > first else "one token"
    _say(f"{sum(map(len, said))} tokens, the first after {first - started:.2f} s, then {rate} (tp={question.tp})")


def _ids(question: Question, tokenizer: Any, prompt: str) -> list[int]:
    if not question.chat:
        return list(tokenizer(prompt)["input_ids"])
    if tokenizer.chat_template is None:
        raise InputError(f"the tokenizer of {question.model!r} has no chat template: leave --chat out")
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True
    )
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


class _Stream:
    """Text as far as it is certain: the last bytes of a letter may be still to come."""

    def __init__(self, tokenizer: Any, prompt: list[int], out: TextIO | None) -> None:
        self.tokenizer, self.out = tokenizer, out
        self.written = 0
        if out is not None:
            out.write(_text(tokenizer, prompt))

    def show(self, tokens: list[int]) -> None:
        if self.out is not None:
            text = _text(self.tokenizer, tokens).rstrip("\ufffd")
            self.out.write(text[self.written :])
            self.out.flush()
            self.written = max(self.written, len(text))

    def end(self, tokens: list[int]) -> None:
        assert self.out is not None
        self.out.write(_text(self.tokenizer, tokens)[self.written :] + "\n")


def _text(tokenizer: Any, tokens: list[int]) -> str:
    return str(tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False))


def _say(line: str) -> None:
    if os.environ.get("RANK", "0") == "0":
        print(line, file=sys.stderr, flush=True)
