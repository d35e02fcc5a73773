"""One of the two processes of test_measured.py: stages that take as long as they are told; what fails ends all."""

import functools
import os
import time
from collections.abc import Callable
from typing import Any

import torch

from partitioner import Plan, partition
from runtime.engine import Engine
from runtime.pipeline.measured import measured
from runtime.pipeline.run_schedule import StagedExecutable
from runtime.pipeline.schedule import bubble, chain
from runtime.pipeline.timing import time_of
from runtime.processes.launch import begin_worker
from tests.runtime.execution import valid_trace

SECONDS = 0.03
PIECES = 4


def after(seconds: float, function: Callable[..., Any], *values: Any) -> Any:
    time.sleep(seconds)
    return function(*values)


if __name__ == "__main__":
    begin_worker()
    torch.set_num_threads(1)
    parts = partition(valid_trace.model(), Plan(pp=2))
    ids = torch.arange(4 * PIECES).view(PIECES, 4) % 60
    for times in (1.0, 1.0), (1.0, 2.0), (2.0, 1.0):
        with Engine.connect(parts, timeout_s=60) as engine:
            assert isinstance(engine._run, StagedExecutable)
            runs = engine._run.executable
            engine(input_ids=ids)
            runs.function = functools.partial(after, SECONDS * times[int(os.environ["RANK"])], runs.function)  # type: ignore[assignment]
            with engine.profile(by_node=False) as found:
                engine(input_ids=ids)
        timing = measured(found.ranks)
        assert [len(of_stage) for of_stage in timing.seconds] == [PIECES, PIECES]
        computed = time_of(chain(2, PIECES), timing.seconds).bubble
        assert abs(timing.bubble - computed) < 0.1 * computed, (timing.bubble, computed)
        assert (timing.bubble > 1.2 * bubble(2, PIECES)) == (times[0] != times[1]), timing.bubble
