"""What surrounds the layers of a decoded token, by kernels against torch op by op: embedding and likeliest token."""

import pytest
import torch

from runtime.ops.embedding import vocab_parallel_embedding
from runtime.sampling.likeliest.likeliest_tokens import advance, best, largest, takes

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.filterwarnings("default"),  # torch's compiler warns when it is first imported
]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(("rows", "columns"), [(1, 128256), (3, 64128), (32, 1000), (2, 7)])
def test_the_likeliest_token(dtype: torch.dtype, rows: int, columns: int) -> None:
    logits = torch.randn(rows, columns + 8, device="cuda").to(dtype)[:, 4:-4]
    logits[0, columns - 1] = logits[0, 5] = 50  # of equal ones the first
    if rows > 2:
        logits[1, columns // 2], logits[2] = float("nan"), -torch.inf
    tokens = torch.arange(columns, device="cuda") * 2 + 1
    assert takes(logits)
    for _ in range(3):  # its counters are zero again
        message = largest(logits, tokens)
        values, places = logits.max(1)
        assert torch.equal(message[0, :, 0].nan_to_num(7e7), values.double().nan_to_num(7e7))
        assert torch.equal(message[0, :, 1].long(), tokens[places])
    told = best(torch.cat([message, message + 1]))
    assert torch.equal(told[1].nan_to_num(7e7), (values.double() + 1).nan_to_num(7e7))
    ids, positions, steps = (torch.full((rows, 1), 3, device="cuda") for _ in range(3))
    advance(told, ids, positions, steps[:, 0])
    assert torch.equal(ids[:, 0], told[0].long())
    assert positions.eq(4).all()
    assert steps.eq(4).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_part_of_an_embedding(dtype: torch.dtype) -> None:
    weight, ids = torch.randn(50, 1500, device="cuda", dtype=dtype), torch.randint(0, 200, (3, 70), device="cuda")
    found, wanted = (vocab_parallel_embedding(ids.to(on), weight.to(on), start=60) for on in ("cuda", "cpu"))
    assert torch.equal(found.cpu(), wanted)
