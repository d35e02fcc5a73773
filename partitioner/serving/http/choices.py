"""The choices of one request: rows of the model, made into pieces of text as their tokens come."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

from partitioner.serving.http.merged import merged
from partitioner.serving.http.metrics import Metrics, Stopwatch
from partitioner.serving.http.rows import steps_of
from partitioner.serving.openai.answers import Piece, Reason, ScoredToken, Usage
from partitioner.serving.text.answer_text import AnswerText
from partitioner.serving.tools.call_reader import Read, joined
from partitioner.serving.tools.tool_use import ToolUse
from runtime.generation.generation_options import Options
from runtime.generation.generation_request import Step
from runtime.launching.launched import Launched

__all__ = ["Choice", "pieces_of"]


@dataclass(frozen=True)
class Choice:
    """What to continue and how. ends: the ids after which a row ends. echo: text that stands before the answer.

    tools: where the answer may have calls of tools.
    """

    index: int
    prompt: Sequence[int]
    options: Options
    ends: frozenset[int]
    stops: tuple[str, ...] = ()
    echo: str = ""
    tools: ToolUse | None = None

    async def pieces(self, llm: Launched, tokenizer: Any, usage: Usage, metrics: Metrics) -> AsyncGenerator[Piece]:
        """The last has the reason for the end."""
        text = AnswerText(tokenizer, self.prompt, self.stops, hidden=None if self.tools is None else self.tools.hidden)
        reader = None if self.tools is None else self.tools.reader()
        watch = Stopwatch(metrics)
        waiting: list[ScoredToken] = []
        count, last = 0, -1
        if self.echo:
            yield Piece(self.index, self.echo)
        async with aclosing(steps_of(llm, self.prompt, self.options)) as steps:
            async for some in steps:
                taken = 0
                for step in some:
                    taken += 1
                    last = step.tokens[0] if step.tokens[0] is not None else last
                    waiting += self._scored(text, step, last)
                    if text.stopped:
                        break
                count += taken
                usage.completion += taken
                watch.tokens(taken)
                if text.stopped:
                    break
                if said := text.take():
                    read = Read(said) if reader is None else reader.feed(said)
                    if read.text or read.calls:
                        yield Piece(self.index, read.text, tuple(waiting), None, read.calls)
                        waiting.clear()
                    if reader is not None and reader.is_done:
                        break
        watch.end()
        said = text.end()
        ended = text.stopped or last in self.ends
        if reader is None:
            yield Piece(self.index, said, tuple(waiting), "stop" if ended else "length")
            return
        read = joined(reader.feed(said), reader.end())
        reason: Reason = "stop" if ended or reader.is_done else "length"
        if reason == "stop" and reader.calls and self.tools is not None and not self.tools.is_named:
            reason = "tool_calls"
        yield Piece(self.index, read.text, tuple(waiting), reason, read.calls)

    def _scored(self, text: AnswerText, step: Step, token: int) -> list[ScoredToken]:
        """Adds a token to the text; what it says, where log-probabilities are asked for."""
        offset = len(self.echo) + len(text.text)
        text.add(token)
        top = None if step.top is None else step.top[0]
        if top is None or token in self.ends:
            return []
        (_, logprob), *others = top
        named = tuple((text.alone(other), value) for other, value in others)
        return [ScoredToken(text.alone(token), offset, logprob, named)]


def pieces_of(
    choices: Sequence[Choice], llm: Launched, tokenizer: Any, usage: Usage, metrics: Metrics
) -> AsyncGenerator[Piece]:
    """Those of all choices, in the order in which they come. What one meets ends all."""
    if len(choices) == 1:  # nothing to merge: no task and no queue that each token passes
        return choices[0].pieces(llm, tokenizer, usage, metrics)
    return merged(*(choice.pieces(llm, tokenizer, usage, metrics) for choice in choices))
