"""Values that depend on how many tokens there are, put behind a small model's last norm."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from partitioner.analysis.tokens.token_mixing import why_tokens_mix
from partitioner.compile.tracing.trace import trace
from tests.support import zoo

COUNTING: dict[str, Callable[[Tensor], Tensor]] = {
    "mul": lambda x: x * (1 + x.shape[1] / 100),
    "div": lambda x: x / x.shape[1] ** 0.5,
    "clamp": lambda x: x.clamp(max=x.shape[1] / 8),
    "full": lambda x: x + torch.full((1, x.shape[1], 1), x.shape[1], dtype=x.dtype),
    "scalar_tensor": lambda x: x * torch.scalar_tensor(x.shape[1], dtype=x.dtype).log(),
    "sum": lambda x: x + x.new_ones(x.shape[1]).sum(),
}


def reason(change: Callable[[Tensor], Tensor]) -> str | None:
    model, _ = zoo.tiny("gpt2", n_layer=1)
    model.transformer.ln_f.register_forward_hook(lambda module, inputs, output: change(output))
    return why_tokens_mix(trace(model))


@pytest.mark.parametrize(
    "op", [pytest.param(op, marks=pytest.mark.slow) if op in ("div", "full") else op for op in COUNTING]
)
def test_a_result_that_depends_on_the_number_of_tokens(op: str) -> None:
    assert f"{op} at '" in (found := str(reason(COUNTING[op])))
    assert found.endswith(" in transformer.ln_f computes with the number of tokens")


def test_sizes_are_no_numbers() -> None:
    assert reason(lambda x: x.reshape(x.shape[0] * x.shape[1], -1).reshape(x.shape) * x.new_ones(x.shape[1], 1)) is None
