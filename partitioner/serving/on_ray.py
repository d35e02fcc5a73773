"""Replicas as a Ray Serve deployment: Ray starts, restarts and scales them, and sends each request to one of them.

    from ray import serve

    serve.run(application("checkpoint/", Plan(tp=4), replicas=2))

Each replica is one actor in a placement group of its own, with a processor, or a GPU, for each of its ranks, which are
processes of the actor's host; the actor speaks OpenAI's API as `partitioner serve` does. It tells Ray that it is not
well as soon as a rank is lost, and Ray starts another. Needs the extra `partitioner[ray]`.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from partitioner.errors import InputError
from partitioner.program.plan import Plan
from partitioner.serving.launch import launch
from partitioner.storage.dtypes import dtype_named
from runtime.kv_cache.cache_size import CacheSize

__all__ = ["application"]

_ROWS = 32
_HEALTH_S = 2.0


@dataclass(frozen=True)
class _Asked:
    """What an actor starts; it is sent to other hosts, where the files must be at the same places."""

    model: str
    plan: Plan
    how: Mapping[str, Any]
    limits: Mapping[str, Any] = field(default_factory=dict)
    name: str | None = None
    chat_template: str | None = None
    max_context: int | None = None


def application(
    model: str | Path,
    plan: Plan | None = None,
    *,
    replicas: int = 1,
    autoscaling: Mapping[str, Any] | None = None,
    device: str = "cpu",
    dtype: str | None = None,
    cache_memory: str | None = None,
    max_batch: int | None = None,
    name: str | None = None,
    chat_template: str | Path | None = None,
    max_context: int | None = None,
    max_requests: int = 256,
    request_timeout_s: float = 600.0,
    rank_timeout_s: float = 60.0,
) -> Any:
    """A `ray.serve.Application`, for `serve.run` or `serve run`.

    model: a checkpoint folder with its tokenizer, or a bundle, on every host that a replica may run on. plan: of one
    replica. autoscaling: Ray Serve's `autoscaling_config`, in place of `replicas`. The others: as the options of
    `partitioner serve`.

    Raises InputError without ray, and for a plan with replicas of its own.
    """
    plan = plan or Plan()
    if plan.replicas != 1:
        raise InputError(f"replicas are Ray's here: give replicas={plan.replicas} in place of dp in the plan {plan}")
    try:
        from ray import serve
    except ModuleNotFoundError as error:
        raise InputError(f"replicas on Ray need {error.name}: pip install 'partitioner[ray]'") from error
    asked = _Asked(
        model=os.path.abspath(model),
        plan=plan,
        how={
            "device": device,
            "dtype": None if dtype is None else dtype_named(dtype),
            "cache": None if cache_memory is None else CacheSize(max_batch=max_batch or _ROWS, memory=cache_memory),
            "max_batch": max_batch,
            "timeout_s": rank_timeout_s,
        },
        limits={"max_requests": max_requests, "request_s": request_timeout_s},
        name=name,
        chat_template=None if chat_template is None else os.path.abspath(chat_template),
        max_context=max_context,
    )
    ranks = float(plan.mesh.world_size)
    bundle = {"CPU": ranks} if device == "cpu" else {"CPU": ranks, "GPU": ranks}
    deployed = serve.deployment(
        serve.ingress()(_Replica),
        name="partitioner",
        num_replicas=None if autoscaling is not None else replicas,
        autoscaling_config=None if autoscaling is None else dict(autoscaling),
        max_ongoing_requests=max_requests,
        health_check_period_s=_HEALTH_S,
        ray_actor_options={"num_cpus": ranks, "num_gpus": bundle.get("GPU", 0.0)},
        placement_group_bundles=[bundle],
        placement_group_strategy="STRICT_PACK",
    )
    return deployed.bind(asked)


class _Replica:
    """The actor."""

    def __init__(self, asked: _Asked) -> None:
        from partitioner.serving.open_service import open_service, read_tokenizer, read_vocabulary

        self._closing = contextlib.ExitStack()
        tokenizer, _ = read_tokenizer(asked.model, asked.chat_template)
        vocabulary, why_not = read_vocabulary(tokenizer)
        self._llm = self._closing.enter_context(launch(asked.model, asked.plan, vocabulary=vocabulary, **asked.how))
        self._service = open_service(
            self._llm,
            asked.model,
            tokenizer,
            vocabulary=vocabulary,
            why_not=why_not,
            limits=asked.limits,
            max_context=asked.max_context,
            name=asked.name,
        )
        self._closing.callback(self._service.close)

    def __serve_build_asgi_app__(self) -> Any:
        from partitioner.serving.http.app import create_app

        return create_app(self._service)

    def check_health(self) -> None:
        """What Ray asks; an exception ends this replica, and another is started."""
        for error in self._llm.lost.values():
            raise error

    def __del__(self) -> None:
        self._closing.close()
