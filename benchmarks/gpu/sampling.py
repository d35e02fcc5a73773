"""The choice of a token by a captured step, with a vocabulary of 128,256 on one GPU, by what its rows ask for.

    captured      `RowSampler`, replayed: what is added to a captured decode step
    by the host   `Sampler`, op by op, until the host has the tokens

Random bfloat16 logits, as wide as those of a model; the median of some rounds.

    python -m benchmarks.gpu.sampling
"""

from __future__ import annotations

import functools

import torch

from benchmarks.gpu.attention import milliseconds
from partitioner.sharding.mesh import Mesh
from runtime.communication.thread_communicator import ThreadGroup
from runtime.sampling.row_sampler import RowOptions, RowSampler
from runtime.sampling.sampler import Sampler
from runtime.sampling.sampling_options import Sampling

VOCABULARY = 128256
ASKED = {
    "greedy": Sampling(),
    "temperature": Sampling(do_sample=True, top_k=0, temperature=0.8),
    "top-k 50": Sampling(do_sample=True),
    "top-k 50, top-p 0.9": Sampling(do_sample=True, top_p=0.9),
    "top-p 0.9": Sampling(do_sample=True, top_k=0, top_p=0.9),
    "min-p 0.05": Sampling(do_sample=True, top_k=0, min_p=0.05),
    "typical 0.9": Sampling(do_sample=True, top_k=0, typical_p=0.9),
    "repetition 1.1": Sampling(repetition_penalty=1.1),
}


@torch.no_grad()
def main() -> None:
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, a vocabulary of {VOCABULARY}")
    device = torch.device("cuda")
    sampler = Sampler(Sampling(), ThreadGroup(Mesh.of()).communicator(0), vocab_size=VOCABULARY, device=device)
    for batch in (1, 8, 32):
        logits = torch.randn(batch, VOCABULARY, device=device, dtype=torch.bfloat16) * 4
        ids = torch.arange(batch, device=device)
        given = {"logits": logits, "request_ids": ids, "history": torch.zeros_like(ids)[:, None]}
        given["lengths"] = torch.ones_like(ids)
        for name, sampling in ASKED.items():
            rows = RowSampler(sampler.search, batch, device)
            kind = rows.begin([RowOptions(sampling, request_id=row, text=[0]) for row in range(batch)])
            own = sampler.with_options(sampling)
            in_step = functools.partial(rows.choose, logits, kind)
            captured = milliseconds(in_step, graph=True)

            def by_host(own: Sampler = own, given: dict[str, torch.Tensor] = given) -> None:
                own(**given, step=0)[0].tolist()

            waited = milliseconds(by_host, graph=False)
            print(f"{batch:3} rows, {name:20}: captured {captured * 1e3:7.1f} us, by the host {waited * 1e3:7.1f} us")


if __name__ == "__main__":
    main()
