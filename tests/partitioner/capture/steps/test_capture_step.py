"""The trace of a step: what the model keeps becomes states, and attention over its cache as it stands is plain."""

import pytest
import torch
from torch import fx, nn

import partitioner.capture.steps.capture_step as capturing
from partitioner.capture import capture_piece, capture_step, states_found_once
from partitioner.capture.steps.kept_elsewhere import Attributes
from partitioner.errors import CaptureError
from partitioner.program.program import Program
from partitioner.sharding.mesh import Mesh
from runtime.ops.attention import attention
from runtime.ops.state import cache_append, position_mask, rows_at, selective_scan, state_read, state_write
from tests.support import stepping, zoo


def nodes(program: Program, target: object) -> list[fx.Node]:
    return [node for node in program.graph.nodes if node.target is target]


def test_attention_written_out_appends_and_masks_by_position() -> None:
    program = stepping.traced("bloom")[1]
    assert [given.name for given in program.inputs] == ["input_ids", "slots", "position_ids"]
    assert len(nodes(program, cache_append)) == 2 * 2
    assert nodes(program, position_mask)
    assert set(program.states) == {"cache.0.key", "cache.0.value", "cache.1.key", "cache.1.value"}
    assert all(state.per_token and state.shape == (4, 16) for state in program.states.values())


def test_attention_as_one_op_stays_what_it_is() -> None:
    program = capture_step(zoo.tiny("llama")[0], mesh=Mesh.of())
    assert not nodes(program, cache_append)
    assert all(node.kwargs["causal"] for node in nodes(program, attention))
    assert not program.states  # the kv-cache pass makes them
    assert "slots" not in [given.name for given in program.inputs]


def test_a_mask_kept_as_a_table_is_cut_by_position() -> None:
    program = stepping.traced("gpt_neo")[1]
    cuts = nodes(program, rows_at)
    assert len(cuts) == 2
    batch, sequence = program.symbols["batch"], program.symbols["sequence"]
    assert all(node.meta["val"].shape == (batch, 1, sequence, 256) for node in cuts)
    assert program.limits["slots"] == (1, 256)  # no more than the table has


def test_windows_are_kept() -> None:
    program = capture_step(zoo.tiny("mistral", sliding_window=8)[0], mesh=Mesh.of())
    assert all(node.kwargs["window"] == 8 for node in nodes(program, attention))


def test_states_are_read_and_written_once_and_take_one_token() -> None:
    program = stepping.traced("lfm2_moe")[1]
    remembered = {state.name for state in program.states.values() if not state.per_token}
    assert remembered
    for target in (state_read, state_write):
        assert sorted(str(node.kwargs["state"]) for node in nodes(program, target)) == sorted(remembered)
    assert program.limits["sequence"] == (1, 1)
    assert "active" in [given.name for given in program.inputs]


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("openai-gpt", "takes no transformers Cache: its forward takes"),
        ("deepseek_v4", "in a cache of its own kind"),
        ("roberta", "counts positions by a rule of its own"),
    ],
)
def test_what_is_kept_elsewhere_is_refused(name: str, why: str) -> None:
    with pytest.raises(CaptureError, match=why):
        capture_step(zoo.tiny(name)[0], mesh=Mesh.of())


@pytest.mark.parametrize(
    ("name", "states"),
    [
        pytest.param(
            "recurrent_gemma", "model.layers.0.temporal_block.rg_lru.recurrent_states", marks=pytest.mark.slow
        ),
        pytest.param("rwkv", "state.4.1", marks=pytest.mark.slow),  # one tensor holds that of every layer
        ("xlstm", "cache_params.rnn_state.1.0"),
    ],
)
def test_states_in_modules_and_in_objects_of_the_models_own_are_found(name: str, states: str) -> None:
    program = stepping.traced(name)[1]
    assert states in program.states
    assert not any(state.per_token for state in program.states.values())
    begins = nodes(program, torch.ops.aten.masked_fill.Scalar)
    assert {round(node.args[2] / 1e30) for node in begins} == ({-1} if name == "rwkv" else set())


def test_a_state_of_one_layer_is_one_whose_heads_are_written_one_by_one() -> None:
    """By the code for single tokens; that for several stacks them. Else the two would remember different things."""
    model = zoo.tiny("zamba", num_hidden_layers=1, layer_types=["linear_attention"])[0]
    step, piece = (make(model, mesh=Mesh.of()) for make in (capture_step, capture_piece))
    assert nodes(step, torch.ops.aten.select_scatter.default)
    assert step.states == piece.states


def test_a_model_whose_first_run_changes_its_weights_is_refused() -> None:
    model, ids = zoo.tiny("rwkv", num_hidden_layers=7)
    with pytest.raises(CaptureError, match="its first run changes its own weights"):
        capture_step(model, mesh=Mesh.of())
    model(ids)
    attributes = Attributes(model)
    assert not attributes.new()


def test_what_modules_are_given_during_a_run_is_told_from_what_they_had() -> None:
    model = nn.Linear(2, 2)
    model.left, model.held = torch.ones(3, 2), torch.ones(2)
    attributes = Attributes(model)
    with attributes.watched():
        model.left = torch.full((3, 2), 7.0)
        model.left = torch.randn(3, 2)
    ((key, (value, initial)),) = attributes.new().items()
    assert (key, initial) == (("", "left"), 7.0)
    assert value is model.left
    assert attributes.forget()
    assert model.left is None
    assert not attributes.forget()


def test_the_model_is_not_changed() -> None:
    model = zoo.tiny("bloom")[0]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    use_cache = model.config.use_cache
    capture_step(model, mesh=Mesh.of())
    assert model.config.use_cache == use_cache
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_several_tokens_behind_a_state_are_one_recurrence() -> None:
    """Whose first state is what is remembered, also where the model's own function always begins at nothing."""
    model = zoo.tiny("mamba")[0]
    program = capture_piece(model, mesh=Mesh.of())
    assert "sequence" in program.symbols
    assert "sequence" not in program.limits
    scans = nodes(program, selective_scan)
    assert len(scans) == 2
    for number, scan in enumerate(scans):
        before = scan.args[-1]
        assert isinstance(before, fx.Node)
        assert before.target is state_read
        assert before.kwargs["state"] == f"cache.{number}.recurrent.0"


def test_what_a_model_remembers_is_found_once_for_steps_and_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    models = [zoo.tiny("lfm2", num_hidden_layers=1, layer_types=["conv"])[0] for _ in range(2)]
    asked: list[str] = []
    real = capturing.find_states
    monkeypatch.setattr(capturing, "find_states", lambda *a, **k: (asked.append("states"), real(*a, **k))[1])

    def both() -> list[str]:
        made = capture_step(models[0], mesh=Mesh.of()), capture_piece(models[0], mesh=Mesh.of())
        return [f"{program.graph} {program.states} {program.notes} {program.limits}" for program in made]

    apart = both()
    assert len(asked) == 2
    with states_found_once():
        assert both() == apart
        assert len(asked) == 3
        capture_step(models[1], mesh=Mesh.of())
        assert len(asked) == 4  # of another model, if like the first
