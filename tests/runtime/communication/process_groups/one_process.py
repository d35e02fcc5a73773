"""A rank that is alone, as torchrun --nproc-per-node 1 starts it."""

import torch

from partitioner.sharding.mesh import Mesh
from runtime.communication.process_groups import ProcessGroups
from runtime.ops.collectives import all_reduce

if __name__ == "__main__":
    communicator = ProcessGroups.connect(Mesh.of(), timeout_s=10)
    x = torch.ones(3)
    assert torch.equal(communicator.bind(all_reduce, "tp", node="all_reduce", options={})(x), x)
    communicator.close()
