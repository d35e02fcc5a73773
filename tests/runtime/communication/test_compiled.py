"""torch.compile over several ranks: a decode step is one graph, whatever carries its collectives."""

import pytest
import torch
from torch._dynamo.utils import counters

from partitioner import Plan, partition
from runtime.communication.thread_communicator import ThreadGroup
from runtime.processes.launch import launch
from tests.support import zoo
from tests.support.generated import prompts


@pytest.mark.slow
@pytest.mark.processes
@pytest.mark.parametrize("sharing", ["off", "on"])
def test_a_decode_step_of_two_processes_is_one_graph(
    sharing: str, monkeypatch: pytest.MonkeyPatch, pytestconfig: pytest.Config
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(pytestconfig.rootpath))
    launch(["tests.runtime.communication.compiled_ranks", "cpu", sharing], num_ranks=2, timeout_s=240)


@pytest.mark.gpu
@pytest.mark.processes
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_decode_step_over_nccl_is_one_graph(monkeypatch: pytest.MonkeyPatch, pytestconfig: pytest.Config) -> None:
    monkeypatch.setenv("PYTHONPATH", str(pytestconfig.rootpath))
    launch(["tests.runtime.communication.compiled_ranks", "cuda", "auto"], num_ranks=2, timeout_s=400)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of the compiler's own imports
@pytest.mark.parametrize("name", ["llama", "mamba", "falcon_h1"])
def test_a_rank_alone_is_one_graph_too(name: str) -> None:
    parts = partition(zoo.tiny(name)[0].float(), Plan(tp=1))
    expected = parts.generate([[5, 6, 7]], max_new_tokens=6, eos_token_id=[])
    torch._dynamo.reset()
    counters.clear()
    engine = parts.engine(0, ThreadGroup(parts.mesh).communicator(0), compile=True)
    assert torch.equal(engine.generate([[5, 6, 7]], max_new_tokens=6, eos_token_id=[]), expected)
    assert not counters["graph_break"]
    assert counters["stats"]["unique_graphs"] == 1


@pytest.mark.parametrize(
    "name",
    [
        "gemma2",
        pytest.param("llama", marks=pytest.mark.slow),
        "mamba",
        pytest.param("falcon_h1", marks=pytest.mark.slow),
    ],
)
def test_steps_from_fixed_memory_say_what_others_say(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of several lengths, past the window of those layers that have one; states stay where they are."""
    parts = partition(zoo.tiny(name)[0], Plan(tp=1))
    texts = prompts(name, (3, 11))
    new = 14 if name == "gemma2" else 5
    expected = parts.generate(texts, max_new_tokens=new, eos_token_id=[])
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    engine = parts.engine(0, ThreadGroup(parts.mesh).communicator(0), compile=True)
    assert torch.equal(engine.generate(texts, max_new_tokens=new, eos_token_id=[], prefill_step=4), expected)
    shorter = [text[:2] for text in texts]  # with states that begin anew
    assert engine.generate(shorter, max_new_tokens=4, eos_token_id=[]).tolist() == (
        parts.generate(shorter, max_new_tokens=4, eos_token_id=[]).tolist()
    )
