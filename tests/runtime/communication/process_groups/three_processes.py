"""What each of three processes checks; a failing assert ends the launch. Started by test_process_groups.py.

Its arguments are the device, and whether to share memory ("on", "off", "auto").
"""

import sys
import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from partitioner.compile.parts import Parts
from partitioner.errors import RankMismatch
from partitioner.sharding.mesh import Mesh
from runtime.communication.process_groups import ProcessGroups
from runtime.engine import Engine
from runtime.ops.collectives import all_gather, all_reduce
from runtime.processes.launch import begin_worker
from tests.support import handmade
from tests.support.processes.few_gpus import device_of_rank


def collectives(groups: ProcessGroups) -> None:
    rank = groups.rank

    def bound(op: Callable[..., Tensor], overwrite: bool = False, **options: object) -> Callable[[Tensor], Tensor]:
        return groups.bind(op, "tp", node="n", options=options, overwrite=overwrite)

    for checked in (False, True):
        groups.begin_run(new_shapes=checked)
        x = torch.full((2, 3), float(rank))
        assert bound(all_reduce)(x).tolist() == [[3.0] * 3] * 2
        assert x.tolist() == [[rank] * 3] * 2, "the input has other readers"
        assert bound(all_reduce)(x.t()).shape == (3, 2)
        assert bound(all_reduce, overwrite=True)(x) is x
        assert bound(all_reduce)(torch.tensor(1.0)).item() == 3
        for dim in (0, 1, -1):
            even = bound(all_gather, dim=dim)(torch.full((2, 2, 2), float(rank)))
            assert torch.equal(even, torch.cat([torch.full((2, 2, 2), float(i)) for i in range(3)], dim))
            sizes = [2, 0, 3]
            whole = torch.arange(5.0 * 4).reshape(5, 4)
            whole = whole if dim == 0 else whole.t().contiguous()
            piece = whole.split(sizes, dim)[rank]
            assert torch.equal(bound(all_gather, dim=dim, sizes=sizes)(piece), whole)
        assert bound(all_gather, dim=0, sizes=[1, 1, 1])(torch.tensor([rank])).tolist() == [0, 1, 2]
    assert groups.bind(all_reduce, "sp", node="alone", options={})(x) is x


def disagreements(groups: ProcessGroups) -> None:
    odd = groups.rank == 1
    groups.begin_run(new_shapes=True)
    cases = {
        "operation": (all_gather if odd else all_reduce, {"dim": 0} if odd else {}, torch.ones(2)),
        "shape": (all_reduce, {}, torch.ones(3 if odd else 2)),
        "dtype": (all_reduce, {}, torch.ones(2, dtype=torch.float64 if odd else torch.float32)),
    }
    for case, (op, options, x) in cases.items():
        with pytest.raises(RankMismatch) as caught:
            groups.bind(op, "tp", node=f"{case}_{groups.rank}", options=options)(x)
        assert f"rank 0: node '{case}_0'" in str(caught.value)
        assert f"rank 1: node '{case}_1'" in str(caught.value)


def whole_model(engine: Engine, parts: Parts[None]) -> None:
    for length in (1, 3, 3):
        ids = handmade.input_ids(length=length)
        with torch.device("cpu"):
            expected = parts.simulate(input_ids=ids.cpu())
        torch.testing.assert_close(engine(input_ids=ids).cpu(), expected, rtol=1e-12, atol=1e-12)


if __name__ == "__main__":
    warnings.simplefilter("error")
    begin_worker()
    device, sharing = sys.argv[1:]
    device = device_of_rank(device)
    parts = Parts(handmade.partitioned(3), None)
    assert parts.mesh == Mesh.of(tp=3)
    with (
        Engine.connect(parts, device=device, timeout_s=60, shared_memory=sharing) as engine,
        torch.device(engine.device),
    ):
        collectives(engine.communicator)
        disagreements(engine.communicator)
        whole_model(engine, parts)
        engine.communicator.barrier()
