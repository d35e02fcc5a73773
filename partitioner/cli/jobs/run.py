"""What `partitioner run` is asked."""

from __future__ import annotations

import os
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from partitioner.cli.jobs.job import Job
from partitioner.errors import InputError
from partitioner.program.plan import Plan
from partitioner.storage.dtypes import require_asked
from partitioner.storage.hub import hub_hint
from partitioner.storage.recognise import is_bundle
from runtime.kv_cache.device_memory import Amount, require_dtype
from runtime.processes.choose_device import choose_device
from runtime.sampling.sampling_options import Sampling

if TYPE_CHECKING:
    import torch

    from partitioner.program.ranks import Ranks

__all__ = ["Question"]


@dataclass(frozen=True)
class Question(Job):
    """What to run: MODEL (a checkpoint folder with a tokenizer, or a bundle), the prompts, and how to continue them.

    compile: its `tp` is None for what the bundle has, or one rank. dtype: None for that of the weights. checkpoint: the
    folder of the weights that a bundle refers to. mapped: weights are used where they lie in the files. checked: a
    bundle's must have its digests.
    """

    prompts: tuple[str, ...] = ()
    dtype: str | None = None
    checkpoint: str | None = None
    mapped: bool = False
    checked: bool = True
    cached: bool = True
    chat: bool = False
    cache_memory: str | None = None
    """The most that the cache may take on a rank, as in `runtime.kv_cache.device_memory`; None: all that is free."""
    cache_dtype: str | None = None
    """As in `CacheSize`."""
    options: dict[str, Any] = field(default_factory=dict)
    profile: str = ""
    """Where to write a trace of what every rank does; "": nowhere."""
    device: str = "auto"
    """As in `runtime.processes.choose_device`."""
    compile_steps: bool = False
    max_batch: int | None = None
    """The most prompts at a time; None: all."""

    def __post_init__(self) -> None:
        require_asked(self.dtype)
        if self.max_batch is not None and self.max_batch < 1:
            raise InputError(f"--max-batch must be at least 1, got {self.max_batch}")
        if self.profile and (not Path(self.profile).parent.is_dir() or Path(self.profile).is_dir()):
            raise InputError(f"cannot write a trace to {self.profile!r}: give a file in a folder that exists")
        if self.cache_memory is not None:
            Amount.of(self.cache_memory)
        require_dtype(self.cache_dtype)
        names = {each.name for each in fields(Sampling)}
        Sampling(**{name: value for name, value in self.options.items() if name in names})  # checks them
        super().__post_init__()
        for prompt in self.prompts:
            try:
                prompt.encode()
            except UnicodeEncodeError as error:
                raise InputError(f"the prompt {prompt!r} is not valid text: {error.reason}") from None
        if not self.model or not Path(self.model).is_dir():
            raise InputError(
                f"{self.model!r} is not a folder: give a checkpoint folder with its tokenizer, or a bundle"
                + hub_hint(self.model)
            )
        is_checkpoint = not is_bundle(self.model)
        if is_checkpoint and not Path(self.model, "config.json").is_file():
            raise InputError(f"{self.model} is a folder, but no checkpoint: it has no config.json")
        if is_checkpoint and self.checkpoint is not None:
            raise InputError(f"--checkpoint is for a bundle that refers to one; {self.model!r} is not a bundle")
        if is_checkpoint and not self.checked:
            raise InputError(f"--unchecked is for a bundle, which has digests; {self.model!r} is not a bundle")

    def require_right(self) -> None:
        """What is told here once, rather than on every rank, and takes torch to check."""
        from runtime.generation.generation_options import Settings

        Settings.of({**self.options, "tokenizer": ...}, eos_token_id=())
        self.placed  # noqa: B018 - checks the device

    def ranks(self) -> Ranks:
        """The model, without its weights: each rank reads its own, when it is connected."""
        if not is_bundle(self.model):
            return self.compile.ranks(self.model, dtype=self.dtype, mapped=self.mapped, cached=self.cached)
        from partitioner.storage.bundle.bundle import load

        self.compile.require_none(self.model)
        bundle = load(self.model, checkpoint=self.checkpoint, mapped=self.mapped, checked=self.checked)
        if self.replicated.replica_mesh != bundle.mesh or self.dtype not in (None, "auto"):
            raise InputError(
                f"{self.model!r} is a bundle for {bundle.mesh}: leave --tp, --plan and --dtype out, or reshard it by "
                "partitioner export"
            )
        return bundle

    @property
    def replicated(self) -> Plan:
        """The plan, whose degrees may be those of a bundle."""
        return self.compile.plan_of(self.model)

    @property
    def num_ranks(self) -> int:
        return self.replicated.mesh.world_size

    @property
    def placed(self) -> torch.device:
        """Where the ranks of this machine run: under torchrun there may be fewer here than in all."""
        return choose_device(self.device, num_ranks=int(os.environ.get("LOCAL_WORLD_SIZE", self.num_ranks)))
