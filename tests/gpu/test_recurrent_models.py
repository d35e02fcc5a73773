"""Models with states that lie on a GPU: prompts in pieces, and captured steps, say what they say on a CPU."""

import pytest
import torch

from partitioner import Plan, partition
from partitioner.sharding.mesh import Mesh
from runtime.communication.thread_communicator import ThreadGroup
from tests.support import zoo

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.filterwarnings("default"),  # of torch, when it first meets a device
]


@pytest.mark.parametrize("name", ["mamba2", "falcon_h1", "lfm2", "qwen3_next"])
def test_a_model_on_a_gpu_says_what_it_says_on_a_cpu(name: str) -> None:
    model = zoo.tiny(name)[0].double()
    ids = torch.arange(3, 24)[None]
    said = []
    for device, captured in (("cpu", False), ("cuda", False), ("cuda", True)):
        parts = partition(model.to(device), Plan())
        assert parts.generation_report.tokens_at_a_time != 1
        engine = parts.engine(0, ThreadGroup(Mesh.of()).communicator(0), device=device, cuda_graph=captured)
        said.append(engine.generate(ids, max_new_tokens=12, eos_token_id=[]).tolist())
        engine._generate_loop.release()
    assert said[0] == said[1] == said[2]
