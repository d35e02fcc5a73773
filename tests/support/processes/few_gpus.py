"""Ranks over NCCL on a machine with fewer GPUs than ranks: all share the first one.

NCCL refuses that on one host, so each rank claims to be a host of its own and talks through sockets. That proves
results, and says nothing about speed.
"""

import os

import torch

__all__ = ["device_of_rank"]


def device_of_rank(device: str) -> str:
    """Of "cuda" what an engine or communicator of this rank is to be given; others as they are. Before NCCL starts."""
    if device != "cuda":
        return device
    if torch.cuda.device_count() >= int(os.environ["WORLD_SIZE"]):
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))  # also for what is not of the plan
        return device
    os.environ |= {"NCCL_HOSTID": os.environ["RANK"], "NCCL_NET": "Socket", "NCCL_SOCKET_IFNAME": "lo"}
    os.environ |= {"NCCL_P2P_DISABLE": "1", "NCCL_SHM_DISABLE": "1"}
    return "cuda:0"
