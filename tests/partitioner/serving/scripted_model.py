"""A model for tests of the server alone: it says what it is told to, as `Launched` would, at the test's own pace."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

from partitioner.errors import PartitionerError
from runtime.generation.generation_request import Step
from runtime.launching.status import ReplicaStatus, ServingStatus


class ScriptedCall:
    def __init__(self, prompt: Sequence[int], options: dict[str, Any], heard: Callable[[], None]) -> None:
        self.prompt, self.options, self._heard = list(prompt), options, heard
        self.steps: list[Step] = []
        self.failure: Exception | None = None
        self.is_over = self.is_left = False

    def say(self, *tokens: int, over: bool = False, failure: Exception | None = None) -> None:
        named = self.options["top_logprobs"] is not None
        self.steps += [Step((token,), None, (((token, -0.5),),) if named else None) for token in tokens]
        self.failure = failure
        self.is_over = over or failure is not None
        self._heard()

    def come(self, start: int) -> list[Step]:
        found = self.steps[start:]
        if not found and self.failure is not None:
            raise self.failure
        return found


class ScriptedModel:
    """script: what each row is told, at once; None: nothing, until the test says so."""

    def __init__(self, script: Callable[[list[int], dict[str, Any]], list[int]] | None = None) -> None:
        self._script = script
        self.calls: list[ScriptedCall] = []
        self.lost: dict[int, PartitionerError] = {}
        self.replicas = 1
        self.longest = 100
        self.generation: dict[str, Any] = {"eos_token_id": [0]}
        self._changed = threading.Condition()

    def status(self) -> ServingStatus:
        return ServingStatus((ReplicaStatus(running=len(self.calls), tokens_that_fit=None),))

    def begin(self, prompts: Sequence[Sequence[int]], *, heard: Callable[[], None], **options: Any) -> ScriptedCall:
        call = ScriptedCall(prompts[0], options, heard)
        if self._script is not None:
            call.say(*self._script(call.prompt, options), over=True)
        with self._changed:
            self.calls.append(call)
            self._changed.notify_all()
        return call

    def leave(self, call: ScriptedCall) -> None:
        with self._changed:
            call.is_left = call.is_over = True
            self._changed.notify_all()

    def wait_for(self, done: Callable[[], bool]) -> None:
        with self._changed:
            assert self._changed.wait_for(done, 10)
