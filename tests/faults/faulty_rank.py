"""Ranks of which some go wrong, forked from one process that has imported and partitioned everything already.

    python -P -m tests.faults.faulty_rank        reads a Case per line, as JSON; answers each with an Outcome

Every rank is a process of its own that nobody supervises: the others must notice by themselves.

    fault      kill, stop, term, interrupt: that signal        exit: sys.exit(0)         slow: a sleep, well past the
               raise: an exception of its own                  oom: the allocator fails under a limit          timeout
               memory: a MemoryError of Python's               close: closes its engine, and ends well
    phase      absent: never comes       joining: while groups are made      loading: while its weights are
               prefill, decode: before a collective          sampler: before the gather in which tokens are chosen
               ring: before keys and values go on to the next rank        merge: before parts of a token come together
               head: before the vocabulary head that all stages share out
               send, permute, exchange, scatter: before one of these, of many, and nothing else
"""

import faulthandler
import functools
import gc
import json
import os
import resource
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import distributed as dist
from transformers import LlamaConfig, LlamaForCausalLM

import runtime.engine.engine
from partitioner import Plan
from partitioner.compile.partition import compile_program
from partitioner.compile.parts import Parts
from partitioner.compile.tracing.trace import trace
from partitioner.program.program import Program
from runtime.communication.channels import Channel
from runtime.communication.process_groups import ProcessGroups
from runtime.engine import Engine
from runtime.generation.steps import Steps

__all__ = ["Case", "Outcome"]

HERE = os.getpid()
SLOW_S = 4.0
"""Past every deadline here."""


@dataclass(frozen=True)
class Case:
    fault: str
    phase: str
    victims: tuple[int, ...]
    sharing: str
    num_ranks: int = 3
    timeout_s: float = 30.0
    pp: int = 1
    """Pipeline stages: all ranks, where there are several."""
    sp: int = 1
    """Ranks that share out tokens: all, where there are several."""
    share_head: bool = False
    """Whether the stages share out the vocabulary head."""
    port: int = 0
    folder: str = ""


@dataclass(frozen=True)
class Outcome:
    """Of every rank: exit code (negative: the signal; None: still there), standard error, seconds since the fault.

    `idle_s`: what so many ranks took to begin and to end where they did nothing else, just before.
    """

    codes: tuple[int | None, ...]
    texts: tuple[str, ...]
    seconds: tuple[float, ...]
    idle_s: float


def strike(case: Case) -> None:
    Path(case.folder, f"struck-{os.getpid()}").write_text(str(time.time()))
    signals = {"kill": signal.SIGKILL, "stop": signal.SIGSTOP, "term": signal.SIGTERM, "interrupt": signal.SIGINT}
    if case.fault in signals:
        os.kill(os.getpid(), signals[case.fault])
        time.sleep(60)  # a signal may take a moment
    if case.fault == "raise":
        raise ValueError("a fault of its own")
    if case.fault == "memory":
        raise MemoryError("no more memory")
    if case.fault == "exit":
        sys.exit(0)
    if case.fault == "slow":
        time.sleep(SLOW_S)
    if case.fault == "oom":
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + (64 << 20), resource.RLIM_INFINITY))
        torch.empty(1 << 30)


def arm(case: Case) -> None:
    """Make this rank go wrong in the phase of the case."""
    if case.phase == "absent":
        strike(case)
    if case.phase == "joining":
        make_group = dist.new_group
        dist.new_group = lambda *given, **options: strike(case) or make_group(*given, **options)
    if case.phase == "loading":
        load = runtime.engine.engine.load_weights
        runtime.engine.engine.load_weights = lambda *given, **options: strike(case) or load(*given, **options)
    bind = ProcessGroups.bind
    chosen, passed = 0, 0

    def armed(self: ProcessGroups, *given: Any, node: str, **options: Any) -> Callable[[torch.Tensor], torch.Tensor]:
        collective = bind(self, *given, node=node, **options)

        def run(x: torch.Tensor) -> torch.Tensor:
            nonlocal chosen, passed
            chosen += node == "sampler"
            passed += node != "sampler"
            at = "sampler" if node == "sampler" else "decode" if chosen else "prefill"
            ready = chosen == 2 if at in ("sampler", "decode") else passed == 2
            if at == case.phase and ready:
                passed = chosen = 1 << 30
                strike(case)
            return collective(x)

        return run

    execute, runs = Steps.execute, {"prefill": 0, "decode": 0}

    def staged(self: Steps, *given: Any, decode: bool = False, **options: Any) -> Any:
        kind = "decode" if decode else "prefill"
        runs[kind] += 1
        if case.pp > 1 and case.phase == kind and runs[kind] == 2:
            strike(case)
        return execute(self, *given, decode=decode, **options)

    head, heads = Steps.head, 0

    def shared(self: Steps, *given: Any, **options: Any) -> Any:
        nonlocal heads
        heads += 1
        if case.phase == "head" and heads == 2:
            strike(case)
        return head(self, *given, **options)

    Steps.head = shared  # type: ignore[method-assign]
    permute, gather, met = Channel.permute_begin, Channel.all_gather, {"ring": 0, "merge": 0}

    def meets(phase: str, method: Callable[..., Any]) -> Callable[..., Any]:
        def run(self: Channel, *given: Any, **options: Any) -> Any:
            met[phase] += self.axes == ("sp",)
            if case.phase == phase and met[phase] == 2 and (phase == "ring" or met["ring"]):
                strike(case)
            return method(self, *given, **options)

        return run

    Channel.permute_begin = meets("ring", permute)  # type: ignore[method-assign]
    Channel.all_gather = meets("merge", gather)  # type: ignore[method-assign]
    Steps.execute = staged  # type: ignore[method-assign]
    ProcessGroups.bind = armed  # type: ignore[method-assign, assignment]


MEETINGS: dict[str, Callable[[Channel, torch.Tensor], object]] = {
    "permute": lambda channel, x: channel.permute_begin(x, 1).finish(),
    "exchange": lambda channel, x: channel.all_to_all(x, [2] * len(channel.ranks), [2] * len(channel.ranks)),
    "scatter": lambda channel, x: channel.reduce_scatter(x, 0),
}


def meet_often(case: Case, communicator: ProcessGroups) -> None:
    """One primitive again and again; sends go down a chain, whose first rank never waits for an answer."""
    channel = communicator.channel("tp", node="n")
    own, last = channel.coordinate, len(channel.ranks) - 1
    x = torch.ones(2 * len(channel.ranks), 1000)
    for number in range(500):
        communicator.begin_run(new_shapes=number == 0)
        if number == 20 and own in case.victims:
            strike(case)
        if case.phase != "send":
            MEETINGS[case.phase](channel, x)
            continue
        if own > 0:
            x = channel.receive_begin(x.shape, x.dtype, own - 1).finish()
        if own < last:
            channel.send_begin(x, own + 1).finish()


def rank(case: Case, place: int, parts: Parts[Any]) -> None:
    # a shell's background job, and all that it starts, ignores this one
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ |= {"RANK": str(place), "LOCAL_RANK": str(place), "WORLD_SIZE": str(case.num_ranks)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(case.port)}
    if place in case.victims:
        arm(case)
    with Engine.connect(parts, timeout_s=case.timeout_s, shared_memory=case.sharing) as engine:  # type: ignore[arg-type]
        if case.fault == "close" and place in case.victims:
            strike(case)
            return
        if case.phase in ("send", *MEETINGS):
            meet_often(case, engine.communicator)
            return
        if case.pp > 1 or case.sp > 1:
            engine.generate([[1, 2, 3], [4, 5], [6]], max_new_tokens=200)
            return
        if case.num_ranks > 1:
            assert engine.communicator.transports["tp"] == {"on": "shared memory", "off": "gloo"}[case.sharing]
        engine.generate([[1, 2, 3], [4, 5]], max_new_tokens=200)


def run(case: Case) -> Outcome | None:
    """None: in a rank, which is over."""
    parts = tiny(case.num_ranks, case.pp, case.sp, case.share_head)
    started = time.monotonic()
    pids = [os.fork() for _ in range(case.num_ranks) if os.getpid() == HERE]
    if os.getpid() != HERE:
        return None
    for pid in pids:
        os.waitpid(pid, 0)
    idle_s = time.monotonic() - started
    pids = []
    for place in range(case.num_ranks):
        pid = os.fork()
        if pid == 0:
            with Path(case.folder, f"stderr-{place}").open("wb") as file:
                os.dup2(file.fileno(), 2)
            os.dup2(2, 1)
            faulthandler.enable()
            rank(case, place, parts)
            return None
        pids.append(pid)
    codes: dict[int, int] = {}
    ended: dict[int, float] = {}
    awaited = set(pids)
    if case.fault == "stop":
        awaited -= {pids[victim] for victim in case.victims}
    deadline = time.monotonic() + 45
    while awaited - codes.keys() and time.monotonic() < deadline:
        for pid in pids:
            if pid not in codes and os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT):
                codes[pid] = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
                ended[pid] = time.time()
        time.sleep(0.005)
    for pid in pids:
        if pid not in codes:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
    struck = [float(path.read_text()) for path in Path(case.folder).glob("struck-*")]
    since = min(struck, default=float("inf"))
    return Outcome(
        tuple(codes.get(pid) for pid in pids),
        tuple(Path(case.folder, f"stderr-{place}").read_text() for place in range(case.num_ranks)),
        tuple(ended.get(pid, float("inf")) - since for pid in pids),
        idle_s,
    )


@functools.cache
def traced() -> Program:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=4, eos_token_id=None, bos_token_id=None,
    )  # fmt: skip
    return trace(LlamaForCausalLM(config).eval())


@functools.cache
def tiny(num_ranks: int, pp: int, sp: int, share_head: bool) -> Parts[Any]:
    way = "ring" if sp > 1 else "auto"
    plan = Plan(
        tp=num_ranks // pp // sp, pp=pp, sp=sp, sp_attention=way, passes=[("pipeline", {"share_head": share_head})]
    )
    parts = compile_program(traced(), plan)
    parts.entry("decode", 0)
    gc.freeze()  # a rank that ends would else look at, and so copy, all that was made here
    return parts


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    for line in sys.stdin:
        case = Case(**json.loads(line))
        outcome = run(case)
        if outcome is None:
            return
        answers.write(json.dumps(asdict(outcome)) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
