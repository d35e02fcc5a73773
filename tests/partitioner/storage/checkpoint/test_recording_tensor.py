import pytest
import torch
from torch import Tensor, nn

from partitioner.errors import WeightError
from partitioner.storage.checkpoint.recording_tensor import RecordingTensor
from tests.partitioner.storage.checkpoint.test_strided_windows import evaluate


def recording_tensor(name: str = "w", *shape: int, dtype: torch.dtype = torch.float32) -> RecordingTensor:
    return RecordingTensor.of(name, shape or (4, 6), dtype, lambda one, other: False)


MOVES = {
    "transpose": lambda w: torch.transpose(w, 0, 1).contiguous(),
    "T": lambda w: w.t(),
    "last": lambda w: w[..., -2:],
    "select": lambda w: w[1],
    "negative": lambda w: w.select(-1, -2),
    "view": lambda w: w.view(2, 2, -1).transpose(1, 2).reshape(4, 6),
    "chunk": lambda w: torch.chunk(w, 4, dim=1)[2],
    "split": lambda w: torch.split(w, [1, 3], dim=0)[1],
    "unbind": lambda w: torch.unbind(w, 1)[4],
    "flatten": lambda w: w.flatten(),
    "stack": lambda w: torch.stack([w, w], dim=-1),
    "cat": lambda w: torch.cat([w[:1], w[2:]], dim=-2),
    "squeeze": lambda w: w[:1].squeeze(0).unsqueeze(-1),
    "step": lambda w: w[::2, 1::3],
    "narrow": lambda w: w.narrow(1, 2, 3),
    "data": lambda w: nn.Parameter(w).data,
    "permute": lambda w: w.reshape(2, 2, 6).permute(2, 0, -2),
    "pad": lambda w: nn.functional.pad(w, (0, 0)),
}


@pytest.mark.parametrize("name", MOVES)
@torch.no_grad()
def test_a_move_is_noted_as_it_is_made(name: str) -> None:
    tensor = torch.arange(24).reshape(4, 6)
    moved = MOVES[name](recording_tensor())
    expected = MOVES[name](tensor.float())
    assert isinstance(moved, RecordingTensor)
    assert moved.shape == expected.shape
    assert not moved.computed
    assert torch.equal(evaluate(moved.moved, {"w": tensor}), expected.long())


COMPUTED = {
    "sum": lambda w: w + 1,
    "log": lambda w: w.exp().log(),
    "flip": lambda w: w.flip(0),
    "zeros": lambda w: torch.zeros_like(w),
    "join": lambda w: torch.cat([w, torch.zeros(1, 6)]),
    "dtypes": lambda w: torch.cat([w, w.double()]),
    "twice": lambda w: w.bfloat16().float(),
    "within": lambda w: torch.stack([w, w + 1])[0],
    "pad": lambda w: nn.functional.pad(w, (0, 1)),
}


@pytest.mark.parametrize("name", COMPUTED)
@torch.no_grad()
def test_what_is_computed_says_so(name: str) -> None:
    made = COMPUTED[name](recording_tensor())
    assert isinstance(made, RecordingTensor)
    assert made.computed
    assert made.shape == COMPUTED[name](torch.zeros(4, 6)).shape


@torch.no_grad()
def test_a_write_through_a_view_reaches_the_whole_but_no_copy() -> None:
    whole = recording_tensor()
    copy = whole.clone()
    whole[-1][2:].fill_(3.0)
    assert whole.computed == ["aten.fill_ writes into it"]
    assert whole.transpose(0, 1).computed
    assert not copy.computed


def test_the_dtype_is_that_of_the_cast() -> None:
    cast = recording_tensor().to(device="cpu", dtype=torch.bfloat16)
    assert (cast.dtype, cast.stored, cast.computed) == (torch.bfloat16, torch.float32, [])
    assert cast.to(torch.bfloat16).computed == []


@torch.no_grad()
def test_what_needs_values_is_refused_by_name() -> None:
    with pytest.raises(
        WeightError, match=r"aten\._local_scalar_dense, which needs the values of RecordingTensor.*of w\)"
    ):
        recording_tensor("w", 1).item()
    with pytest.raises(WeightError, match=r"aten\.equal"):
        torch.equal(recording_tensor() + 1, recording_tensor())


def test_equal_is_asked_of_the_files() -> None:
    asked: list[tuple[Tensor, Tensor]] = []

    def same(one: RecordingTensor, other: RecordingTensor) -> bool:
        asked.append((one, other))
        return True

    one, other = (RecordingTensor.of(name, (4, 6), torch.float32, same) for name in "ab")
    assert torch.equal(one, other)
    assert len(asked) == 1
    assert torch.equal(one, one.detach())
    assert not torch.equal(one, other.to(torch.bfloat16))
    assert len(asked) == 1, "the same place is the same, another dtype is not"
