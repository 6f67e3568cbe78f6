"""What people see: streamed text with the parallel tokens in colour, and a line of figures."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import TYPE_CHECKING, TextIO

from cluster.wire.answers import Chunk
from runtime.request import FinishReason, Usage

if TYPE_CHECKING:
    from runtime.tokenizer import Tokenizer

ACCEPTED = "\x1b[1;32m"
RESET = "\x1b[0m"


def wants_color(file: TextIO, choice: bool | None = None) -> bool:
    """The user's choice, else whether `file` is a terminal and NO_COLOR is not set."""
    return choice if choice is not None else file.isatty() and not os.environ.get("NO_COLOR")


class StepText:
    """An answer's chunks, split into the text of accepted candidates and that of the tokens which steps give anyway.

    Without a tokenizer a step's text cannot be split, and all text of a step that accepted some counts as accepted.
    """

    def __init__(self, tokenizer: Tokenizer | None = None) -> None:
        self._detokenizer = None
        if tokenizer is not None:
            from runtime.tokenizer import Detokenizer

            self._detokenizer = Detokenizer(tokenizer)

    def split(self, chunk: Chunk) -> Iterator[tuple[str, bool]]:
        """The chunk's texts in order, each with whether it was accepted."""
        if self._detokenizer is None:
            yield chunk.text, chunk.num_accepted > 0
            return
        stop = len(chunk.token_ids) - (chunk.finish_reason is FinishReason.STOP)  # a stop token is no text
        self._detokenizer.push(chunk.token_ids[: chunk.num_accepted])
        own = self._detokenizer.push(chunk.token_ids[chunk.num_accepted : stop])
        if chunk.finish_reason is not None:
            own += self._detokenizer.flush()
        middle = max(len(chunk.text) - len(own), 0)
        yield chunk.text[:middle], True
        yield chunk.text[middle:], False


class TextStream:
    """Writes an answer as it comes. With colour, the tokens that a step accepted stand out from the one it chose."""

    def __init__(self, file: TextIO, color: bool, tokenizer: Tokenizer | None = None) -> None:
        self._file, self._color = file, color
        self._texts = StepText(tokenizer if color else None)

    def write(self, chunk: Chunk) -> None:
        """Write one chunk of the answer."""
        for text, accepted in self._texts.split(chunk):
            self._file.write(f"{ACCEPTED}{text}{RESET}" if text and accepted and self._color else text)
        self._file.flush()


def tokens_per_second(usage: Usage) -> float:
    """New tokens over the whole latency, the prompt's part included."""
    return usage.num_new_tokens / usage.latency_s if usage.latency_s else 0.0


def counted(number: int, noun: str) -> str:
    """A number of things, one of which has no s."""
    return f"{number} {noun}{'s' * (number != 1)}"


def summary(usage: Usage) -> str:
    """One line of figures."""
    tokens, steps = counted(usage.num_new_tokens, "token"), counted(usage.num_steps, "step")
    return (
        f"{tokens} in {steps}, {usage.tokens_per_step:.2f} tokens per step, "
        f"{tokens_per_second(usage):.1f} tokens/s, first token after {usage.ttft_s:.2f} s"
    )
