"""The configuration in a bundle, before transformers builds a model from it.

transformers can be told by a configuration to fetch code and run it: a class of the checkpoint's own, or a kernel for
attention. A model that is traced here needs neither.
"""

from __future__ import annotations

from typing import Any

from partitioner.errors import BundleError
from partitioner.storage.bundle.format.untrusted_json import parse

__all__ = ["require_plain"]

_IMPLEMENTATIONS = frozenset(
    f"{before}{kind}_implementation{after}"
    for kind in ("attn", "experts")
    for before in ("", "_")
    for after in ("", "_internal")
)
_PLAIN = (None, "eager", "sdpa", "grouped_mm", "batched_mm")
_INFINITE = "__float__"
"""How transformers writes infinity."""
_FETCHED = frozenset({"auto_map", "use_kernels", "kernel_config", "quantization_config"})


def require_plain(text: bytes, where: str) -> None:
    """Raises `BundleError` where a configuration, or one within it, names code outside transformers."""
    level: list[Any] = [parse(text, where)]
    while level:
        for each in level:
            for name, value in each.items() if isinstance(each, dict) else ():
                allowed = _PLAIN if name in _IMPLEMENTATIONS else (None,) if name in _FETCHED else None
                special = name.startswith("__") and name != _INFINITE
                if special or (allowed is not None and not any(value == known for known in allowed)):
                    raise BundleError(
                        f"{where} has {name[:100]!r}: {str(value)[:100]!r}, which could bring code of its own; a "
                        "bundle is split anew with the code of transformers only"
                    )
        level = [
            inner
            for each in level
            if isinstance(each, (dict, list))
            for inner in (each.values() if isinstance(each, dict) else each)
        ]
