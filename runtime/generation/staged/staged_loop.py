"""Continuing sequences over pipeline stages: groups of rows, as many as stages, take turns.

prompts   pieces, group by group, through a chain of stages; then the first tokens, which all are told
decode    `ring.py`, where the host chooses in each slot, or `relayed.py`, where devices choose by themselves
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from partitioner.errors import RankMismatch
from runtime.communication.communicator import Communicator
from runtime.execution.profile import Profiler
from runtime.generation.choose_tokens import TokenChooser
from runtime.generation.conversation import Conversation
from runtime.generation.generation_request import GenerationRequest, Step
from runtime.generation.staged.group_results import GroupResults
from runtime.generation.staged.part import Part
from runtime.generation.staged.relayed import Relayed
from runtime.generation.staged.ring import Ring
from runtime.generation.steps import Steps
from runtime.pipeline.chunks import chunk_ends
from runtime.pipeline.links import Links
from runtime.pipeline.message import message_bytes
from runtime.pipeline.run_schedule import run_schedule
from runtime.pipeline.schedule import chain, groups_of
from runtime.program.rank_program import RankProgram

__all__ = ["StagedLoop"]


class StagedLoop:
    """One rank's part of one request; see the module's docstring."""

    def __init__(
        self,
        run: Steps,
        prefill: RankProgram,
        decode: RankProgram,
        communicator: Communicator,
        device: torch.device,
        profiler: Profiler,
        *,
        alike: bool,
        relays: bool,
    ) -> None:
        """alike: as in `Conversation`, for all stages. relays: whether the device may choose and hand on by itself."""
        assert prefill.stage is not None
        assert decode.stage is not None
        channel = profiler.watched_transfers(communicator.channel("pp", node="shift"))
        self._part = Part(run, decode.stage, channel, communicator, device)
        self._alike, self._program = alike, prefill
        self._links = Links(communicator, prefill.stage, profiler)
        self._relays = relays
        self._relayed: Relayed | None = None

    def leave(self) -> None:
        """Ends what a stream of it has under way, if it has anything; all ranks do so behind the same step."""
        if self._relayed is not None:
            self._relayed.leave()

    def steps(self, request: GenerationRequest, chooser: TokenChooser, size: int) -> Iterator[Step]:
        """One `Step` per token, on all ranks, until every sequence has ended."""
        rows = groups_of(len(request.prompts), self._part.stage.count, groups=request.settings.pipeline_groups)
        groups = [Conversation(request, vocab_size=self._program.vocab_size, rows=group) for group in rows]
        logits = self._prefill(groups, rows, size)
        results = GroupResults(groups)
        if self._part.shares_head:
            length = self._choose_first(groups, logits, chooser, results)
        else:
            length = self._tell_first(groups, logits, chooser, results, scored=request.settings.logprobs)
        yield results.next()
        scored, most = request.settings.logprobs, request.settings.max_new_tokens - 1
        if not self._relays:
            yield from Ring(self._part, groups, rows, chooser, results, length, scored=scored).steps()
        elif not results.is_over:
            self._relayed = Relayed(self._part, groups, rows, chooser, results, most=most)
            yield from self._relayed.steps()

    def _prefill(self, groups: list[Conversation], rows: list[slice], size: int) -> dict[int, Tensor]:
        """The logits [B, V/n] of each prompt's last token, by group: on the last stage, or all that share the head."""
        pieces = [
            (number, piece)
            for number, group in enumerate(groups)
            if group.texts
            for piece in group.pieces_between(self._ends(group, groups, size), alike=self._alike)
        ]
        found: dict[int, Tensor] = {}

        def run(number: int, received: list[Tensor]) -> tuple[Tensor, ...]:
            group, piece = pieces[number]
            made = self._part.run.execute(piece, received, rows=rows[group])
            if not self._part.is_last:
                return made  # type: ignore[no-any-return]
            if self._part.shares_head:
                return made if any(piece.completes) else ()
            if any(piece.completes):
                keep(number, made)
            return ()

        def head(number: int, made: tuple[Tensor, ...] | None) -> None:
            keep(number, self._part.run.head(pieces[number][1], made))

        def keep(number: int, logits: Tensor) -> None:
            group, piece = pieces[number]
            completes = torch.tensor(piece.completes, device=self._part.device)
            found[group] = torch.where(completes[:, None], logits[:, 0], found.get(group, logits[:, 0]))

        sizes = [self._part.run.sizes(piece) for _, piece in pieces]
        self._require_alike(sizes)
        self._links.begin(new_shapes=False)
        # only where a prompt ends does anybody want logits
        heads = [n for n, (_, piece) in enumerate(pieces) if any(piece.completes)] if self._part.shares_head else []
        early = self._part.device.type != "cuda"
        timeline = chain(self._part.stage.count, len(pieces), heads=heads, early=early)[self._part.stage.index]
        run_schedule(timeline, self._links, sizes, run, head)
        return found

    def _require_alike(self, sizes: list[dict[str, int]]) -> None:
        """Raises `RankMismatch` where stages are about to run other pieces.

        Once for each request: a stage that compares each piece does so when the one before has computed it, and could
        begin none before the next was there.
        """
        mine = torch.tensor([[[*each.values()] for each in sizes]], device=self._part.device)
        self._part.communicator.begin_run(new_shapes=True)
        everyone = self._part.channel.all_gather(mine, dim=0).tolist()
        for stage, others in enumerate(everyone):
            if others != everyone[0]:
                raise RankMismatch(
                    f"stages 0 and {stage} are about to run other pieces of prompts ({', '.join(sizes[0])} of each): "
                    f"{everyone[0]} and {others}. Give every rank the same prompts and options"
                )

    def _ends(self, group: Conversation, groups: list[Conversation], size: int) -> list[int]:
        """Chunks of one group: enough of them to keep all stages busy, `size` tokens at most."""
        rows = [len(each.texts) for each in groups]
        return chunk_ends(
            max(map(len, group.texts)),
            stages=self._part.stage.count,
            rows=sum(rows),
            groups=sum(map(bool, rows)),
            longest=size,
            pairs_per_token=self._part.stage.pairs_per_token,
            device=self._part.device.type,
            # not as this stage's cache has it: all stages cut alike, also one without attention
            multiple_of=self._program.mesh.size("sp"),
        )

    def _choose_first(
        self, groups: list[Conversation], logits: dict[int, Tensor], chooser: TokenChooser, results: GroupResults
    ) -> int:
        """Chooses the first tokens, on all stages at once, and agrees on the length of messages."""
        for number, found in sorted(logits.items()):
            results.learn(number, *chooser.choose(found, groups[number]))
        most = max(len(group.texts) for group in groups)
        mine = torch.tensor([message_bytes(self._part.stage.sends, most)], device=self._part.device)
        self._part.communicator.begin_run(new_shapes=True)
        return int(self._part.channel.all_gather(mine, dim=0).max().item())

    def _tell_first(
        self,
        groups: list[Conversation],
        logits: dict[int, Tensor],
        chooser: TokenChooser,
        results: GroupResults,
        *,
        scored: bool,
    ) -> int:
        """Chooses the first tokens, tells all stages, and agrees on the length of messages."""
        most = max(len(group.texts) for group in groups)
        told = torch.zeros((1, len(groups), most, 2), dtype=torch.float64)
        lengths = torch.tensor([message_bytes(self._part.stage.sends, most)], dtype=torch.float64)
        for number, found in logits.items():
            tokens, logprobs = chooser.choose(found, groups[number])
            told[0, number, : len(tokens), 0] = torch.tensor(tokens, dtype=torch.float64)
            if logprobs is not None:
                told[0, number, : len(tokens), 1] = torch.tensor(logprobs, dtype=torch.float64)
        mine = torch.cat([told.view(1, -1), lengths[None]], dim=1).to(self._part.device)
        self._part.communicator.begin_run(new_shapes=True)
        everyone = self._part.channel.all_gather(mine, dim=0).cpu()
        told = everyone[-1, :-1].view(len(groups), most, 2)
        for number, group in enumerate(groups):
            tokens = [int(token) for token in told[number, : len(group.texts), 0].tolist()]
            logprobs = told[number, : len(group.texts), 1].tolist()
            results.learn(number, tokens, logprobs if scored else None)
        return int(everyone[:, -1].max().item())
