"""Capture as a whole: the graph computes what the model computes, and the model stays as it was."""

import copy
import dataclasses
import functools

import pytest
import sympy
import torch
from torch import fx
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedModel, T5Config, T5ForConditionalGeneration
from transformers.integrations.moe import ExpertsInterface
from transformers.masking_utils import AttentionMaskInterface
from transformers.modeling_utils import AttentionInterface

from partitioner.capture import capture
from partitioner.errors import CaptureError
from partitioner.program.program import Program, Value
from partitioner.sharding.mesh import Mesh
from runtime.ops.attention import attention
from runtime.ops.experts import expert_combine, expert_dispatch, grouped_linear
from runtime.ops.state import selective_scan
from tests.support import zoo
from tests.support.interpret import run
from tests.supported_models.capture_survey import TOLERANCE, difference

ONE = Mesh.of()
WIDE = ["llama", "gpt2", "mixtral", "gpt_oss", "deepseek_v3", "llama4_text", "bloom"]


@functools.cache
def _captured(name: str) -> tuple[PreTrainedModel, torch.Tensor, Program]:
    model, ids = zoo.tiny(name)
    return model, ids, capture(model, mesh=ONE)


def captured(name: str) -> tuple[PreTrainedModel, torch.Tensor, Program]:
    """Captured once per name; the program is the caller's own to change."""
    model, ids, program = _captured(name)
    graph = fx.Graph()
    graph.output(graph.graph_copy(program.graph, {}))
    mine = dataclasses.replace(program, graph=graph)
    copies = dict(zip(program.graph.nodes, graph.nodes, strict=True))
    for node, fake_model in copies.items():
        fake_model.meta = dict(node.meta)
    return model, ids, mine


def count(program: Program, target: object) -> int:
    return sum(node.target is target for node in program.graph.nodes)


# test_tensor_parallel.py compares what these compute, too; experts are as those of deepseek_v3 and llama4_text
SLOW = ("gpt2", "mixtral", "gpt_oss", "bloom", "masked:roberta")


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name
        for name in (*WIDE, "masked:bert", "masked:roberta", "masked:modernbert")
    ],
)
def test_graph_equals_model(name: str) -> None:
    model, ids, program = captured(name)
    for length in (1, 5, 40):
        assert difference(model, program, ids[:, :length], lifted=True) < TOLERANCE
    assert difference(model, program, ids, exact=False) < 1e-5


def test_a_wrong_graph_is_noticed() -> None:
    model, ids, program = captured("llama")
    for node in program.graph.nodes:
        if node.target is attention:
            node.kwargs = {**node.kwargs, "causal": False}
    assert difference(model, program, ids, lifted=True) > 1e-6


def test_a_wrong_weight_is_noticed() -> None:
    model, ids, program = captured("llama")
    name = "model.layers.1.self_attn.k_proj.weight"
    program.weight_data = {**program.weight_data, name: program.weight_data[name] * 1.001}
    assert difference(model, program, ids, lifted=True) > 1e-6


def test_a_layer_is_one_attention_without_a_mask_operand() -> None:
    _, _, program = captured("mistral")
    nodes = [node for node in program.graph.nodes if node.target is attention]
    assert len(nodes) == zoo.LAYERS
    for node in nodes:
        assert len(node.args) == 3
        assert node.kwargs == {"scale": zoo.HEAD_DIM**-0.5, "causal": True, "window": zoo.WINDOW}


def test_chunks_windows_sinks_and_caps_are_on_the_node() -> None:
    def keywords(name: str) -> list[dict[str, object]]:
        return [node.kwargs for node in captured(name)[2].graph.nodes if node.target is attention]

    assert any(found.get("chunk") == zoo.WINDOW for found in keywords("llama4_text"))
    assert {found.get("window") for found in keywords("gemma2")} == {zoo.WINDOW, None}
    assert all("softcap" in found for found in keywords("gemma2"))


def test_experts_are_four_nodes_and_the_models_own_gate() -> None:
    _, _, program = captured("mixtral")
    found = [count(program, op) for op in (expert_dispatch, grouped_linear, expert_combine)]
    assert found == [zoo.LAYERS, 2 * zoo.LAYERS, zoo.LAYERS]


def test_batch_and_sequence_are_symbols() -> None:
    _, _, program = captured("llama")
    batch, sequence = program.symbols["batch"], program.symbols["sequence"]
    output = list(program.graph.nodes)[-1]
    assert output.meta["val"] == Value((batch, sequence, zoo.VOCABULARY), torch.float64)
    assert [i.value for i in program.inputs] == [Value((batch, sequence), torch.int64)] * 2
    assert all(isinstance(node.meta["val"], (Value, tuple, sympy.Expr, int)) for node in program.graph.nodes)
    assert {node.meta.get("path") for node in program.graph.nodes} >= {"model.layers.0.self_attn", "model.norm"}
    assert program.notes == []


@pytest.mark.parametrize("name", [pytest.param("gpt2", marks=pytest.mark.slow), "deepseek_v32", "bloom"])
def test_the_graph_is_functional_and_has_no_leftovers(name: str) -> None:
    _, _, program = captured(name)
    for node in program.graph.nodes:
        assert node.op in ("placeholder", "get_attr", "call_function", "output")
        assert set(node.meta) <= {"val", "path", "source"}
        assert "device" not in node.kwargs
        if isinstance(node.target, torch._ops.OpOverload):
            assert not node.target._schema.is_mutable
            assert node.target.namespace == "aten"
            assert "assert" not in str(node.target)


def test_every_path_is_a_module_of_the_model() -> None:
    model, _, program = captured("llama")
    modules = dict(model.named_modules())
    paths = {node.meta.get("path", "") for node in program.graph.nodes}
    assert "model.layers.0.mlp" in paths
    assert paths <= modules.keys()


def test_the_model_and_transformers_stay_as_they_were() -> None:
    model, _ = zoo.tiny("mixtral")
    model.train()
    before = copy.deepcopy(model.config.to_dict()), model.config._attn_implementation, model.config.use_cache
    weights = {name: (value, value._version) for name, value in model.state_dict(keep_vars=True).items()}
    interfaces = (AttentionInterface, AttentionMaskInterface, ExpertsInterface)
    registered = [dict(interface._global_mapping) for interface in interfaces]
    capture(model, mesh=ONE)
    assert (model.config.to_dict(), model.config._attn_implementation, model.config.use_cache) == before
    assert model.training
    assert [dict(interface._global_mapping) for interface in interfaces] == registered
    for name, value in model.state_dict(keep_vars=True).items():
        assert value is weights[name][0]
        assert value._version == weights[name][1]


def test_a_failed_capture_leaves_transformers_as_it_was() -> None:
    interfaces = (AttentionInterface, AttentionMaskInterface, ExpertsInterface)
    registered = [dict(interface._global_mapping) for interface in interfaces]
    config = GPT2Config(vocab_size=64, n_embd=16, n_layer=1, n_head=2)
    model = GPT2LMHeadModel(config)
    model.transformer.forward = lambda *args, **kwargs: 1 / 0
    with pytest.raises(CaptureError, match=r"GPT2LMHeadModel, at transformer .*failed with ZeroDivisionError") as error:
        capture(model, mesh=ONE)
    assert "the error is not about lengths" in str(error.value)
    assert [dict(interface._global_mapping) for interface in interfaces] == registered


def test_encoder_decoders_are_refused_by_name() -> None:
    config = T5Config(vocab_size=64, d_model=16, d_kv=4, d_ff=16, num_layers=1, num_heads=2)
    with pytest.raises(CaptureError, match=r"T5ForConditionalGeneration: it is an encoder-decoder"):
        capture(T5ForConditionalGeneration(config), mesh=ONE)


@pytest.mark.slow
def test_a_model_that_counts_tokens_in_python_needs_a_length() -> None:
    model, ids = zoo.tiny("rwkv")
    with pytest.raises(CaptureError, match=r"RwkvForCausalLM: .*specialized.*\n.*length=N"):
        capture(model, mesh=ONE)
    program = capture(model, mesh=ONE, fixed_length=6)
    assert program.notes == ["static length 6"]
    assert set(program.symbols) == {"batch"}
    assert difference(model, program, ids[:, :6], lifted=True) < TOLERANCE
    assert difference(model, program, ids[:1, :6], lifted=True) < TOLERANCE


def test_a_scan_over_tokens_is_one_op_for_any_number_of_them() -> None:
    model, ids, program = captured("mamba")
    assert "sequence" not in program.limits
    assert sum(node.target is selective_scan for node in program.graph.nodes) == 2
    for length in (1, 2, ids.shape[1]):
        assert difference(model, program, ids[:, :length], lifted=True) < TOLERANCE


@pytest.mark.parametrize(
    "name", ["llama", *(pytest.param(name, marks=pytest.mark.slow) for name in ("gpt2", "masked:bert"))]
)
def test_a_model_on_meta_gives_the_same_graph_and_computed_values(name: str) -> None:
    model, ids, program = captured(name)
    with torch.device("meta"):
        empty = type(model)(model.config).to(model.dtype).eval()
    other = capture(empty, mesh=ONE)
    assert str(other.graph) == str(program.graph)
    assert other.weights == program.weights
    for name, weight in other.weights.items():
        assert other.weight_data[name].is_meta == (weight.source == "checkpoint")
    filled = {
        name: value if not value.is_meta else program.weight_data[name] for name, value in other.weight_data.items()
    }
    other.weight_data = filled
    assert torch.equal(run(other, input_ids=ids), run(program, input_ids=ids))


def test_tied_weights_have_the_name_that_checkpoints_hold() -> None:
    model, _, program = captured("gpt2")
    assert program.weights["transformer.wte.weight"].aliases == ("lm_head.weight",)
    assert "lm_head.weight" not in program.weights
    assert set(program.weights) <= set(model.state_dict())


def test_positions_are_an_input_unless_the_model_counts_otherwise() -> None:
    defaults = {name: {i.name: i.default for i in captured(name)[2].inputs} for name in ("llama", "masked:roberta")}
    assert defaults["llama"] == {"input_ids": "required", "position_ids": "arange"}
    assert "position_ids" not in defaults["masked:roberta"]
    assert defaults["masked:roberta"]["attention_mask"] == "ones"


def test_positions_are_used() -> None:
    _, ids, program = captured("gpt2")
    shifted = torch.arange(40).expand(2, 40) + 3
    assert not torch.allclose(run(program, input_ids=ids), run(program, input_ids=ids, position_ids=shifted))


def test_an_error_says_where() -> None:
    model, _ = zoo.tiny("dbrx")  # its experts are a Python loop over those that were hit
    with pytest.raises(
        CaptureError, match=r"at transformer\.blocks\.0\.ffn\.experts \(modeling_dbrx\.py:\d+\)"
    ) as error:
        capture(model, mesh=ONE)
    assert "no length helps" in str(error.value)
