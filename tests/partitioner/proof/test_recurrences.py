"""Several tokens at once against single steps: what is proven, and what is refused with its reason."""

import pytest
import torch
from torch import fx

from partitioner.capture import capture_piece
from partitioner.compile.tracing.canonicalize import canonicalize
from partitioner.program.program import Program
from partitioner.proof import recurrences
from partitioner.proof.recurrences import why_pieces_differ
from partitioner.proof.regions import regions_of
from partitioner.sharding.mesh import Mesh
from runtime.ops.state import gated_linear_attention, selective_scan, state_read, state_write
from tests.support import stepping

aten = torch.ops.aten
NAME = "mamba"


@pytest.fixture(scope="module")
def step() -> Program:
    return stepping.traced(NAME)[1]


@pytest.fixture(scope="module")
def traced() -> Program:
    found = capture_piece(stepping.traced(NAME)[0], mesh=Mesh.of())
    canonicalize(found)
    return found


@pytest.fixture
def piece(traced: Program) -> Program:
    return traced.copy()


def first(program: Program, target: object) -> fx.Node:
    return next(node for node in program.graph.nodes if node.target is target)


def test_a_recurrence_behind_what_is_remembered_is_proven(piece: Program, step: Program) -> None:
    assert why_pieces_differ(piece, step) is None


def test_each_layer_is_a_region_from_one_value_to_another(piece: Program) -> None:
    regions = regions_of(piece)
    assert not isinstance(regions, str)
    assert list(regions) == [(f"cache.{i}.conv.0", f"cache.{i}.recurrent.0") for i in range(2)]
    one, other = regions.values()
    assert one.text == other.text
    assert one.weights != other.weights


def test_one_that_begins_at_nothing_is_refused(piece: Program, step: Program) -> None:
    """As a model's own function does, which only knows whole texts."""
    scan = first(piece, selective_scan)
    scan.args = (*scan.args[:-1], None)
    reason = why_pieces_differ(piece, step)
    assert reason is not None
    assert "tokens at once than for single ones" in reason


def test_a_state_that_is_left_wrong_is_refused(piece: Program, step: Program) -> None:
    """All results of the first piece are right; the next one starts from something else."""
    write = [node for node in piece.graph.nodes if node.target is state_write][-1]
    source = write.args[0]
    assert isinstance(source, fx.Node)
    with piece.graph.inserting_before(write):
        wrong = piece.graph.call_function(aten.mul.Tensor, (source, 0.999))
    wrong.meta = dict(source.meta)
    write.args = (wrong, write.args[1])
    reason = why_pieces_differ(piece, step)
    assert reason is not None
    assert "the state 'cache." in reason or "its result is another" in reason


def test_tokens_that_meet_outside_a_region_are_refused(piece: Program, step: Program) -> None:
    (logits,) = piece.graph.output_node().all_input_nodes
    with piece.graph.inserting_after(logits):
        summed = piece.graph.call_function(aten.cumsum.default, (logits, 1))
    summed.meta = {"val": logits.meta["val"]}
    piece.graph.output_node().args = (summed,)
    reason = why_pieces_differ(piece, step)
    assert reason is not None
    assert "cumsum" in reason


def test_states_outside_of_layers_are_not_told_apart(piece: Program, step: Program) -> None:
    read = first(piece, state_read)
    read.meta["path"] = ""
    reason = why_pieces_differ(piece, step)
    assert reason == "the model: its states are kept outside of any layer"


def test_other_states_are_refused(piece: Program, step: Program) -> None:
    for node in piece.graph.nodes:
        if node.kwargs.get("state") == "cache.1.conv.0":
            node.kwargs = {**node.kwargs, "state": "cache.1.other.0"}
    assert gated_linear_attention not in {node.target for node in piece.graph.nodes}
    reason = why_pieces_differ(piece, step)
    assert reason == "its code for several tokens remembers other things than its code for one"


def twofold(program: Program, factor: float) -> Program:
    """The first layer hands on a second value, so many times the first; both are added to what goes around it."""
    program = program.copy()
    regions = regions_of(program)
    assert not isinstance(regions, str)
    (y,) = next(iter(regions.values())).outputs
    (user,) = y.users
    with program.graph.inserting_after(y):
        second = program.graph.call_function(aten.mul.Tensor, (y, factor))
    second.meta = dict(y.meta)
    with program.graph.inserting_after(user):
        both = program.graph.call_function(aten.add.Tensor, (user, second))
    both.meta = dict(user.meta)
    user.replace_all_uses_with(both, delete_user_cb=lambda other: other is not both)
    return program


def test_each_value_that_a_layer_hands_on_is_compared(piece: Program, step: Program) -> None:
    assert why_pieces_differ(twofold(piece, 2.0), twofold(step, 2.0)) is None
    reason = why_pieces_differ(twofold(piece, 2.001), twofold(step, 2.0))
    assert reason is not None
    assert reason.startswith("backbone.layers.0.mixer: its result is another for 1 and")
    reason = why_pieces_differ(twofold(piece, 2.0), step)
    assert reason is not None
    assert reason.endswith("its code for several tokens hands on other values than its code for one")


@pytest.mark.parametrize("padding", [0, 3])
@pytest.mark.parametrize(
    ("channels", "groups", "stride", "bias"), [(6, 6, 1, True), (6, 6, 1, False), (6, 3, 1, True), (6, 6, 2, True)]
)
def test_a_convolution_is_tried_as_torch_does_it(
    channels: int, groups: int, stride: int, padding: int, bias: bool
) -> None:
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    x, weight = random(2, channels, 9), random(channels, channels // groups, 4)
    given = (x, weight, random(channels) if bias else None, [stride], [padding], [1], groups)
    faster = recurrences._FASTER[aten.conv1d.default]
    wanted = aten.conv1d.default(*given)
    torch.testing.assert_close(faster(*given), wanted, rtol=1e-12, atol=1e-12)
    other = faster(x, weight.flip(2), *given[2:])
    assert (other - wanted).abs().max() > 0.1
