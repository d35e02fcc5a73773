"""Channels whose use is recorded, for what communicates outside graphs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from runtime.communication.channels import Channel, Handle, PersistentPermute
from runtime.communication.communicator import Communicator
from runtime.execution.recording import Recording
from runtime.ops.communicating import Axes, Kind, axes_text

__all__ = ["TransferChannel", "WatchedCommunicator"]


class WatchedCommunicator(Communicator):
    """A communicator whose operations are recorded, for what communicates outside graphs."""

    def __init__(self, communicator: Communicator, recording: Recording) -> None:
        self.mesh, self.rank = communicator.mesh, communicator.rank
        self._communicator, self._recording = communicator, recording

    def channel(self, axes: Axes, *, node: str) -> Channel:
        return _WatchedChannel(self._communicator.channel(axes, node=node), self._recording)

    def traceable_channel(self, axes: Axes, *, node: str) -> Channel:
        return self._communicator.traceable_channel(axes, node=node)

    def begin_run(self, *, new_shapes: bool) -> None:
        self._communicator.begin_run(new_shapes=new_shapes)

    def explained(self, error: BaseException) -> BaseException:
        return self._communicator.explained(error)

    def abort(self, error: BaseException) -> None:
        self._communicator.abort(error)

    def barrier(self) -> None:
        self._communicator.barrier()

    def close(self) -> None:
        self._communicator.close()


class _WatchedChannel(Channel):
    """Of what is begun, the begin is recorded: the meeting."""

    def __init__(self, channel: Channel, recording: Recording) -> None:
        super().__init__(channel.axes, channel.ranks, channel.rank, node=channel.node)
        self._channel, self._recording = channel, recording

    def prepare(self, kind: Kind, *, overwrite: bool = False, **options: Any) -> Callable[..., Any]:
        bound, recording = self._channel.prepare(kind, overwrite=overwrite, **options), self._recording
        peer = {"send": options.get("to"), "receive": options.get("from_")}.get(kind)

        def run(*operands: Any) -> Any:
            start = recording.now()
            found = bound(*operands)
            tensor = next((each for each in (found, *operands) if isinstance(each, Tensor)), None)
            shape = str(list(operands[0])) if tensor is None else _said(tensor)
            recording.add_call(self.node, kind, self.axes, start, recording.now(), shape, peer=peer)
            return found

        return run


class TransferChannel(Channel):
    """Of a send, receive or permute both the begin and the finish are recorded, and whose they are.

    current: where to, if a recording is on now.
    """

    def __init__(self, channel: Channel, current: Callable[[], Recording | None]) -> None:
        super().__init__(channel.axes, channel.ranks, channel.rank, node=channel.node)
        self._channel, self._current = channel, current

    def prepare(self, kind: Kind, *, overwrite: bool = False, **options: Any) -> Callable[..., Any]:
        bound = self._channel.prepare(kind, overwrite=overwrite, **options)
        peer, shift = options.get("to", options.get("from_")), options.get("shift", 0)
        here, count = self.coordinate, len(self.ranks)
        to = {"send": peer, "permute": (here + shift) % count}.get(kind)
        from_ = {"receive": peer, "permute": (here - shift) % count}.get(kind)

        def run(*operands: Any) -> Any:
            recording = self._current()
            if recording is None:
                return bound(*operands)
            start = recording.now()
            found = bound(*operands)
            end = recording.now()
            shape = _said(operands[0]) if isinstance(operands[0], Tensor) else str(list(operands[0]))
            if not isinstance(found, Handle):
                recording.add_call(self.node, kind, self.axes, start, end, shape, peer=peer)
                return found
            told = {"name": self.node, "op": f"{kind} over {axes_text(self.axes)}", "shape": shape}
            ranks = {"to": None if to is None else self.ranks[to], "from": None if from_ is None else self.ranks[from_]}
            return recording.add_transfer({**told, **ranks}, self.axes, peer, start, end, found)

        return run

    def persistent_permute(self, x: Tensor, shift: int) -> PersistentPermute:
        bare, recorded = self._channel.persistent_permute(x, shift), super().persistent_permute(x, shift)
        current, used = self._current, bare

        def begin() -> None:
            nonlocal used
            used = bare if current() is None else recorded
            used.begin()

        return PersistentPermute(begin, lambda: used.finish())


def _said(value: Tensor) -> str:
    return f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}"
