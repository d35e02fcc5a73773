"""Parts of torch and transformers that are nobody's interface.

What leaves work out of a trace looks into them, and another version may lack any of them. They are looked up here, each
time that a trace is made, and what does not find all of its own leaves nothing out: the trace is the same, and takes
longer.
"""

from __future__ import annotations

import pkgutil
from typing import Any

__all__ = ["internal"]


def internal(path: str) -> Any | None:
    """What is called `path`, such as "torch.fx.proxy.CapturedTraceback"; None where this version has nothing there."""
    try:
        return pkgutil.resolve_name(path)
    except (ImportError, AttributeError):
        return None
