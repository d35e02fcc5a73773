"""Generation as its users meet it: prompts, options, ends, streams, errors."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from partitioner import Plan, partition
from partitioner.errors import CommunicationError, InputError, PlanError, SamplingError
from runtime.communication.thread_communicator import ThreadGroup
from runtime.generation.generation_request import Generated
from tests.support import zoo
from tests.support.generated import prompts
from tests.support.partitioned import compiled_once


def new(parts, texts, count=6, **options):
    options.setdefault("eos_token_id", [])
    return parts.generate(texts, max_new_tokens=count, **options)


def test_padding_on_either_side_is_left_where_it_is() -> None:
    parts = compiled_once("llama", 2)
    short, long = prompts("llama", (4, 7))
    listed = new(parts, [short, long])
    left = torch.tensor([[0] * 3 + short, long])
    mask = torch.tensor([[0] * 3 + [1] * 4, [1] * 7])
    assert torch.equal(new(parts, left, attention_mask=mask), listed)
    right = torch.tensor([short + [0] * 3, long])
    found = new(parts, right, attention_mask=mask.flip(1).where(torch.tensor([[True], [False]]), mask))
    assert torch.equal(found[:, :7], right)
    assert torch.equal(found[:, 7:], listed[:, 7:])


@pytest.mark.parametrize("tp", [1, 2, 4])
def test_the_same_seed_says_the_same_on_every_plan_and_in_any_order(tp: int) -> None:
    texts = prompts("llama", (4, 7, 2))
    one = new(compiled_once("llama", 1), texts, 12, do_sample=True, seed=5)
    many = new(compiled_once("llama", tp), texts[::-1], 12, do_sample=True, seed=5, request_ids=[2, 1, 0])
    assert torch.equal(one[:, -12:], many.flip(0)[:, -12:])
    other = new(compiled_once("llama", tp), texts, 12, do_sample=True, seed=6)
    assert not torch.equal(one, other)


def test_a_sequence_ends_at_eos_and_is_filled_up() -> None:
    parts = compiled_once("mistral", 2)
    texts = prompts("mistral", (4, 7))
    free = new(parts, texts, 8)
    end = int(free[0, 9])  # the third new token
    at = free[0, 7:].tolist().index(end)
    found = new(parts, texts, 8, eos_token_id=end, pad_token_id=1)
    assert torch.equal(new(parts, texts, 8, eos_token_id=torch.tensor(end), pad_token_id=1), found)
    assert found[0, 7 : 7 + at + 1].tolist() == free[0, 7 : 7 + at + 1].tolist()
    assert set(found[0, 7 + at + 1 :].tolist()) <= {1}
    row = free[1, 7:].tolist()
    kept = row[: row.index(end) + 1] if end in row else row
    assert found[1, 7 : 7 + len(kept)].tolist() == kept


class _Letters:
    def decode(self, ids: list[int]) -> str:
        return "".join(chr(97 + i % 26) for i in ids)


def test_stop_strings_end_a_sequence() -> None:
    parts = compiled_once("mistral", 1)
    text = prompts("mistral", (5,))
    free = new(parts, text, 8)[0, 5:].tolist()
    stop = _Letters().decode(free[1:3])
    found = new(parts, text, 8, stop_strings=[stop], tokenizer=_Letters())[0, 5:].tolist()
    first = _Letters().decode(free).index(stop) + 2
    assert found == free[:first]
    with pytest.raises(InputError, match="tokenizer"):
        new(parts, text, stop_strings="x")
    with pytest.raises(InputError, match=r"need a tokenizer to decode with.*got tokenizer='folder'"):
        new(parts, text, stop_strings="x", tokenizer="folder")


def test_a_stream_yields_what_generate_returns_and_may_be_left() -> None:
    parts = compiled_once("llama", 2)
    texts = prompts("llama", (4, 7))
    steps = list(parts.stream(texts, max_new_tokens=5, eos_token_id=[]))
    assert torch.equal(torch.tensor([step.tokens for step in steps]).t(), new(parts, texts, 5)[:, -5:])
    started = parts.stream(texts, max_new_tokens=5, eos_token_id=[])
    next(started)
    started.close()
    assert new(parts, texts, 2).shape == (2, 9)  # and the ranks are free again


@pytest.mark.parametrize("tp", [1, 2])
def test_ranks_that_are_in_the_middle_of_a_stream_say_so(tp: int) -> None:
    parts = compiled_once("llama", tp)
    stream = parts.stream([[5]], max_new_tokens=40, eos_token_id=[])
    next(stream)
    with pytest.raises(CommunicationError, match="close"):
        new(parts, [[9]])
    with pytest.raises(CommunicationError, match="close"):
        parts.simulate(input_ids=torch.tensor([[5]]))
    stream.close()
    assert new(parts, [[9]]).shape == (1, 7)


def test_a_stream_that_another_text_has_overtaken_ends() -> None:
    parts = compiled_once("llama", 1)
    engine = parts.engine(0, ThreadGroup(parts.mesh).communicator(0))
    stream = engine.stream([[5]], max_new_tokens=40, eos_token_id=[])
    next(stream)
    engine.generate([[9]], max_new_tokens=3)
    with pytest.raises(InputError, match="another text"):
        next(stream)


def test_a_model_without_a_head_is_refused() -> None:
    base = zoo.tiny("llama")[0].model
    with pytest.raises(PlanError, match="no head"):
        partition(base, Plan(tp=2)).generate([[3, 4]])


def test_log_probabilities_go_with_the_tokens() -> None:
    found = new(compiled_once("llama", 2), prompts("llama", (4,)), 5, logprobs=True)
    assert isinstance(found, Generated)
    assert found.logprobs.shape == (1, 5)
    assert bool((found.logprobs <= 0).all())


def test_the_cache_serves_a_second_and_a_smaller_task() -> None:
    parts = compiled_once("llama", 2)
    texts = prompts("llama", (4, 7, 20))
    first = new(parts, texts)
    again = new(parts, texts[:2])
    assert torch.equal(again[:, -6:], first[:2, -6:])
    assert torch.equal(new(parts, texts), first)


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        ({"num_beams": 4}, InputError, "beam search"),
        ({"num_return_sequences": 2}, InputError, "several sequences"),
        ({"return_dict_in_generate": True}, InputError, "return_dict_in_generate"),
        ({"token_type_ids": torch.zeros(1, 3)}, InputError, "return_token_type_ids=False"),
        ({"input_ids": [[1]]}, InputError, "given twice, as prompts and input_ids"),
        ({"eos_token_id": -2}, InputError, "eos_token_id"),
        ({"temprature": 1.0}, InputError, "temperature"),
        ({"max_new_tokens": 0}, InputError, "at least 1"),
        ({"prefill_step": 0}, InputError, "at least 1"),
        ({"temperature": -1.0}, SamplingError, "temperature"),
        ({"request_ids": [1, 2, 3]}, InputError, "request_ids"),
        ({"request_ids": [1.5]}, InputError, "request_ids"),
        ({"eos_token_id": "a"}, InputError, "eos_token_id"),
        ({"eos_token_id": True}, InputError, "eos_token_id"),
        ({"pad_token_id": -1}, InputError, "pad_token_id"),
        ({"stop_strings": 5}, InputError, "stop_strings"),
        ({"logprobs": "a"}, InputError, "logprobs"),
        ({"max_new_tokens": 10**12}, InputError, "max_new_tokens"),
    ],
)
def test_options_that_make_no_sense_are_refused(options, error, says) -> None:
    with pytest.raises(error, match=says):
        compiled_once("llama", 2).generate([[3, 4, 5]], **options)


@pytest.mark.parametrize(
    ("texts", "says"),
    [
        ([], "no prompts"),
        ([[3], []], "prompt 1 is empty"),
        ([[3, 4, 100_000]], "prompt 0"),
        (torch.zeros(2, 3), "token ids"),
        (torch.zeros(3, dtype=torch.int64), "token ids"),
        (torch.zeros(2, 3, dtype=torch.int64, device="meta"), "hold data"),
        ("hello", "token ids"),
        (None, "token ids"),
        ([1, 2, 3], "a list with a list"),
        ([[1.0, 2.0]], "prompt 0 must be token ids"),
        ([[2**63]], "prompt 0 must be token ids"),
        ([[1], [None]], "prompt 1 must be token ids"),
    ],
)
def test_prompts_that_make_no_sense_are_refused(texts, says) -> None:
    with pytest.raises(InputError, match=says):
        compiled_once("llama", 2).generate(texts)


def test_a_text_longer_than_the_table_of_positions_is_refused_before_it_starts() -> None:
    with pytest.raises(InputError, match="positions"):
        compiled_once("gpt2", 2).generate([[3, 4, 5]], max_new_tokens=100_000)


def test_a_mask_with_a_hole_or_of_another_shape_is_refused() -> None:
    parts = compiled_once("llama", 1)
    ids = torch.full((1, 4), 5)
    with pytest.raises(InputError, match="hole"):
        parts.generate(ids, attention_mask=torch.tensor([[1, 0, 1, 1]]))
    with pytest.raises(InputError, match="must be"):
        parts.generate(ids, attention_mask=torch.ones(1, 3))


def test_the_engine_sets_aside_what_cache_bytes_says() -> None:
    parts = partition(zoo.tiny("gemma2")[0], Plan(tp=2))  # with engines of its own
    new(parts, prompts("gemma2", (4, 7)), 5)
    for rank, engine in enumerate(parts._simulator.engines):
        cache = engine._generate_loop.cache
        assert cache is not None
        assert cache.bytes == parts.cache_bytes(max_batch=2, max_length=64, prefill_step=7)[rank]


USUAL = {
    "num_beams": 1,
    "num_return_sequences": 1,
    "use_cache": True,
    "eos_token_id": -1,
    "typical_p": 1.0,
    "no_repeat_ngram_size": 0,
    "min_new_tokens": None,
    "streamer": None,
    "logits_processor": [],
    "return_dict_in_generate": False,
    "cache_implementation": "dynamic",
    "renormalize_logits": True,
}


@pytest.mark.parametrize("option", USUAL)
def test_an_option_that_changes_nothing_is_taken(option: str) -> None:
    text = prompts("llama", (5,))
    found = compiled_once("llama", 2).generate(text, max_new_tokens=3, **{"eos_token_id": [], option: USUAL[option]})
    assert torch.equal(found, new(compiled_once("llama", 2), text, 3))


@pytest.mark.parametrize("name", ["input_ids", "inputs"])
def test_prompts_go_by_transformers_names(name: str) -> None:
    parts = compiled_once("llama", 2)
    ids = torch.tensor(prompts("llama", (5,)))
    given = {name: ids.int(), "attention_mask": torch.ones_like(ids)}
    assert torch.equal(new(parts, None, 3, **given), new(parts, ids, 3))
    steps = list(parts.stream(max_new_tokens=3, eos_token_id=[], **given))
    assert [step.tokens[0] for step in steps] == new(parts, ids, 3)[0, -3:].tolist()


def test_what_a_tokenizer_returns_is_what_generate_and_simulate_take(embedded_folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(embedded_folder)
    parts = partition(embedded_folder, Plan(tp=2))
    model = AutoModelForCausalLM.from_pretrained(embedded_folder).eval()
    given = tokenizer(["Return a list of", "Return"], return_tensors="pt", padding=True, padding_side="left")
    assert torch.equal(parts.generate(**given, max_new_tokens=4), model.generate(**given, max_new_tokens=4))
    given = tokenizer(["Return a list of"], return_tensors="pt")
    torch.testing.assert_close(parts.simulate(**given, use_cache=False), model(**given, use_cache=False).logits)


@pytest.mark.parametrize("plan", ["tp=1", "sp=2"])
def test_a_larger_cache_binds_no_program_anew(plan: str) -> None:
    """Whatever its size, a program that runs node by node looks up where rows lie when it runs."""
    # with a window: how many slots it has follows from the size
    parts = partition(zoo.tiny("mistral")[0], Plan.parse(plan))
    short, long = prompts("mistral", (3, 90))
    new(parts, [short], 2)
    loops = [engine._generate_loop for engine in parts._simulator.engines]
    before, sizes = [loop._bound for loop in loops], [loop.cache.bytes for loop in loops]
    tasks = ([long, short], [short] * 3, [long])
    found = [new(parts, texts, 3, prefill_step=16) for texts in tasks]
    assert [loop._bound for loop in loops] == before
    assert all(loop.cache.bytes > size for loop, size in zip(loops, sizes, strict=True))
    for texts, said in zip(tasks, found, strict=True):
        for loop in loops:
            loop.release()
        assert torch.equal(new(parts, texts, 3, prefill_step=16), said)
    assert loops[0]._bound is not before[0]
