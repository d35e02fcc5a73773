"""Steps whose tokens are chosen on the device write the same texts as steps that wait for the host."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from partitioner import Plan, partition
from runtime.communication.thread_communicator import ThreadGroup
from runtime.generation.decode_graphs import decoder

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.filterwarnings("default"),  # torch's compiler warns when it is first imported
]


@pytest.fixture(scope="module")
def parts():
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=61, initializer_range=0.5,
    )  # fmt: skip
    return partition(LlamaForCausalLM(config).float().eval(), Plan())


def engine(parts, **options):
    return parts.engine(0, ThreadGroup(parts.mesh).communicator(0), device="cuda", **options)


def are_chained(engine) -> list[bool]:
    """Of each captured step, whether it takes what the one before it has chosen."""
    return [chained for _, (*_, chained) in engine._generate_loop._bound.decoder(len(PROMPTS))._graphs]


PROMPTS = [[5], [7, 8, 9, 10, 11], list(range(20)), [3, 1, 4]]


@pytest.mark.parametrize("compile", [False, True])
def test_chained_steps_write_what_single_steps_write(parts, compile, monkeypatch):
    monkeypatch.setattr(decoder, "_ROUND_TO", 16)  # several captured graphs in one text
    waits, chains = engine(parts), engine(parts, cuda_graph=True, compile=compile)
    plain = waits.generate(PROMPTS, max_new_tokens=50, eos_token_id=[])
    assert torch.equal(chains.generate(PROMPTS, max_new_tokens=50, eos_token_id=[]), plain)
    assert any(are_chained(chains))
    # texts that end at different steps, and a second task on the same captured steps
    ends = [int(plain[0, 30]), int(plain[1, 45])]
    wanted = waits.generate(PROMPTS, max_new_tokens=50, eos_token_id=ends)
    assert torch.equal(chains.generate(PROMPTS, max_new_tokens=50, eos_token_id=ends), wanted)
    assert torch.equal(chains.generate(PROMPTS[:2], max_new_tokens=1), waits.generate(PROMPTS[:2], max_new_tokens=1))


SAMPLED = [
    {"repetition_penalty": 1.3},
    {"do_sample": True, "seed": 3},
    {"do_sample": True, "seed": 4, "top_k": 0, "temperature": 1.2},
    {"do_sample": True, "top_k": 0, "top_p": 0.9, "request_ids": [5, 1, 9, 2]},
    {"do_sample": True, "top_k": 9, "min_p": 0.03, "typical_p": 0.9, "epsilon_cutoff": 0.001},
    {"do_sample": True, "presence_penalty": 0.5, "frequency_penalty": 0.3, "logit_bias": {7: 2.0}},
]


def test_sampled_steps_are_captured_and_write_the_same(parts):
    chains, waits = engine(parts, cuda_graph=True), engine(parts)
    for options in SAMPLED:
        wanted = waits.generate(PROMPTS, max_new_tokens=20, eos_token_id=[], **options)
        assert torch.equal(chains.generate(PROMPTS, max_new_tokens=20, eos_token_id=[], **options), wanted), options
    decoder = chains._generate_loop._bound.decoder(len(PROMPTS))
    assert all(are_chained(chains))
    assert 4 < len(decoder._kinds) < 7  # then one that serves all
    # its own scores, by the same steps
    given = {"max_new_tokens": 20, "eos_token_id": [], "do_sample": True, "seed": 1, "logprobs": True}
    ours, theirs = chains.generate(PROMPTS, **given), waits.generate(PROMPTS, **given)
    assert torch.equal(ours.sequences, theirs.sequences)
    assert torch.allclose(ours.logprobs, theirs.logprobs, atol=1e-4)


def test_a_row_that_is_not_certain_is_asked_of_the_host(parts, monkeypatch):
    monkeypatch.setattr("runtime.sampling.row_sampler._LOOK", 4)
    monkeypatch.setattr("runtime.sampling.row_sampler._LEAST", 2)
    chains, waits = engine(parts, cuda_graph=True), engine(parts)
    options = {"do_sample": True, "top_k": 0, "top_p": 0.95, "temperature": 3.0}
    wanted = waits.generate(PROMPTS, max_new_tokens=30, eos_token_id=[], **options)
    assert torch.equal(chains.generate(PROMPTS, max_new_tokens=30, eos_token_id=[], **options), wanted)


def test_what_is_asked_of_the_host_is_not_chained(parts):
    chains, waits = engine(parts, cuda_graph=True), engine(parts)
    options = {"no_repeat_ngram_size": 2}
    wanted = waits.generate(PROMPTS, max_new_tokens=20, eos_token_id=[], **options)
    assert torch.equal(chains.generate(PROMPTS, max_new_tokens=20, eos_token_id=[], **options), wanted)
    assert are_chained(chains)
    assert not any(are_chained(chains))


def test_a_stream_that_is_left_early_harms_no_other(parts):
    chains, waits = engine(parts, cuda_graph=True), engine(parts)
    stream = chains.stream(PROMPTS, max_new_tokens=40, eos_token_id=[])
    for _ in range(5):
        next(stream)
    del stream
    wanted = waits.generate(PROMPTS, max_new_tokens=20, eos_token_id=[])
    assert torch.equal(chains.generate(PROMPTS, max_new_tokens=20, eos_token_id=[]), wanted)


def test_logits_that_leave_no_choice_are_named(parts):
    broken = engine(parts, cuda_graph=True)
    broken.generate([[1, 2]], max_new_tokens=3, eos_token_id=[])
    for weight in broken.weights:
        weight.fill_(float("nan"))
    with pytest.raises(Exception, match="no token can be chosen"):
        broken.generate([[1, 2]], max_new_tokens=3, eos_token_id=[])
