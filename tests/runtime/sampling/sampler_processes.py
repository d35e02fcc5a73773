"""What each of three processes checks: over gloo it draws what one process draws. Started by test_sampler.py."""

import warnings

import pytest
import torch

from partitioner.errors import SamplingError
from partitioner.sharding.index_set import IndexSet
from partitioner.sharding.mesh import Mesh
from runtime.communication.process_groups import ProcessGroups
from runtime.communication.thread_communicator import ThreadGroup
from runtime.processes.launch import begin_worker
from runtime.sampling.sampler import Sampler
from runtime.sampling.sampling_options import Sampling

VOCAB_SIZE = 100
OWNED = [IndexSet.range(0, 51), IndexSet.of([3, *range(60, 100, 2)]), IndexSet.range(40, 100)]
SAMPLINGS = [
    Sampling(),
    Sampling(do_sample=True),
    Sampling(do_sample=True, top_k=0),
    Sampling(do_sample=True, top_k=0, top_p=0.8, min_p=0.01, temperature=2.0),
    Sampling(do_sample=True, top_k=10, repetition_penalty=1.5),
]


def same_tokens(groups: ProcessGroups, sampling: Sampling, logits: torch.Tensor) -> None:
    arguments = {
        "request_ids": torch.arange(len(logits)),
        "step": 3,
        "history": torch.arange(len(logits))[:, None],
        "lengths": torch.ones(len(logits), dtype=torch.int64),
    }
    alone = Sampler(sampling, ThreadGroup(Mesh.of()).communicator(0), vocab_size=VOCAB_SIZE)
    sampler = Sampler(sampling, groups, vocab_size=VOCAB_SIZE, owned=OWNED)
    local = logits[:, OWNED[groups.rank].indices()]
    assert torch.equal(sampler(local, **arguments)[0], alone(logits, **arguments)[0])
    with pytest.raises(SamplingError, match="for row 0: its largest logit is nan"):
        sampler(local.index_fill(1, torch.tensor(2), torch.nan), **arguments)


if __name__ == "__main__":
    warnings.simplefilter("error")
    begin_worker()
    groups = ProcessGroups.connect(Mesh.of(tp=3), timeout_s=30)
    logits = torch.randn(40, VOCAB_SIZE, generator=torch.Generator().manual_seed(0))
    for checked in (True, False):
        groups.begin_run(new_shapes=checked)
        for sampling in SAMPLINGS:
            same_tokens(groups, sampling, logits)
    groups.barrier()
    groups.close()
