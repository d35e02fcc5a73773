"""`partitioner run`: text after a prompt, from a model partitioned over processes, streamed as it comes.

    run(question, ...)                  one of these, by what was asked and who started this process
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
from dataclasses import dataclass
from typing import Any, TextIO, TypedDict

import torch
from transformers.utils import logging as transformers_logging

from partitioner.cli.common.prompt_ids import prompt_ids
from partitioner.cli.jobs.run import Question
from partitioner.compile.parts import Parts
from partitioner.errors import InputError
from partitioner.program.ranks import Ranks
from partitioner.serving.launch import launch as launch_replicas
from partitioner.serving.text.stream import Text, TextStream
from partitioner.serving.text.tokenizer import load_tokenizer
from partitioner.storage.dtypes import dtype_asked
from partitioner.storage.recognise import is_bundle
from runtime.communication.process_groups import ProcessGroups
from runtime.communication.thread_communicator import ThreadGroup
from runtime.engine.engine import Engine
from runtime.generation.decode_graphs.decoder import require_fixed_shapes
from runtime.kv_cache.cache_size import CacheSize
from runtime.kv_cache.device_memory import readable
from runtime.launching.launched import Launched
from runtime.pipeline.measured import measured
from runtime.processes.capacity import require_threads
from runtime.processes.launch import begin_worker, launch
from runtime.processes.place import Place, is_rank

__all__ = ["answer", "run"]


def run(question: Question, *, simulate: bool, timeout_s: float) -> None:
    """simulate: all ranks in this process. timeout_s: after which it ends, with all processes that it has started."""
    if is_rank():
        answer(question)
    elif simulate:
        with _within(timeout_s):
            answer_here(question)
    elif question.num_ranks == 1:
        with _within(timeout_s):
            answer_alone(question)
    elif question.replicated.replicas > 1:
        run_on_replicas(question, timeout_s=timeout_s)
    else:
        run_in_processes(question, timeout_s=timeout_s)


def run_in_processes(question: Question, *, timeout_s: float) -> None:
    """Start one process per rank here."""
    _texts(question)
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
    texts, plan, started = _texts(question), question.replicated, time.perf_counter()
    transformers_logging.disable_progress_bar()
    if is_bundle(question.model):
        question.ranks()  # says what is asked for in vain
    with (
        _within(timeout_s),
        launch_replicas(
            question.model,
            plan,
            device=question.placed.type,
            dtype=dtype_asked(question.dtype),
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
        _write(question, texts, llm, sys.stdout)


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
    parts, texts = _load(question)
    started = time.perf_counter()
    device = question.placed
    steps = _steps(question, parts, device, Place.here(parts.mesh, replicas=question.replicated.replicas).rank)
    with Engine.connect(parts, device=device, **steps) as engine:
        _say(f"weights loaded in {time.perf_counter() - started:.1f} s")
        _answer_by(question, texts, engine, steps)


def answer_alone(question: Question) -> None:
    """The only rank, in this process."""
    parts, texts = _load(question)
    device = question.placed
    if device.type == "cpu" and not question.compile_steps:
        with _profiled(question, parts, writes=True):
            _write(question, texts, parts, sys.stdout)
        return
    started = time.perf_counter()
    steps = _steps(question, parts, device, 0)
    with parts.engine(0, ThreadGroup(parts.mesh).communicator(0), device=device, **steps) as engine:
        _say(f"weights loaded in {time.perf_counter() - started:.1f} s")
        _answer_by(question, texts, engine, steps)


def answer_here(question: Question) -> None:
    """All ranks in this process, one thread each."""
    require_threads(question.num_ranks)
    parts, texts = _load(question)
    with _profiled(question, parts, writes=True):
        _write(question, texts, parts, sys.stdout)


def _answer_by(question: Question, texts: Texts, engine: Engine, steps: Steps) -> None:
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
        _write(question, texts, engine, sys.stdout if is_first else None)
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


def _load(question: Question) -> tuple[Ranks, Texts]:
    transformers_logging.disable_progress_bar()
    started = time.perf_counter()
    texts = _texts(question)
    ranks = question.ranks()
    read = "bundle read" if is_bundle(question.model) else "compiled before; read"
    _say(f"{'partitioned' if isinstance(ranks, Parts) else read} in {time.perf_counter() - started:.1f} s")
    if isinstance(ranks, Parts):
        for note in ranks.report.notes:
            _say(f"note: {note}")
    return ranks, texts


@dataclass(frozen=True)
class Texts:
    """The prompts' tokens [S], as the tokenizer has them."""

    tokenizer: Any
    prompts: list[list[int]]


def _texts(question: Question) -> Texts:
    """Raises where a prompt cannot be continued, which costs nothing before the model is compiled."""
    tokenizer, note = load_tokenizer(question.model)
    if note:
        _say(f"note: {note}")
    if question.chat and tokenizer.chat_template is None:
        raise InputError(
            f"the tokenizer of {question.model!r} has no chat template: leave --chat out, or put the model's "
            "chat_template.jinja into the folder"
        )
    prompts = [prompt_ids(tokenizer, prompt, folder=question.model, chat=question.chat) for prompt in question.prompts]
    return Texts(tokenizer, prompts)


def _write(question: Question, texts: Texts, engine: Engine | Ranks | Launched, out: TextIO | None) -> None:
    tokenizer, prompts = texts.tokenizer, texts.prompts
    at_a_time = min(len(prompts), question.max_batch or len(prompts))
    _reserve(question, engine, longest=max(map(len, prompts)), max_batch=at_a_time)
    options = {**question.options, "tokenizer": tokenizer}  # for stop strings, the model's own as well
    said: list[list[int]] = [[] for _ in prompts]
    # one sequence is written as it comes; several would run into each other
    written = [Text(tokenizer, prompt) for prompt in prompts]
    # a question and its answer are two texts, a prompt and its continuation one
    stream = TextStream(written[0], out, with_prompt=not question.chat) if len(prompts) == 1 else None
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
        for prompt, text, tokens in zip(question.prompts, written, said, strict=True):
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
