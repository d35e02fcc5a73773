"""Pipeline stages in processes of their own, over gloo."""

from __future__ import annotations

import pytest

from runtime.processes.launch import launch


@pytest.mark.processes
@pytest.mark.parametrize(
    ("plan", "num_ranks"),
    [
        ("pp=2", 2),
        pytest.param("pp=3", 3, marks=pytest.mark.slow),
        pytest.param("tp=2,pp=2", 4, marks=pytest.mark.slow),
    ],
)
def test_stages_over_gloo(
    plan: str, num_ranks: int, monkeypatch: pytest.MonkeyPatch, pytestconfig: pytest.Config
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(pytestconfig.rootpath))
    launch(["tests.equivalence.staged_rank", plan, "llama"], num_ranks=num_ranks, timeout_s=600)
