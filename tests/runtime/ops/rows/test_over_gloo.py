"""Attention over tokens that processes share out: over gloo, and what torch.compile makes of it."""

import pytest

from runtime.processes.launch import launch


@pytest.mark.processes
@pytest.mark.parametrize("sharing", ["off", pytest.param("on", marks=pytest.mark.slow)])
def test_three_processes(sharing: str, monkeypatch: pytest.MonkeyPatch, pytestconfig: pytest.Config) -> None:
    monkeypatch.setenv("PYTHONPATH", str(pytestconfig.rootpath))
    launch(["tests.runtime.ops.rows.gloo_ranks", sharing], num_ranks=3, timeout_s=120)
