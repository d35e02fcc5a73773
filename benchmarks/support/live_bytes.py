"""How many bytes of results are alive at the same time, at most: weights and inputs are not results."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """The most bytes of results that were alive at the same time, and which op made the last of them."""

    def __init__(self) -> None:
        super().__init__()
        self.most, self.at = 0, ""
        self._live: dict[StorageWeakRef, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        given = {_storage(each) for each in tree_leaves((args, kwargs)) if isinstance(each, Tensor)}
        for each in tree_leaves(made):
            if isinstance(each, Tensor) and (found := _storage(each)) not in given:
                self._live[found] = each.untyped_storage().nbytes()
        self._live = {storage: size for storage, size in self._live.items() if not storage.expired()}
        now = sum(self._live.values())
        if now > self.most:
            self.most, self.at = now, str(func)
        return made


def _storage(x: Tensor) -> StorageWeakRef:
    return StorageWeakRef(x.untyped_storage())
