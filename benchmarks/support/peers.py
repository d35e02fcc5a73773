"""The others: one Llama-shaped model as transformers and DTensor split it, and how times are written."""

from __future__ import annotations

import importlib.util
import statistics
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from transformers import LlamaConfig, LlamaForCausalLM

ALONE, OURS, AUTO, DTENSOR = "one process", "ours", 'tp_plan="auto"', "DTensor"
TWO = {
    "hidden_size": 1024, "num_hidden_layers": 8, "num_attention_heads": 16, "num_key_value_heads": 8,
    "intermediate_size": 2752, "vocab_size": 4096,
}  # fmt: skip


def build(sizes: dict[str, int]) -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**sizes, attn_implementation="sdpa")).eval()


def dtensor(model: Any) -> Any:
    """What PyTorch's own tutorial does: q, k, v, gate and up column-wise, o and down row-wise, the head gathered."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    columns, rows = ColwiseParallel(), RowwiseParallel()
    plan: dict[str, Any] = {f"self_attn.{name}_proj": columns for name in "qkv"}
    plan |= {"self_attn.o_proj": rows, "mlp.gate_proj": columns, "mlp.up_proj": columns, "mlp.down_proj": rows}
    for layer in model.model.layers:
        parallelize_module(layer, mesh, plan)
    parallelize_module(model, mesh, {"lm_head": ColwiseParallel(output_layouts=Replicate())})
    return model


def tp_plan_auto(folder: Path) -> Any:
    if importlib.util.find_spec("accelerate") is None:
        return None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # the spelling that every supported version takes
        return LlamaForCausalLM.from_pretrained(folder, attn_implementation="sdpa", tp_plan="auto").eval()


def milliseconds(times: list[float]) -> str:
    return f"{statistics.median(times) * 1e3:.1f}"


def of_best(ours: list[float], theirs: list[float]) -> str:
    return f"{min(ours) / min(theirs):.3f}"
