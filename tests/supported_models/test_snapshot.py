"""Two snapshots are compared field by field, and a missing row is a difference."""

from tests.supported_models.snapshot import compare

ROW = {"report": "r", "graphs": ["a", "b"], "tokens": [[1, 2]]}


def test_equal_snapshots_have_no_difference() -> None:
    assert compare({"llama tp=2": ROW}, {"llama tp=2": dict(ROW)}) == ([], 1)


def test_what_differs_is_named_with_its_row() -> None:
    lines, both = compare({"llama tp=2": ROW, "gpt2 tp=2": ROW}, {"llama tp=2": ROW | {"tokens": [[1, 3]]}})
    assert lines == ["gpt2 tp=2: only in the first", "tokens differ: llama tp=2"]
    assert both == 1
