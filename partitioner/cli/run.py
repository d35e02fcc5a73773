"""`partitioner run`: text after a prompt, from a model partitioned over processes, streamed as it comes.

    answer(question)                    what one rank of several does: load, partition, generate; rank 0 prints
    answer_alone(question)              the same where there is one rank, in this process
    run_in_processes(question, ...)     start the ranks of this machine and wait for them
    run_on_replicas(question, ...)      the same for several replicas, which this process serves
    under torchrun                      the process is a rank already, and answers by itself

The text goes to standard output, all else to standard error.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO, TypedDict

import torch
from transformers.utils import logging as transformers_logging

from partitioner.cli.common.options import Job
from partitioner.cli.common.prompt_ids import prompt_ids
from partitioner.compile.parts import Parts
from partitioner.errors import InputError
from partitioner.program.plan import Plan
from partitioner.program.ranks import Ranks
from partitioner.serving.launch import launch as launch_replicas
from partitioner.serving.text.stream import Text, TextStream
from partitioner.serving.text.tokenizer import load_tokenizer
from partitioner.storage.bundle.bundle import load
from partitioner.storage.named_model import dtype_named, hub_hint
from partitioner.storage.recognise import is_bundle
from runtime.communication.process_groups import ProcessGroups
from runtime.communication.thread_communicator import ThreadGroup
from runtime.engine.engine import Engine
from runtime.generation.decode_graphs import require_fixed_shapes
from runtime.kv_cache.cache_size import CacheSize, require_dtype
from runtime.kv_cache.device_memory import Amount, readable
from runtime.launching.launched import Launched
from runtime.pipeline.measured import measured
from runtime.processes.capacity import require_threads
from runtime.processes.choose_device import choose_device
from runtime.processes.launch import begin_worker, launch
from runtime.processes.place import Place

__all__ = ["Question", "answer", "answer_alone", "answer_here", "run_in_processes", "run_on_replicas"]


@dataclass(frozen=True)
class Question(Job):
    """What to run: MODEL (a checkpoint folder with a tokenizer, or a bundle), the prompts, and how to continue them.

    compile: its `tp` is None for what the bundle has, or one rank. dtype: None for that of the weights. checkpoint: the
    folder of the weights that a bundle refers to. mapped: weights are used where they lie in the files. checked: a
    bundle's must have its digests.
    """

    prompts: tuple[str, ...] = ()
    dtype: str | None = None
    checkpoint: str | None = None
    mapped: bool = False
    checked: bool = True
    cached: bool = True
    chat: bool = False
    cache_memory: str | None = None
    """The most that the cache may take on a rank, as in `runtime.kv_cache.device_memory`; None: all that is free."""
    cache_dtype: str | None = None
    """As in `CacheSize`."""
    options: dict[str, Any] = field(default_factory=dict)
    profile: str = ""
    """Where to write a trace of what every rank does; "": nowhere."""
    device: str = "auto"
    """As in `runtime.processes.choose_device`."""
    compile_steps: bool = False
    max_batch: int | None = None
    """The most prompts at a time; None: all."""

    def __post_init__(self) -> None:
        if self.dtype not in (None, "auto"):
            dtype_named(str(self.dtype))
        if self.max_batch is not None and self.max_batch < 1:
            raise InputError(f"--max-batch must be at least 1, got {self.max_batch}")
        if self.profile and (not Path(self.profile).parent.is_dir() or Path(self.profile).is_dir()):
            raise InputError(f"cannot write a trace to {self.profile!r}: give a file in a folder that exists")
        if self.cache_memory is not None:
            Amount.of(self.cache_memory)
        require_dtype(self.cache_dtype)
        super().__post_init__()
        for prompt in self.prompts:
            try:
                prompt.encode()
            except UnicodeEncodeError as error:
                raise InputError(f"the prompt {prompt!r} is not valid text: {error.reason}") from None
        if not self.model or not Path(self.model).is_dir():
            raise InputError(
                f"{self.model!r} is not a folder: give a checkpoint folder with its tokenizer, or a bundle"
                + hub_hint(self.model)
            )
        is_checkpoint = not is_bundle(self.model)
        if is_checkpoint and not Path(self.model, "config.json").is_file():
            raise InputError(f"{self.model} is a folder, but no checkpoint: it has no config.json")
        if is_checkpoint and self.checkpoint is not None:
            raise InputError(f"--checkpoint is for a bundle that refers to one; {self.model!r} is not a bundle")
        if is_checkpoint and not self.checked:
            raise InputError(f"--unchecked is for a bundle, which has digests; {self.model!r} is not a bundle")

    def ranks(self) -> Ranks:
        """The model, without its weights: each rank reads its own, when it is connected."""
        if not is_bundle(self.model):
            return self.compile.ranks(self.model, dtype=self.dtype, mapped=self.mapped, cached=self.cached)
        self.compile.require_none(self.model)
        bundle = load(self.model, checkpoint=self.checkpoint, mapped=self.mapped, checked=self.checked)
        if self.replicated.replica_mesh != bundle.mesh or self.dtype not in (None, "auto"):
            raise InputError(
                f"{self.model!r} is a bundle for {bundle.mesh}: leave --tp, --plan and --dtype out, or reshard it by "
                "partitioner export"
            )
        return bundle

    @property
    def replicated(self) -> Plan:
        """The plan, whose degrees may be those of a bundle."""
        return self.compile.plan_of(self.model)

    @property
    def num_ranks(self) -> int:
        return self.replicated.mesh.world_size

    @property
    def placed(self) -> torch.device:
        """Where the ranks of this machine run: under torchrun there may be fewer here than in all."""
        return choose_device(self.device, num_ranks=int(os.environ.get("LOCAL_WORLD_SIZE", self.num_ranks)))


def run_in_processes(question: Question, *, timeout_s: float) -> None:
    """Start one process per rank here."""
    # what is wrong is said once, before anything is started
    question.placed  # noqa: B018 - checks the device
    _tokenizer(question)
    if is_bundle(question.model):
        question.ranks().rank(0)
    # not by a file, which others might read, and which would stay where this process is killed
    given = question.to_json().encode()
    launch(
        ["partitioner.cli.ranks.run_rank"],
        num_ranks=question.num_ranks,
        timeout_s=timeout_s,
        given=given,
        name=Place(question.replicated.replica_mesh, 0).name,
    )


def run_on_replicas(question: Question, *, timeout_s: float) -> None:
    """Start the ranks of several replicas here, and tell what they say."""
    if question.profile:
        raise InputError("--profile is for one replica: leave --dp out")
    tokenizer, plan, started = _tokenizer(question), question.replicated, time.perf_counter()
    transformers_logging.disable_progress_bar()
    if is_bundle(question.model):
        question.ranks()  # says what is asked for in vain
    dtype = None if question.dtype in (None, "auto") else dtype_named(str(question.dtype))
    with (
        _within(timeout_s),
        launch_replicas(
            question.model,
            plan,
            device=question.placed.type,
            dtype=dtype,
            max_length=question.compile.max_length,
            checkpoint=question.checkpoint,
            mapped=question.mapped,
            checked=question.checked,
            compile=question.compile_steps,
            compiled_cache=question.cached,
            start_timeout_s=timeout_s,
        ) as llm,
    ):
        _say(f"{llm.replicas} replicas of {llm.mesh} ready in {time.perf_counter() - started:.1f} s")
        _write(question, tokenizer, llm, sys.stdout)


@contextlib.contextmanager
def _within(timeout_s: float) -> Iterator[None]:
    """Ends this process, and with it all ranks, after so many seconds."""

    def end() -> None:
        print(f"error: the ranks did not finish within {timeout_s:g} s and were stopped", file=sys.stderr, flush=True)
        os._exit(1)

    timer = threading.Timer(timeout_s, end)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def answer(question: Question) -> None:
    """One rank of several."""
    begin_worker()
    parts, tokenizer = _load(question)
    started = time.perf_counter()
    device = question.placed
    steps = _steps(question, parts, device, Place.here(parts.mesh, replicas=question.replicated.replicas).rank)
    with Engine.connect(parts, device=device, **steps) as engine:
        _say(f"weights loaded in {time.perf_counter() - started:.1f} s")
        _answer_by(question, tokenizer, engine, steps)


def answer_alone(question: Question, *, timeout_s: float) -> None:
    """The only rank, in this process."""
    device = question.placed
    with _within(timeout_s):
        parts, tokenizer = _load(question)
        if device.type == "cpu" and not question.compile_steps:
            with _profiled(question, parts, writes=True):
                _write(question, tokenizer, parts, sys.stdout)
            return
        started = time.perf_counter()
        steps = _steps(question, parts, device, 0)
        with parts.engine(0, ThreadGroup(parts.mesh).communicator(0), device=device, **steps) as engine:
            _say(f"weights loaded in {time.perf_counter() - started:.1f} s")
            _answer_by(question, tokenizer, engine, steps)


def answer_here(question: Question, *, timeout_s: float) -> None:
    """All ranks in this process, one thread each."""
    require_threads(question.num_ranks)
    with _within(timeout_s):
        parts, tokenizer = _load(question)
        with _profiled(question, parts, writes=True):
            _write(question, tokenizer, parts, sys.stdout)


def _answer_by(question: Question, tokenizer: Any, engine: Engine, steps: Steps) -> None:
    is_first = os.environ.get("RANK", "0") == "0"  # of all replicas
    dtypes = [weight.dtype for weight in engine.weights if weight.is_floating_point()]
    dtype = str(max(set(dtypes), key=dtypes.count)).removeprefix("torch.") if dtypes else "no weights"
    where = "cpu" if engine.device.type == "cpu" else torch.cuda.get_device_name(engine.device)
    how = [name for name, on in (("compiled", steps["compile"]), ("captured", steps["cuda_graph"])) if on]
    _say(f"{engine.mesh} on {where}, {dtype}" + (f", decode steps {' and '.join(how)}" if how else ""))
    if isinstance(engine.communicator, ProcessGroups) and engine.device.type == "cuda":
        for axis, carrier in engine.communicator.transports.items():
            _say(f"{axis}: by {carrier}")
    with _profiled(question, engine, writes=is_first):
        _write(question, tokenizer, engine, sys.stdout if is_first else None)
    if engine.device.type == "cuda":
        most, of_all = torch.cuda.max_memory_allocated(engine.device), torch.cuda.get_device_properties(engine.device)
        _say(f"memory: {readable(most)} at most, of {readable(of_all.total_memory)} of a GPU")


class Steps(TypedDict):
    """How decode steps run."""

    compile: bool
    cuda_graph: bool


def _steps(question: Question, parts: Ranks, device: torch.device, rank: int) -> Steps:
    """Captured on a GPU, where the model's steps can be and nobody wants their nodes apart."""
    captures = device.type == "cuda" and not question.profile
    if captures:
        try:
            require_fixed_shapes(parts.entry("decode", rank), device, cuda_graph=True)
        except InputError as reason:
            if question.compile_steps:
                raise
            _say(f"note: decode steps are not captured: {reason}")
            captures = False
    return {"compile": question.compile_steps, "cuda_graph": captures}


@contextlib.contextmanager
def _profiled(question: Question, engine: Engine | Ranks, *, writes: bool) -> Iterator[None]:
    if not question.profile:
        yield
        return
    with engine.profile() as trace:
        yield
    if writes:
        try:
            trace.save(question.profile)
        except OSError as error:
            raise InputError(f"cannot write a trace to {question.profile!r}: {error}") from error
        idle = f"\nstages idle: {measured(trace.ranks).bubble:.1%}" if engine.mesh.size("pp") > 1 else ""
        _say(f"{trace}{idle}\ntrace in {question.profile}: open it at https://ui.perfetto.dev")


def _load(question: Question) -> tuple[Ranks, Any]:
    transformers_logging.disable_progress_bar()
    started = time.perf_counter()
    tokenizer = _tokenizer(question)
    ranks = question.ranks()
    read = "bundle read" if is_bundle(question.model) else "compiled before; read"
    _say(f"{'partitioned' if isinstance(ranks, Parts) else read} in {time.perf_counter() - started:.1f} s")
    if isinstance(ranks, Parts):
        for note in ranks.report.notes:
            _say(f"note: {note}")
    return ranks, tokenizer


def _tokenizer(question: Question) -> Any:
    tokenizer, note = load_tokenizer(question.model)
    if note:
        _say(f"note: {note}")
    if question.chat and tokenizer.chat_template is None:
        raise InputError(
            f"the tokenizer of {question.model!r} has no chat template: leave --chat out, or put the model's "
            "chat_template.jinja into the folder"
        )
    for prompt in question.prompts:  # one that has no tokens is told before anything is compiled
        prompt_ids(tokenizer, prompt, folder=question.model, chat=question.chat)
    return tokenizer


def _write(question: Question, tokenizer: Any, engine: Engine | Ranks | Launched, out: TextIO | None) -> None:
    prompts = [prompt_ids(tokenizer, prompt, folder=question.model, chat=question.chat) for prompt in question.prompts]
    at_a_time = min(len(prompts), question.max_batch or len(prompts))
    _reserve(question, engine, longest=max(map(len, prompts)), max_batch=at_a_time)
    options = {**question.options, "tokenizer": tokenizer}  # for stop strings, the model's own as well
    said: list[list[int]] = [[] for _ in prompts]
    # one sequence is written as it comes; several would run into each other
    texts = [Text(tokenizer, prompt) for prompt in prompts]
    # a question and its answer are two texts, a prompt and its continuation one
    stream = TextStream(texts[0], out, with_prompt=not question.chat) if len(prompts) == 1 else None
    started, firsts, later_s, later = time.perf_counter(), 0.0, 0.0, 0
    for begin in range(0, len(prompts), at_a_time):
        group = range(begin, min(begin + at_a_time, len(prompts)))
        first = time.perf_counter()
        for count, step in enumerate(engine.stream([prompts[row] for row in group], **options)):
            if count == 0:
                first = time.perf_counter()
                firsts = firsts or first - started
            for row, token in zip(group, step.tokens, strict=True):
                if token is not None:
                    said[row].append(token)
                    later += count > 0
            if stream is not None:
                stream.show(said[0])
        later_s += time.perf_counter() - first
    if out is None:
        return
    if stream is not None:
        stream.end(said[0])
    else:
        for prompt, text, tokens in zip(question.prompts, texts, said, strict=True):
            between = "\n" if question.chat else ""
            out.write(f"{prompt}{between}{text.after(tokens)}\n\n")
    out.flush()
    total, replicas = sum(map(len, said)), question.replicated.replicas
    if isinstance(engine, Engine) and replicas > 1:  # which tell each other their rows at the end
        _say(f"{total} tokens in {time.perf_counter() - started:.2f} s ({replicas} replicas of {engine.mesh})")
        return
    rate = f"{later / later_s:.1f} tokens/s" if later and later_s > 0 else "one token"
    _say(f"{total} tokens, the first after {firsts:.2f} s, then {rate} ({engine.mesh})")


def _reserve(question: Question, engine: Engine | Ranks | Launched, *, longest: int, max_batch: int) -> None:
    """Sets the cache aside, of the size that this question needs, and says how much more would fit."""
    new: int = question.options.get("max_new_tokens", 1)
    size = CacheSize(
        max_batch=max_batch, max_length=longest + new - 1, memory=question.cache_memory, dtype=question.cache_dtype
    )
    _say(f"cache: {engine.reserve(size)}")


def _say(line: str) -> None:
    if os.environ.get("RANK", "0") == "0":
        print(line, file=sys.stderr, flush=True)
