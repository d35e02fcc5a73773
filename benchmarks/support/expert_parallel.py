"""Transformers' own expert parallelism around given weights, as the installed version has it.

newer     AllToAllEP and AllReduceEP of `transformers.distributed.expert_parallel`
older     the style `ep_router`, which masks the choices that are of other ranks, grouped products, and an all-reduce
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from transformers import Qwen3MoeConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

__all__ = ["theirs"]

_NEWER, _OLDER = "transformers.distributed.expert_parallel", "transformers.distributed.tensor_parallel"


def theirs(
    weights: tuple[Tensor, Tensor], device: torch.device, ranks: int, *, num_experts: int, choices: int
) -> tuple[dict[str, Callable[..., Tensor]], str]:
    """By name, functions of hidden [T, H], index and gates [T, K]; or why there are none. weights: of this rank's
    experts, [E, 2 F, H] and [E, H, F].
    """
    if num_experts % ranks:
        return {}, f"{num_experts} experts on {ranks} ranks: theirs are for as many on each"
    own_up, own_down = weights
    try:
        config = Qwen3MoeConfig(
            num_experts=own_up.shape[0], num_experts_per_tok=choices, hidden_size=own_up.shape[2],
            moe_intermediate_size=own_down.shape[2],
        )  # fmt: skip
        config._experts_implementation = "grouped_mm"
        group = init_device_mesh(device.type, (ranks,))

        def module() -> Any:
            with torch.device("meta"):
                made = Qwen3MoeExperts(config)
            made.gate_up_proj = torch.nn.Parameter(own_up, requires_grad=False)
            made.down_proj = torch.nn.Parameter(own_down, requires_grad=False)
            return made

        if importlib.util.find_spec(_NEWER) is None:
            older = _older(module(), group, num_experts)
            index = torch.zeros(1, choices, dtype=torch.int64, device=device)
            older(own_up.new_zeros(1, own_up.shape[2]), index, own_up.new_zeros(1, choices))  # does it run?
            return {"all_reduce": older}, ""
        newer = importlib.import_module(_NEWER)
        one = init_device_mesh(device.type, (ranks, 1), mesh_dim_names=("a", "b"))["b"]
        return {
            "all_to_all": newer.AllToAllEP(module(), group, one),
            "all_reduce": newer.AllReduceEP(module(), group, group),
        }, ""
    except Exception as error:  # a version without them, or sizes that they refuse: the same on all ranks
        return {}, f"{type(error).__name__}: {error}"


def _older(module: Any, mesh: Any, num_experts: int) -> Callable[..., Tensor]:
    router = importlib.import_module(_OLDER).EpRouterParallel()
    told, group = SimpleNamespace(num_experts=num_experts), mesh.get_group()

    def run(hidden: Tensor, index: Tensor, gates: Tensor) -> Tensor:
        _, kept, local = router.transform_output_post_forward(told, (None, gates, index), mesh)
        out: Tensor = module(hidden, local, kept)
        dist.all_reduce(out, group=group)
        return out

    return run
