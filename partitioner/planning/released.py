"""The bytes of a model's weights as they are released, by the quantization_config of its configuration.

    fp8                  8 bits, and 32 of scale per block        the matrices of linears and of experts
    mxfp4                4 bits, and 8 of scale per 32 inputs     the matrices of experts
    awq, gptq            4 bits, and 20 of scale and zero a group the matrices of linears and of experts
    compressed-tensors   the bits of its first group, and 16 of scale per group, or none worth counting

Modules that the configuration leaves as they are, tables and the head are counted in their own dtype.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import nn
from transformers.quantizers.quantizers_utils import should_convert_module

from partitioner.errors import CaptureError

__all__ = ["released_bytes", "stored_bits"]


def released_bytes(model: Any, fields: Mapping[str, Any]) -> float:
    """Of a model without data. Raises `CaptureError` where the method is none of the above."""
    bits, experts_only = stored_bits(fields)
    left = [*(fields.get("modules_to_not_convert") or ()), *(fields.get("ignore") or ())]
    head = model.get_output_embeddings()
    total, seen = 0.0, set[int]()
    for path, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            if id(parameter) in seen:
                continue
            seen.add(id(parameter))
            is_experts = parameter.ndim == 3 and not name.endswith("bias")
            is_linear = (
                isinstance(module, nn.Linear) and parameter.ndim == 2 and module is not head and not experts_only
            )
            converted = (is_experts or is_linear) and should_convert_module(path, left)
            own = 8 * parameter.element_size()
            total += parameter.numel() * (bits if converted else own) / 8
    return total


def stored_bits(fields: Mapping[str, Any]) -> tuple[float, bool]:
    """Bits of an element, scales included; and whether experts alone are quantised."""
    method = fields.get("quant_method")
    if method == "fp8":
        block = fields.get("weight_block_size") or (1 << 20, 1)
        return 8 + 32 / math.prod(block), False
    if method == "mxfp4":
        return 4 + 8 / 32, True
    if method in ("awq", "gptq"):
        size = int(fields.get("group_size", 128))
        return int(fields.get("bits", 4)) + (20 / size if size > 0 else 0.0), False
    if method == "compressed-tensors":
        weights = next((each.get("weights") or {} for each in fields.get("config_groups", {}).values()), {})
        group = weights.get("group_size") or 0
        return int(weights.get("num_bits", 8)) + (16 / group if group > 0 else 0.0), False
    raise CaptureError(f"the bytes of weights released by {str(method)[:100]!r} are not known: leave its config out")
