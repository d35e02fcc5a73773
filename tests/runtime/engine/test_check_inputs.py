import pytest
import torch

from partitioner.errors import InputError
from runtime.engine.check_inputs import complete_inputs
from runtime.program.rank_program import Bound, RunInput

CPU = torch.device("cpu")
INPUTS = (
    RunInput("input_ids", torch.int64, ("batch", "sequence"), "required"),
    RunInput("position_ids", torch.int64, ("batch", "sequence"), "arange"),
    RunInput("attention_mask", torch.int64, ("batch", "sequence"), "ones"),
    RunInput("token_type_ids", torch.int64, ("batch", 3), "zeros"),
)


def ids(*shape: int) -> torch.Tensor:
    return torch.zeros(shape, dtype=torch.int64)


def test_defaults_follow_the_inputs_given() -> None:
    _, positions, mask, types = complete_inputs(INPUTS, {"input_ids": ids(2, 4), "attention_mask": None}, CPU)
    assert positions.tolist() == [[0, 1, 2, 3]] * 2
    assert mask.tolist() == [[1] * 4] * 2
    assert types.tolist() == [[0] * 3] * 2


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"input_idz": ids(1, 2)}, r"unknown input 'input_idz'; did you mean 'input_ids'\? The inputs are input_ids, "),
        ({"foo": ids(1, 2)}, "unknown input 'foo'; the inputs are input_ids, "),
        ({"input_ids": ids(1, 2).to("meta")}, "'input_ids' must hold data, got a tensor on the meta device"),
        ({}, r"'input_ids' is required: \[batch, sequence\], torch.int64"),
        ({"input_ids": [[1]]}, "must be a tensor, got list"),
        ({"input_ids": ids(1, 2).bool()}, "must have the dtype torch.int64, got torch.bool"),
        ({"input_ids": ids(1, 2).float()}, "must have the dtype torch.int64, got torch.float32"),
        ({"input_ids": ids(1, 2), "use_cache": 5}, "unknown input 'use_cache'"),
        ({"input_ids": ids(1, 2), "output_attentions": True}, "unknown input 'output_attentions'"),
        ({"input_ids": ids(1, 2), "past_key_values": ids(1, 2)}, "unknown input 'past_key_values'"),
        ({"input_ids": ids(4)}, r"must have the shape \[batch, sequence\], got \[4\]"),
        ({"input_ids": ids(1, 2), "token_type_ids": ids(1, 2)}, r"must have the shape \[batch, 3\], got \[1, 2\]"),
        ({"input_ids": ids(1, 0)}, "is empty: its sequence is 0"),
        ({"input_ids": ids(1, 2), "position_ids": ids(1, 3)}, "'position_ids' has sequence 3, but 'input_ids' has"),
        (
            {"input_ids": ids(3, 2), "position_ids": ids(2, 2)},
            "'position_ids' has batch 2, but 'input_ids' has batch 3",
        ),
        (
            {"input_ids": ids(1, 2), "position_ids": ids(2, 2)},
            "'position_ids' has batch 2, but 'input_ids' has batch 1",
        ),
        ({"input_ids": ids(3, 2), "attention_mask": ids(1, 2)}, "'attention_mask' has batch 1, but 'input_ids' has"),
    ],
)
def test_what_is_wrong_is_said(given, message: str) -> None:
    with pytest.raises(InputError, match=message):
        complete_inputs(INPUTS, given, CPU)


def test_a_default_needs_its_size() -> None:
    with pytest.raises(InputError, match="no default without an input that tells the batch"):
        complete_inputs(INPUTS[1:], {}, CPU)


def test_sizes_that_the_graph_is_not_right_for() -> None:
    inputs = (RunInput("input_ids", torch.int64, ("batch", "sequence"), "required"),)
    ids = torch.zeros(1, 65, dtype=torch.int64)
    with pytest.raises(
        InputError, match=r"'input_ids' has sequence 65, but this model was compiled for sequence 1 to 64"
    ):
        complete_inputs(inputs, {"input_ids": ids}, torch.device("cpu"), {"sequence": (1, 64)})
    assert len(complete_inputs(inputs, {"input_ids": ids}, torch.device("cpu"), {"sequence": (2, None)})) == 1


def test_one_row_of_positions_stands_for_all() -> None:
    positions = torch.tensor([[4, 5, 6]])
    completed = complete_inputs(INPUTS, {"input_ids": ids(2, 3), "position_ids": positions}, CPU)
    assert completed[1].tolist() == [[4, 5, 6]] * 2
    completed = complete_inputs(INPUTS, {"input_ids": ids(1, 3), "position_ids": positions}, CPU)
    assert completed[1].tolist() == [[4, 5, 6]]


def test_a_mask_for_a_model_that_takes_none_says_how_to_pad() -> None:
    with pytest.raises(
        InputError, match=r"unknown input 'attention_mask'; .*pad on the right.* The inputs are input_ids"
    ):
        complete_inputs(INPUTS[:2], {"input_ids": ids(1, 3), "attention_mask": ids(1, 3)}, CPU)


BOUND = Bound(0, 10, 11, "embed.weight")


def test_values_that_are_in_no_row() -> None:
    inputs = (RunInput("input_ids", torch.int64, ("batch", "sequence"), "required", BOUND),)
    for wrong in (11, -1):
        given = torch.tensor([[0, 10, 3], [1, 2, wrong]])
        message = rf"'input_ids' holds {wrong} at \[1, 2\], but its values must be from 0 to 10: .* 11 rows of 'embed.w"
        with pytest.raises(InputError, match=message):
            complete_inputs(inputs, {"input_ids": given}, CPU)
    assert complete_inputs(inputs, {"input_ids": torch.tensor([[0, 10]])}, CPU)[0].tolist() == [[0, 10]]


def test_counting_past_the_last_row() -> None:
    inputs = (INPUTS[0], RunInput("position_ids", torch.int64, ("batch", "sequence"), "arange", BOUND))
    assert complete_inputs(inputs, {"input_ids": ids(1, 11)}, CPU)[1].max() == 10
    with pytest.raises(
        InputError, match=r"'input_ids' has sequence 12, and this model takes at most 11: .*position_ids"
    ):
        complete_inputs(inputs, {"input_ids": ids(1, 12)}, CPU)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int16, torch.uint8])
def test_narrower_integers_are_widened(dtype: torch.dtype) -> None:
    given, *_ = complete_inputs(INPUTS, {"input_ids": torch.tensor([[3, 5]], dtype=dtype)}, CPU)
    assert given.dtype == torch.int64
    assert given.tolist() == [[3, 5]]


def test_a_mask_of_booleans_is_a_mask() -> None:
    mask = torch.tensor([[True, False]])
    assert complete_inputs(INPUTS, {"input_ids": ids(1, 2), "attention_mask": mask}, CPU)[2].tolist() == [[1, 0]]


@pytest.mark.parametrize(
    "usual",
    [
        {"use_cache": True},
        {"use_cache": False, "return_dict": True, "output_attentions": False, "output_hidden_states": None},
        {"past_key_values": None, "labels": None, "logits_to_keep": 0, "attention_mask": None, "token_type_ids": None},
        {"attention_mask": torch.ones(2, 3, dtype=torch.int64)},
        {"attention_mask": torch.ones(2, 3, dtype=torch.bool)},
    ],
    ids=lambda usual: ", ".join(usual),
)
def test_keywords_that_change_nothing_are_taken(usual: dict) -> None:
    plain = complete_inputs(INPUTS[:2], {"input_ids": ids(2, 3)}, CPU)
    found = complete_inputs(INPUTS[:2], {"input_ids": ids(2, 3), **usual}, CPU)
    assert all(map(torch.equal, found, plain))


@pytest.mark.parametrize("shape", [(2, 4), (1, 3)])
def test_a_mask_of_ones_of_another_shape_is_not_the_prompts(shape: tuple[int, int]) -> None:
    with pytest.raises(InputError, match="unknown input 'attention_mask'"):
        complete_inputs(INPUTS[:2], {"input_ids": ids(2, 3), "attention_mask": torch.ones(shape)}, CPU)
