"""The sizes for which a trace holds are read off its guards."""

import sympy
from torch.utils._sympy.functions import FloorDiv, Mod

from partitioner.capture import capture
from partitioner.capture.trace.shape_limits import interval
from partitioner.sharding.mesh import Mesh
from tests.support import zoo
from tests.supported_models.capture_survey import difference

s, b = sympy.symbols("s b", integer=True, positive=True)
CHUNKS = FloorDiv(s + Mod(64 - Mod(s, 64), 64), 64)


def test_one_chunk_ends_where_the_second_begins() -> None:
    assert interval([sympy.Eq(CHUNKS, 1)], s, 37, {b: 3}) == (1, 64)
    assert interval([sympy.Eq(CHUNKS, 3)], s, 150, {}) == (129, 192)
    assert interval([sympy.Eq(s, 37)], s, 37, {}) == (37, 37)


def test_thresholds() -> None:
    assert interval([s >= 9], s, 37, {}) == (9, None)
    assert interval([s <= 30000, s * b >= 2], s, 37, {b: 3}) == (1, 30000)


def test_what_holds_everywhere_but_at_single_sizes_is_no_limit() -> None:
    assert interval([sympy.Ne(s, 7), Mod(s, 8) > 0, s > 1], s, 37, {}) == (1, None)


def test_a_table_of_positions_limits_the_length() -> None:
    model, ids = zoo.tiny("mpt")  # its ALiBi slopes are made for 256 positions
    program = capture(model, mesh=Mesh.of())
    assert difference(model, program, ids, lifted=True) < 1e-10
    assert program.notes == ["sequence from 1 to 256"]
