"""Identical layers traced once give the program of the full trace; layers that only look alike are traced."""

from __future__ import annotations

import copy
import functools
import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
)

from partitioner.analysis.report.report import make_report
from partitioner.capture.inputs.graph_inputs import choose_inputs
from partitioner.capture.layers.layer_index import LayerIndex
from partitioner.capture.layers.share_layers import every_layer
from partitioner.capture.trace.fake_model import make_fake_model
from partitioner.compile.tracing.trace import trace
from partitioner.program.program import LayersTraced, Program
from tests.support import interpret, zoo
from tests.supported_models.columns.same_program import difference

DEPTH = 4  # the first and the last are traced, one is not, and another one may be changed
SIZES: dict[str, Any] = {
    "vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": DEPTH, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 4, "max_position_embeddings": 64,
}  # fmt: skip
IDS = torch.tensor([[5, 17, 9, 33, 2], [1, 1, 30, 7, 20]])


def llama(depth: int = DEPTH) -> Any:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**{**SIZES, "num_hidden_layers": depth})).double().eval()


def compared(model: PreTrainedModel) -> tuple[Program, Program]:
    once = trace(model)
    with every_layer():
        return once, trace(model)


@functools.cache
def llamas() -> tuple[Any, Program, Program]:
    model = llama()
    return model, *compared(model)


def number_traced(program: Program) -> int:
    assert program.layers is not None
    return program.layers.traced


def report_of(program: Program) -> str:
    return str(make_report(program, plan="Plan()"))


def test_alike_layers_are_traced_twice_and_give_the_same_program() -> None:
    model, once, full = llamas()
    assert once.layers == LayersTraced(DEPTH, 2)
    assert number_traced(full) == DEPTH
    assert difference(once, full) is None
    assert f"\ntraced: 2 of {DEPTH} layers; each of the others is a copy of one like it" in report_of(once)
    assert f"\ntraced: every layer, {DEPTH} of them (every layer was asked for)" in report_of(full)
    assert torch.equal(interpret.run(once, input_ids=IDS), model(IDS).logits)


@pytest.mark.parametrize(
    ("model_type", "depth"),
    [("openai-gpt", {"n_layer": 4}), pytest.param("xlm", {"n_layers": 4}, marks=pytest.mark.slow)],
)
def test_a_node_is_said_to_come_from_where_it_comes_from(model_type: str, depth: dict[str, int]) -> None:
    """OpenAI-GPT's modules are named by torch.export from the block that calls them; XLM's norms are layers by
    themselves.
    """
    once, full = compared(zoo.tiny(model_type, **depth)[0])
    assert once.layers is not None
    assert once.layers.traced < once.layers.layers
    assert difference(once, full) is None
    paths = {str(node.meta.get("path")) for node in once.graph.nodes if node.op == "call_function"}
    sources = {str(node.meta.get("source")).partition(".py")[0] for node in once.graph.nodes}
    assert not {path for path in paths if path.startswith(("attn", "q_lin"))}
    assert "share_layers" not in sources


def test_the_comparison_sees_another_weight() -> None:
    once, full = llamas()[1].copy(), llamas()[2]
    node = next(n for n in once.graph.nodes if n.op == "get_attr" and n.target == "model.layers.2.mlp.up_proj.weight")
    node.target = "model.layers.1.mlp.up_proj.weight"
    assert "up_proj" in (difference(once, full) or "")


def test_layers_that_take_turns_are_of_two_kinds() -> None:
    torch.manual_seed(0)
    model = Gemma2ForCausalLM(Gemma2Config(**{**SIZES, "num_hidden_layers": 5}, sliding_window=3)).double().eval()
    once, full = compared(model)
    assert number_traced(once) == 4
    assert difference(once, full) is None
    windows = [node.kwargs.get("window") for node in once.graph.nodes if "attention" in node.name and node.kwargs]
    assert windows == [3, None, 3, None, 3]


def test_a_size_that_the_first_layer_computes_is_computed_once() -> None:
    """BLOOM folds heads into the batch: every layer needs batch x heads, and a trace computes it where it first is."""
    torch.manual_seed(0)
    config = BloomConfig(vocab_size=40, hidden_size=16, n_layer=DEPTH, n_head=4)
    model = BloomForCausalLM(config).double().eval()
    once, full = compared(model)
    assert number_traced(once) == 2
    assert difference(once, full) is None
    assert [node.target for node in once.graph.nodes].count(operator.mul) == 1


def scaled(model: Any) -> None:
    model.model.layers[2].self_attn.scaling *= 2


def another_activation(model: Any) -> None:
    model.model.layers[2].mlp.act_fn = nn.ReLU()


class Calling(nn.Module):
    def __init__(self, function: Callable[[Any], Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Any) -> Any:
        return self.function(x)


def another_closure(model: Any) -> None:
    def times(factor: float) -> Callable[[Any], Any]:
        return lambda x: x * factor

    for i, layer in enumerate(model.model.layers):
        layer.mlp.act_fn = Calling(times(2.0 if i == 2 else 1.0))


class Parity(nn.Module):
    """Reads the number of its layer."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number

    def forward(self, x: Any) -> Any:
        return x if self.number % 2 else -x


class Looked(Parity):
    """Looks something up by its number, as in a list of a configuration."""

    SCALES = (1.0, 1.0, 3.0, 1.0)

    def forward(self, x: Any) -> Any:
        return x * self.SCALES[self.number]


class Scaled(Parity):
    """Hands its number to torch."""

    def forward(self, x: Any) -> Any:
        return x / (self.number + 1)


def of_their_number(kind: type[Parity]) -> Callable[[Any], None]:
    def change(model: Any) -> None:
        for i, layer in enumerate(model.model.layers):
            layer.mlp.act_fn = kind(i)

    return change


class Held:
    """Where no attribute shows what is held."""

    __slots__ = ("value",)


class Remembering(nn.Module):
    """What the first layer makes is read by those after it, behind the model's back."""

    def __init__(self, held: Held, *, first: bool) -> None:
        super().__init__()
        self.held, self.first = held, first

    def __deepcopy__(self, memo: dict[int, Any]) -> Remembering:
        copied = Remembering(memo.setdefault(id(self.held), Held()), first=self.first)  # type: ignore[arg-type]
        return copied.eval()

    def forward(self, x: Any) -> Any:
        if self.first:
            self.held.value = x
        return x + self.held.value


def reads_the_first(model: Any) -> None:
    held = Held()
    for i, layer in enumerate(model.model.layers):
        layer.mlp.act_fn = Remembering(held, first=i == 0)


class Writing(nn.Module):
    """Writes to what the layer is given, of which the residual stream is read again."""

    def forward(self, x: Any) -> Any:
        return x.mul_(2.0)


def writes_to_its_input(model: Any) -> None:
    for layer in model.model.layers:
        layer.input_layernorm = Writing()


def tied_to_another(model: Any) -> None:
    model.model.layers[2].mlp.up_proj.weight = model.model.layers[0].mlp.up_proj.weight


CHANGES = [
    scaled, another_closure, of_their_number(Parity), reads_the_first, writes_to_its_input, tied_to_another,
]  # fmt: skip
MORE_CHANGES = [another_activation, of_their_number(Looked), of_their_number(Scaled)]
"""Seen as `scaled` and Parity are: by what a module holds, and by a use of its number."""


@functools.cache
def changed(change: Callable[[Any], None]) -> tuple[Any, Program]:
    model = llama()
    change(model)
    return model, trace(model)


@pytest.mark.parametrize(
    "change",
    [*CHANGES, *(pytest.param(change, marks=pytest.mark.slow) for change in MORE_CHANGES)],
    ids=lambda change: change.__qualname__,
)
def test_what_differs_between_layers_is_never_lost(change: Callable[[Any], None]) -> None:
    model, once = changed(change)
    assert torch.allclose(interpret.run(once, input_ids=IDS), model(IDS).logits, rtol=1e-12, atol=1e-12)


def test_the_reason_is_said() -> None:
    program = changed(next(each for each in CHANGES if each.__qualname__.startswith("of_their_number")))[1]
    found = program.layers
    assert found is not None
    assert found.traced == DEPTH
    assert "reads the layer's number (test_traced_once.py" in found.why
    assert f"traced: every layer, {DEPTH} of them (model.layers.0: its code reads" in report_of(program)


def test_layers_in_between_have_no_weights_in_the_export(monkeypatch: pytest.MonkeyPatch) -> None:
    exported: list[list[str]] = []
    real = torch.export.export

    def watched(*args: Any, **kwargs: Any) -> Any:
        found = real(*args, **kwargs)
        exported.append([name for name in found.state_dict if "up_proj" in name])
        return found

    monkeypatch.setattr(torch.export, "export", watched)
    once = trace(llama())
    assert exported == [[f"model.model.layers.{i}.mlp.up_proj.weight" for i in (0, DEPTH - 1)]]
    named = [name for name in once.weights if "up_proj" in name]
    assert named == [f"model.layers.{i}.mlp.up_proj.weight" for i in range(DEPTH)]


class Neighbour(nn.Module):
    """Reads a weight of the layer behind it, which the run before the trace did not show to be needed."""

    def __init__(self, layers: Any) -> None:
        super().__init__()
        self.layers = (layers,)

    def __deepcopy__(self, memo: dict[int, Any]) -> Neighbour:
        return Neighbour(copy.deepcopy(self.layers[0], memo))

    def forward(self, x: Any) -> Any:
        return x + self.layers[0][2].mlp.up_proj.weight[0, 0]


def test_a_weight_that_is_missed_is_put_back() -> None:
    model = llama()
    model.model.norm = nn.Sequential(model.model.norm, Neighbour(model.model.layers))
    once = trace(model)
    assert number_traced(once) == 2
    assert torch.allclose(interpret.run(once, input_ids=IDS), model(IDS).logits, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("scale", "left_out"), [(1, {"model.layers.1"}), (2, set())])
def test_a_plain_run_leaves_the_second_of_two_out_where_they_are_alike(scale: int, left_out: set[str]) -> None:
    model = llama(2)
    model.model.layers[1].self_attn.scaling *= scale
    fake = FakeTensorMode()
    assert choose_inputs(make_fake_model(model, fake), fake, {}, length=None).probe.skipped == left_out


def test_one_layer_unlike_the_others_costs_one_more() -> None:
    assert number_traced(changed(scaled)[1]) == 3


def test_a_number_tells_of_every_use() -> None:
    uses: list[Callable[[Any], Any]] = [
        lambda n: n == 3, lambda n: n % 2, lambda n: 2 * n, lambda n: [0, 1, 2, 3][n], lambda n: {3: 1}[n],
        lambda n: range(n), lambda n: f"{n}", str, bool, hash, lambda n: torch.ones(4)[n], lambda n: torch.ones(n),
        lambda n: torch.ones(2) * n, lambda n: isinstance(n, int), lambda n: n in (3,), lambda n: n.bit_length(),
    ]  # fmt: skip
    for use in uses:
        seen: list[str] = []
        assert repr(use(LayerIndex(3, seen.append))) == repr(use(3))
        assert seen


def test_handing_a_number_on_is_no_use() -> None:
    seen: list[str] = []
    number = LayerIndex(3, seen.append)
    held = [number, (number,), {"layer_idx": number}]
    assert held[0] is number
    assert number is not None
    assert not seen
