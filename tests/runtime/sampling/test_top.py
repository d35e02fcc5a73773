"""The most probable tokens, named by the model alone: log_softmax of the logits, on every split of the vocabulary."""

import threading
from typing import Any

import pytest
import torch

from partitioner.sharding.mesh import Mesh
from runtime.communication.thread_communicator import ThreadGroup
from runtime.sampling.sampler import Sampler
from runtime.sampling.sampling_options import Sampling
from tests.runtime.sampling.test_sampler import Owned, plans

VOCABULARY = 11
OPTIONS = Sampling(do_sample=True, temperature=2.0, top_k=1, repetition_penalty=1.5)


def named(logits: torch.Tensor, tokens: torch.Tensor, num: int, num_ranks: int, owned: Owned) -> list[Any]:
    group = ThreadGroup(Mesh.of(tp=num_ranks), timeout_s=20)
    found: list[Any] = [None] * num_ranks

    def body(rank: int) -> None:
        held = owned[rank].indices() if owned is not None else list(range(VOCABULARY))
        sampler = Sampler(OPTIONS, group.communicator(rank), vocab_size=VOCABULARY, owned=owned)
        found[rank] = sampler.top(logits[:, held], tokens, num)
        group.end(rank)

    threads = [threading.Thread(target=body, args=(rank,)) for rank in range(num_ranks)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    return found


@pytest.mark.parametrize("num", [0, 4, VOCABULARY + 5])
@pytest.mark.parametrize(("num_ranks", "owned"), plans(VOCABULARY))
def test_they_are_those_of_the_whole_vocabulary(num: int, num_ranks: int, owned: Owned) -> None:
    torch.manual_seed(num)
    logits, tokens = torch.randn(3, VOCABULARY, dtype=torch.float64), torch.tensor([10, 0, 5])
    known = torch.log_softmax(logits, dim=1)
    best = known.topk(min(num, VOCABULARY), dim=1)
    for values, ids in named(logits, tokens, num, num_ranks, owned):
        torch.testing.assert_close(values, torch.cat([known.gather(1, tokens[:, None]), best.values], dim=1))
        assert torch.equal(ids, torch.cat([tokens[:, None], best.indices], dim=1))
