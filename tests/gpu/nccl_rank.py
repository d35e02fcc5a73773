"""One NCCL rank: `python -P -m tests.gpu.nccl_rank CASE FOLDER ...`; started by test_nccl.py and test_lost_rank.py."""

import json
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM, PreTrainedModel

from partitioner import CacheSize, Plan, partition
from runtime.communication.process_groups import ProcessGroups, Sharing
from runtime.communication.thread_communicator import ThreadGroup
from runtime.engine import Engine
from runtime.generation import steps
from runtime.generation.batching.chosen_steps import StepsAhead
from runtime.processes.launch import begin_worker
from tests.runtime.generation.batching.many_requests import Case, serve
from tests.support.processes.few_gpus import device_of_rank

PROMPTS = [[1, 2, 3, 4, 5], [6, 7]]
NEW = 24
SEQUENCES = {
    2: [("llama", "sp=2,sp_attention=ring"), ("llama", "sp=2,sp_attention=ulysses"), ("mixtral", "sp=2,ep=2")],
    4: [("mixtral", "pp=2,sp=2,ep=2,sp_attention=ring"), ("mixtral", "pp=2,sp=2,ep=2,sp_attention=ulysses")],
}
"""By the number of ranks: families and plans."""


def model(family: str, dtype: torch.dtype) -> PreTrainedModel:
    """Seeded: the same on every rank."""
    sizes: dict[str, Any] = {
        "vocab_size": 1024, "hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 4,
        "num_attention_heads": 8, "num_key_value_heads": 4, "eos_token_id": None, "bos_token_id": None,
    }  # fmt: skip
    torch.manual_seed(0)
    if family == "llama":
        return LlamaForCausalLM(LlamaConfig(**sizes)).eval().to(dtype)
    return MixtralForCausalLM(MixtralConfig(**sizes, num_local_experts=4, num_experts_per_tok=2)).eval().to(dtype)


def own_device() -> str:
    """The device of this rank; without a GPU the same runs over gloo: that it runs."""
    return device_of_rank("cuda") if torch.cuda.is_available() else "cpu"


def results(folder: Path, family: str, dtype: str, cuda_graph: str) -> None:
    """Leaves the logits and tokens of every rank."""
    num_ranks = int(os.environ["WORLD_SIZE"])
    parts = partition(model(family, getattr(torch, dtype)), Plan(tp=num_ranks))
    ids = torch.arange(1, 17).reshape(2, 8)
    found: dict[str, torch.Tensor] = {}
    with Engine.connect(
        parts, device=own_device(), timeout_s=120, shared_memory="off", cuda_graph=cuda_graph == "graph"
    ) as engine:
        carried_by = engine.communicator.transports
        if num_ranks > 1:
            assert carried_by == {"tp": "nccl"}
        logits = engine(input_ids=ids)
        logits = logits[0] if isinstance(logits, tuple | list) else logits
        found["logits"] = logits.float().cpu()
        found["tokens"] = torch.as_tensor(engine.generate(PROMPTS, max_new_tokens=NEW)).cpu()
        rank = engine.program.rank
    torch.save(found, folder / f"rank-{rank}.pt")


def sequences(folder: Path) -> None:
    """Tokens over sp, with experts and stages besides: how far logits are off one rank's, and whether tokens agree."""
    device, several = own_device(), torch.cuda.device_count() >= int(os.environ["WORLD_SIZE"])
    said: list[tuple[str, str, float | None, bool]] = []
    ids = torch.arange(1, 35).reshape(2, 17)
    for family, plan in SEQUENCES[int(os.environ["WORLD_SIZE"])]:
        original = model(family, torch.float32)
        tokens = torch.as_tensor(partition(original, Plan()).generate(PROMPTS, max_new_tokens=NEW))
        with torch.no_grad():
            expected = original(input_ids=ids, use_cache=False)[0]
        sharings: tuple[Sharing, ...] = ("off", "on") if several else ("off",)
        for sharing in sharings:
            parts = partition(original, Plan.parse(plan))
            with Engine.connect(parts, device=device, timeout_s=120, shared_memory=sharing) as engine:
                carried_by = set(engine.communicator.transports.values())
                assert device == "cpu" or carried_by == {"nccl" if sharing == "off" else "peer memory"}, carried_by
                logits = engine(input_ids=ids)
                logits = logits[0] if isinstance(logits, tuple | list) else logits
                error = None if logits is None else float((logits.cpu() - expected).norm() / expected.norm())
                found = torch.as_tensor(engine.generate(PROMPTS, max_new_tokens=NEW)).cpu()
            said.append((plan, sharing, error, torch.equal(found, tokens)))
    (folder / f"rank-{os.environ['RANK']}.json").write_text(json.dumps(said))


def fault(folder: Path, what: str, phase: str, victim: str, carrier: str) -> None:
    """The victim goes wrong before its second collective of the phase, the others wait on the device."""
    device = own_device()
    rank = int(os.environ["RANK"])
    if rank == int(victim):
        bind = ProcessGroups.bind
        chosen, passed = 0, 0

        def armed(self: ProcessGroups, *given: Any, node: str, **options: Any) -> Callable[[Any], Any]:
            collective = bind(self, *given, node=node, **options)

            def run(x: Any) -> Any:
                nonlocal chosen, passed
                chosen += node == "sampler"
                passed += node not in ("sampler", "agreement")
                if (phase == "prefill" and passed == 2) or (phase == "decode" and chosen == 2 and node != "sampler"):
                    torch.cuda.synchronize()
                    (folder / "when").write_text(json.dumps(time.time()))
                    if what == "raise":
                        raise ValueError("a fault of its own")
                    if what == "hang":
                        time.sleep(600)
                    os.kill(os.getpid(), signal.SIGKILL if what == "kill" else signal.SIGSTOP)
                return collective(x)

            return run

        ProcessGroups.bind = armed  # type: ignore[method-assign, assignment]
    parts = partition(model("llama", torch.float32), Plan(tp=int(os.environ["WORLD_SIZE"])))
    sharing: Sharing = "off" if carrier == "nccl" else "on"
    with Engine.connect(parts, device=device, timeout_s=10, shared_memory=sharing) as engine:
        engine.generate(PROMPTS, max_new_tokens=500)


def prompts(folder: Path, carrier: str) -> None:
    """Halves of prompts that are captured, after ranks have compared what they do, say what they say node by node."""
    sharing: Sharing = "off" if carrier == "nccl" else "on"
    parts = partition(model("llama", torch.float32), Plan(tp=int(os.environ["WORLD_SIZE"])))
    steps.CAPTURED_TURNS_FROM = 16
    with Engine.connect(parts, device=own_device(), timeout_s=120, shared_memory=sharing) as engine:
        for seed, length in enumerate((5000, 5000, 5000, 4900)):
            drawn = torch.randint(0, 1024, (1, length), generator=torch.Generator().manual_seed(seed))
            told: list[Any] = []
            for steps.CAPTURED_ON in (frozenset(), frozenset({"cuda"})):
                told.append(engine.generate(drawn, max_new_tokens=4, eos_token_id=[], logprobs=True))
            torch.testing.assert_close(told[1].logprobs, told[0].logprobs, rtol=1e-3, atol=1e-3)
        bound = engine._generate_loop._bound
        assert bound is not None
        assert len(bound._pieces._captured) == 1


def batches(folder: Path, carrier: str, plan: str) -> None:
    """Many requests over stages, by captured steps of groups that choose by themselves: each is told what it is alone.

    Some come while others are continued, some draw, and prompts are captured that run amid rows.
    """
    original = model("llama", torch.float32)
    options: dict[str, Any] = {"max_new_tokens": 40, "eos_token_id": []}
    cases = [
        Case([3 + (7 * number + at) % 900 for at in range(1 + 13 * number % 90)], {**options, **more}, 5 * number)
        for number in range(24)
        for more in ({"do_sample": True, "seed": number, "top_k": 20} if number % 3 == 0 else {},)
    ]
    size = CacheSize(max_batch=16, max_length=256)
    whole = partition(original, Plan())
    alone = whole.engine(0, ThreadGroup(whole.mesh).communicator(0), device=own_device())
    expected = serve(alone, cases, size, block_size=16).tokens
    sharing: Sharing = "off" if carrier == "nccl" else "on"
    begin_next, began = StepsAhead.begin_next, []

    def counted(ahead: StepsAhead, latest: Any) -> Any:
        found = begin_next(ahead, latest)
        began.append(found is not None)
        return found

    StepsAhead.begin_next = counted  # type: ignore[method-assign]
    parts = partition(original, Plan.parse(plan))
    with Engine.connect(
        parts, device=own_device(), timeout_s=120, shared_memory=sharing, cuda_graph=torch.cuda.is_available()
    ) as engine:
        for _ in range(2):  # the second time, what is captured is there
            assert serve(engine, cases, size, block_size=16).tokens == expected
    assert not torch.cuda.is_available() or sum(began) > 50


def graph_then_error(folder: Path) -> None:
    """An engine that holds captured graphs is closed by an error of its own, on all ranks at once, and ends."""
    parts = partition(model("llama", torch.float32), Plan(tp=int(os.environ["WORLD_SIZE"])))
    with Engine.connect(parts, device=own_device(), timeout_s=30, cuda_graph=True) as engine:
        engine.generate(PROMPTS, max_new_tokens=8)
        (folder / "when").write_text(json.dumps(time.time()))
        raise ValueError("after the graphs")


if __name__ == "__main__":
    begin_worker()
    cases: dict[str, Callable[..., None]] = {
        "results": results, "sequences": sequences, "fault": fault, "prompts": prompts,
        "graph_then_error": graph_then_error, "batches": batches,
    }  # fmt: skip
    case = cases[sys.argv[1]]
    case(Path(sys.argv[2]), *sys.argv[3:])
