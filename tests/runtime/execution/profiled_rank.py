"""One of the processes of test_profile.py; a failing assert ends the launch.

Its arguments are a folder for the traces, the device, and whether to share memory, once or several times. With one GPU
both ranks use it: NCCL refuses that on one host, so each rank claims to be a host of its own.
"""

import sys
import time
from pathlib import Path

import torch

from partitioner import Plan, partition
from runtime.engine import Engine
from runtime.processes.launch import begin_worker
from tests.runtime.execution import valid_trace
from tests.support.processes.few_gpus import device_of_rank

SLOW_S = 0.3

if __name__ == "__main__":
    begin_worker()
    folder, device, *sharings = sys.argv[1:]
    device = device_of_rank(device)
    parts = partition(valid_trace.model(), Plan(tp=2))
    ids = torch.randint(3, 500, (2, 64), generator=torch.Generator().manual_seed(0))
    for sharing in sharings:
        with Engine.connect(parts, shared_memory=sharing, device=device, timeout_s=120) as engine:
            ids = ids.to(engine.device)
            plain = engine(input_ids=ids)
            for _ in range(2):
                with engine.profile() as found:
                    result = engine(input_ids=ids)
            assert torch.equal(result, plain)
            valid_trace.validate(found, num_ranks=2)
            for row in found.totals():
                # a GPU idles while the host records, and a busy machine may take the processor away while it does
                assert row.told + row.recording / row.steps > 0.9, row
                assert row.told <= 1, row
            found.save(Path(folder, f"{sharing}-{engine.program.rank}.json"))
            with engine.profile() as found:
                if engine.program.rank == 1:
                    time.sleep(SLOW_S)  # comes late to the run, so that the other waits at its first collective
                engine(input_ids=ids)
            fast, late = found.totals()
            assert fast.waiting > 0.8 * SLOW_S, found
            assert fast.communication < 0.5 * SLOW_S, found
            assert late.waiting < 0.5 * SLOW_S, found
            with engine.profile() as found:
                engine.generate([[5, 9, 3], [7]], max_new_tokens=4)
            valid_trace.validate(found, num_ranks=2)
            assert [len(one.calls) for one in found.ranks] == [4, 4]
