"""How the matrices of layers are stored, and in which dtype they are multiplied.

    float8_e4m3fn    one byte each, multiplied as they are: kernels of their own
    stored           the bits of a quantised checkpoint, scales included; expanded inside the product, which runs in the
                     model's own dtype (`runtime/ops/kernels`) as fast as engines' kernels for codes of four bits

Tables, norms, the head and routers keep the model's own dtype.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from partitioner.planning.kernels import EXPANDING
from partitioner.planning.released import stored_bits

__all__ = ["ITEM", "StoredFormat"]

ITEM = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2, "float8_e4m3fn": 1}
"""Bytes of a number."""


@dataclass(frozen=True)
class StoredFormat:
    """dtype: of the numbers that are stored in fewer bits. bits: of each of them, scales included. product_dtype: what
    products run in, "" for `dtype`. table: of measured kernels, where it is not that of `product_dtype`.
    """

    name: str
    dtype: str
    bits: float
    experts_only: bool = False
    product_dtype: str = ""
    table: str = ""

    @classmethod
    def float8(cls, dtype: str) -> StoredFormat:
        return cls("float8_e4m3fn", dtype, 8.0, product_dtype="float8_e4m3fn")

    @classmethod
    def released(cls, dtype: str, fields: Mapping[str, Any]) -> StoredFormat:
        """As `Plan(weights="stored")` holds it. fields: the quantization_config. Raises `CaptureError` where the bits
        of its method are not known.
        """
        bits, experts_only = stored_bits(fields)
        return cls(str(fields.get("quant_method")), dtype, bits, experts_only, table=EXPANDING)

    @property
    def item(self) -> float:
        """Bytes of a number."""
        return self.bits / 8

    def holds(self, *, experts: bool) -> bool:
        """Whether the matrices of experts, or of linears, are stored so."""
        return experts or not self.experts_only
