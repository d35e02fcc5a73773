"""What `partitioner serve` is asked."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from partitioner.cli.jobs.compile import Compile
from partitioner.errors import InputError
from partitioner.storage.dtypes import require_asked
from partitioner.storage.hub import hub_hint
from partitioner.storage.recognise import is_bundle
from runtime.kv_cache.device_memory import Amount, require_dtype

__all__ = ["Serving"]


@dataclass(frozen=True)
class Serving:
    """Fields as the options of the command say; None: the default that is named there."""

    model: str
    compile: Compile
    host: str
    port: int
    name: str | None
    chat_template: str | None
    api_key_file: str | None
    max_requests: int
    max_context: int | None
    max_body: int
    request_timeout_s: float
    grace_s: float
    restart: bool
    max_batch: int | None
    cache_memory: str | None
    cache_dtype: str | None
    rank_timeout_s: float
    start_timeout_s: float
    dtype: str | None
    device: str
    compile_steps: bool
    checkpoint: str | None
    mapped: bool
    checked: bool
    cached: bool

    def __post_init__(self) -> None:
        if not 0 <= self.port < 1 << 16:
            raise InputError(f"the port must be from 0 to 65535, 0 for one that is free; got {self.port}")
        if self.max_context is not None and self.max_context < 2:
            raise InputError(
                f"--max-context must be at least 2, a token of a prompt and one of its answer; got {self.max_context}"
            )
        if not self.grace_s >= 0:
            raise InputError(f"--grace must be a number of seconds, 0 for none; got {self.grace_s:g}")
        if self.max_batch is not None and self.max_batch < 1:
            raise InputError(f"--max-batch must be at least 1, got {self.max_batch}")
        require_asked(self.dtype)
        require_dtype(self.cache_dtype)
        if self.cache_memory is not None:
            Amount.of(self.cache_memory)
        if not self.model or not Path(self.model).is_dir():
            raise InputError(
                f"{self.model!r} is not a folder: give a checkpoint folder with its tokenizer, or a bundle"
                + hub_hint(self.model)
            )
        if is_bundle(self.model):
            self.compile.require_none(self.model)
