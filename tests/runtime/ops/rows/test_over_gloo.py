"""Attention over tokens that processes share out: over gloo, and what torch.compile makes of it."""

import pytest

from runtime.processes.launch import launch


@pytest.mark.slow
@pytest.mark.processes
@pytest.mark.parametrize("how", ["off", "on", "compiled"])
def test_three_processes(how: str, monkeypatch: pytest.MonkeyPatch, pytestconfig: pytest.Config) -> None:
    monkeypatch.setenv("PYTHONPATH", str(pytestconfig.rootpath))
    launch(["tests.runtime.ops.rows.gloo_ranks", how], num_ranks=3, timeout_s=120)
