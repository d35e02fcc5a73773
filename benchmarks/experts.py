"""Routed experts over two processes: each token once per rank against transformers' expert parallelism.

    ours          expert_send, dispatch, grouped linears, combine, expert_return
    all_to_all    transformers' AllToAllEP: each (token, expert) pair to the expert's rank
    all_reduce    transformers' AllReduceEP: all tokens on both ranks, own experts, sum
    products      of ours what a rank does with the rows that have come: all of the three do as much, of few tokens
                  mostly reading weights; theirs / products is the most that exchanging them better can gain

One layer's experts, shaped as those of a Qwen3 mixture (top 8, narrower), float32, gloo, one thread per rank. Each rank
has tokens of its own; all_reduce is given those of both, as it requires. The contestants take turns in the same
processes, and what is printed is the ratio of the medians, theirs / ours: above 1 we are faster. Results are compared.

    python -m benchmarks.experts [--tokens 64 512] [--seconds 20]
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from torch import Tensor
from torch import distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.nn import functional
from transformers import Qwen3MoeConfig
from transformers.distributed.expert_parallel import AllReduceEP, AllToAllEP
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

from benchmarks.support.ranks import launch_ranks
from benchmarks.support.rounds import Ratio, rounds_in, take_turns
from partitioner.sharding.mesh import Mesh
from runtime.communication.process_groups import ProcessGroups
from runtime.ops.expert_exchange import receive_from_experts, send_to_experts
from runtime.ops.experts import expert_combine, expert_dispatch, grouped_linear
from runtime.processes.launch import begin_worker

EXPERTS, CHOICES, HIDDEN, INNER = 64, 8, 1024, 384


def experts(hidden: Tensor, index: Tensor, gates: Tensor, up: Tensor, down: Tensor) -> Tensor:
    rows, order, counts = expert_dispatch(hidden, index, up.shape[0], trim=True)
    gate, value = grouped_linear(rows, up, counts).chunk(2, dim=-1)
    return expert_combine(grouped_linear(functional.silu(gate) * value, down, counts), order, gates)


def theirs(kind: type[Any], up: Tensor, down: Tensor, implementation: str, meshes: tuple[Any, Any]) -> Any:
    config = Qwen3MoeConfig(
        num_experts=up.shape[0], num_experts_per_tok=CHOICES, hidden_size=HIDDEN, moe_intermediate_size=INNER
    )
    config._experts_implementation = implementation
    module = Qwen3MoeExperts(config)
    with torch.no_grad():
        module.gate_up_proj.copy_(up)
        module.down_proj.copy_(down)
    return kind(module, *meshes)


def worker(tokens: list[int], seconds: float) -> None:
    begin_worker()
    mesh = Mesh.of(dp=2, ep=2)
    communicator = ProcessGroups.connect(mesh, axes={("ep",)}, device="cpu", timeout_s=60.0)
    rank, each = communicator.rank, EXPERTS // 2
    random = torch.Generator().manual_seed(0)
    up = torch.randn(EXPERTS, 2 * INNER, HIDDEN, generator=random) / HIDDEN**0.5
    down = torch.randn(EXPERTS, HIDDEN, INNER, generator=random) / INNER**0.5
    mine = slice(rank * each, rank * each + each)
    options = {"experts": list(range(EXPERTS)), "counts": [each, each]}
    there, back_again = (communicator.channel("ep", node=name) for name in ("send", "return"))
    pair, alone = init_device_mesh("cpu", (2,)), init_device_mesh("cpu", (2, 1), mesh_dim_names=("a", "b"))["b"]
    exchange = theirs(AllToAllEP, up[mine], down[mine], "grouped_mm", (pair, alone))
    reduce = theirs(AllReduceEP, up[mine], down[mine], "grouped_mm", (pair, pair))
    for count in tokens:
        everyone = torch.randn(2 * count, HIDDEN, generator=random)
        gates, index = torch.rand(2 * count, EXPERTS, generator=random).softmax(-1).topk(CHOICES)
        own = slice(rank * count, rank * count + count)
        hidden, choices, weights = everyone[own], index[own], gates[own]

        def ours(hidden: Tensor = hidden, choices: Tensor = choices, weights: Tensor = weights) -> Tensor:
            rows, local, kept, back = send_to_experts(there, hidden, choices, weights, **options)
            made = experts(rows, local, kept, up[mine], down[mine])
            return receive_from_experts(back_again, made, back)

        def sent(hidden: Tensor = hidden, choices: Tensor = choices, weights: Tensor = weights) -> Tensor:
            return exchange(hidden, choices, weights)

        def summed(hidden: Tensor = everyone, choices: Tensor = index, weights: Tensor = gates) -> Tensor:
            return reduce(hidden, choices, weights)

        def products(came: tuple[Tensor, ...] = send_to_experts(there, hidden, choices, weights, **options)) -> Tensor:
            return experts(*came[:3], up[mine], down[mine])

        runs = {"ours": ours, "all_to_all": sent, "all_reduce": summed, "products": products}
        with torch.no_grad():
            whole = experts(everyone, index, gates, up, down)[own]
            for name, run in list(runs.items())[:3]:
                found = run()
                off = float((found[own] if name == "all_reduce" else found).sub(whole).abs().max() / whole.abs().max())
                assert off < 1e-4, (name, off)
            rounds = torch.tensor(rounds_in(seconds / len(tokens), runs, meet=dist.barrier))
            dist.broadcast(rounds, 0)
            times = take_turns(runs, rounds=int(rounds), meet=dist.barrier)
        if rank == 0:
            said = ", ".join(f"{name} {statistics.median(t) * 1e3:.1f} ms" for name, t in times.items())
            print(f"{count} tokens per rank: {said}")
            for name in ("all_to_all", "all_reduce"):
                most = Ratio.of(times[name], times["products"])
                print(f"  {name} / ours: {Ratio.of(times[name], times['ours'])}; / products: {most}", flush=True)
    communicator.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[64, 512])
    parser.add_argument("--seconds", type=float, default=30.0)
    given = parser.parse_args()
    if "RANK" in os.environ:
        worker(given.tokens, given.seconds)
    else:
        launch_ranks(["benchmarks.experts", *sys.argv[1:]], num_ranks=2, timeout_s=600)


if __name__ == "__main__":
    main()
