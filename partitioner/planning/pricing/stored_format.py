"""How the matrices of layers are stored, and in which dtype they are multiplied.

    float8_e4m3fn    one byte each, multiplied as they are: kernels of their own
    stored           the bits of a quantised checkpoint, scales included; expanded inside the product, which runs in the
                     model's own dtype (`runtime/ops/kernels`)

Tables, norms, the head and routers keep the model's own dtype.
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["ITEM", "StoredFormat"]

ITEM = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2, "float8_e4m3fn": 1}
"""Bytes of a number."""


@dataclass(frozen=True)
class StoredFormat:
    """dtype: of the numbers that are stored in fewer bits. bits: of each of them, scales included. product_dtype: what
    products run in, "" for `dtype`. share: how much of a plain product's speed is left when it expands codes.
    """

    name: str
    dtype: str
    bits: float
    experts_only: bool = False
    product_dtype: str = ""
    share: float = 1.0

    @classmethod
    def float8(cls, dtype: str) -> StoredFormat:
        return cls("float8_e4m3fn", dtype, 8.0, product_dtype="float8_e4m3fn")

    @property
    def item(self) -> float:
        """Bytes of a number."""
        return self.bits / 8

    def holds(self, *, experts: bool) -> bool:
        """Whether the matrices of experts, or of linears, are stored so."""
        return experts or not self.experts_only
