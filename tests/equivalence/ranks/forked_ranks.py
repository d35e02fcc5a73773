"""All ranks of a plan over gloo, forked from one process that has compiled it, against the same model on one rank.

    python -P -m tests.equivalence.ranks.forked_ranks PLAN NAME ...    started by test_all_axes.py; one after the other

Ranks that are forked share what was imported and compiled, so that sixteen of them fit where few cores are.
"""

from __future__ import annotations

import functools
import gc
import os
import sys
import time
import traceback
from typing import Any

import torch

from partitioner import Parts, Plan
from partitioner.compile.compare import difference
from runtime.engine import Engine
from tests.support import generated
from tests.support.partitioned import EXACT, compiled_for, tokens
from tests.support.processes.free_port import free_port

NEW = 6
LENGTHS = (1, 4, 11)
TIMEOUT_S = 300.0


@functools.cache
def expected_of(name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits of a text and the tokens after prompts, by one rank in one process."""
    alone = compiled_for(name, Plan())
    texts = generated.prompts(name, LENGTHS)
    return alone.simulate(input_ids=tokens(name, 9)), torch.as_tensor(
        alone.generate(texts, max_new_tokens=NEW, eos_token_id=[])
    )


def rank(number: int, port: int, name: str, parts: Parts[Any], expected: tuple[torch.Tensor, ...]) -> None:
    size = parts.mesh.world_size * parts.replicas
    os.environ |= {"RANK": str(number), "LOCAL_RANK": str(number), "WORLD_SIZE": str(size)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    logits, said = expected
    texts = generated.prompts(name, LENGTHS)
    sharing = "off" if size == 2 and parts.mesh.size("tp") == 2 else "auto"  # two ranks of tp alone: over gloo
    with Engine.connect(parts, timeout_s=TIMEOUT_S, shared_memory=sharing) as engine:
        result = engine(input_ids=tokens(name, 9))
        for options in ({}, {"prefill_step": 4}):
            found = torch.as_tensor(engine.generate(texts, max_new_tokens=NEW, eos_token_id=[], **options))  # type: ignore[arg-type]
            assert torch.equal(found, said), f"rank {number}, {options}: {found.tolist()}, not {said.tolist()}"
        stage = engine.program.stage
    is_last = stage is None or stage.index + 1 == stage.count
    assert (result is not None) == is_last
    if result is not None:
        off = difference(result, logits)
        assert off < EXACT, f"rank {number}: {off:.1e}"
        print(f"rank {number}: a text off by {off:.0e}, the same {NEW} tokens after each prompt", flush=True)
    else:
        print(f"rank {number}: the same {NEW} tokens after each prompt", flush=True)


def main() -> int:
    pairs = zip(sys.argv[1::2], sys.argv[2::2], strict=True)
    return max([failures(text, name) for text, name in pairs])


def failures(text: str, name: str) -> int:
    """How many ranks of the plan did not end well."""
    plan, expected = Plan.parse(text), expected_of(name)
    parts = compiled_for(name, plan)
    for number in range(parts.mesh.world_size):  # all that ranks read is made once
        for entry in ("text", "prefill", "decode"):
            parts.entry(entry, number)  # type: ignore[arg-type]
    port = free_port()
    count = parts.mesh.world_size * parts.replicas
    print(f"{name} at {text}: {count} processes", flush=True)
    gc.freeze()  # a rank that ends would else look at, and so copy, all that was made here
    start, pids = time.monotonic(), []
    for number in range(count):
        pid = os.fork()
        if pid == 0:
            try:
                rank(number, port, name, parts, expected)
            except BaseException:
                traceback.print_exc()
                sys.stderr.flush()
                os._exit(1)
            os._exit(0)
        pids.append(pid)
    failed = [pid for pid in pids if os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])]
    print(
        f"{count - len(failed)} of {count} ranks agree with one process, {time.monotonic() - start:.0f} s", flush=True
    )
    return len(failed)


if __name__ == "__main__":
    sys.exit(main())
