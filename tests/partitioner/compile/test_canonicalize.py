"""What is written in several ways is written in one, and says the same."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from partitioner.compile.tracing.trace import trace
from partitioner.program.node_arguments import operation
from partitioner.program.program import Program
from tests.support import zoo
from tests.support.interpret import run

aten = torch.ops.aten
PRODUCTS = (aten.matmul, aten.bmm, aten.mm)


class Angles(nn.Module):
    """Stands in for a layer's MLP, and makes something of numbers as rotary angles are made."""

    def __init__(self, made: Any) -> None:
        super().__init__()
        self.made = made
        self.register_buffer("frequencies", torch.rand(6), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.made(self.frequencies, x.mean(-1)[:, None]).transpose(-1, -2).mean(-1, keepdim=True)


def angles(made: Any) -> tuple[Any, Program, list[Any]]:
    """The model, its trace, and the ops of its angles."""
    model, _ = zoo.tiny("llama", num_hidden_layers=1)
    model = model.double()
    model.model.layers[0].mlp = Angles(made)
    program = trace(model)
    calls = [node for node in program.graph.nodes if node.op == "call_function"]
    return model, program, [operation(node) for node in calls if str(node.meta.get("path")).endswith("mlp")]


@pytest.mark.parametrize(
    ("made", "products"),
    [
        (lambda f, rows: f[None, :, None].double().expand(rows.shape[0], -1, 1) @ rows, 0),
        (lambda f, rows: f[None, :, None].expand(rows.shape[0], -1, 1).double() @ rows, 0),
        (lambda f, rows: (rows.mT @ f[None, None].expand(rows.shape[0], 1, -1).double()).mT, 0),
        (lambda f, rows: f.view(1, 3, 2).double().expand(rows.shape[0], -1, -1) @ torch.cat([rows, rows * 2], 1), 1),
        (lambda f, rows: f[:1].view(1, 1, 1).double().expand(1, 6, 1) @ rows, 1),
        (lambda f, rows: f[None, :, None].double() @ rows, 1),
    ],
    ids=["repeated", "repeated, then cast", "on the right", "of two each", "whose rows nobody else has", "as it is"],
)
def test_a_matmul_of_what_is_repeated_is_a_product_of_each_two_numbers(made: Any, products: int) -> None:
    model, program, ops = angles(made)
    assert sum(op in PRODUCTS for op in ops) == products
    ids = torch.tensor([[5, 9, 2, 7], [3, 3, 8, 1]])
    with torch.no_grad():
        expected = model(input_ids=ids).logits
    found = run(program, input_ids=ids)
    assert float((found - expected).abs().max() / expected.abs().max()) < 1e-12


def test_another_op_in_its_place_is_noticed() -> None:
    """Negative control."""
    model, program, ops = angles(lambda f, rows: f[None, :, None].double().expand(rows.shape[0], -1, 1) @ rows)
    assert aten.mul in ops
    for node in program.graph.nodes:
        if operation(node) is aten.mul and str(node.meta.get("path")).endswith("mlp"):
            node.target = aten.add.Tensor
    ids = torch.tensor([[5, 9, 2, 7]])
    with torch.no_grad():
        expected = model(input_ids=ids).logits
    assert float((run(program, input_ids=ids) - expected).abs().max() / expected.abs().max()) > 1e-6
