"""Stop strings: where a growing text ends, and what of it may be shown meanwhile."""

from __future__ import annotations

from collections.abc import Sequence

from runtime.config import SamplingParams
from runtime.request import Request, StepOutput
from runtime.tokenizer import Detokenizer, Tokenizer


class StopStrings:
    """Searches a text that comes piece by piece; what it finds does not depend on how the pieces are cut."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = stops
        self._held = ""
        """The end of the text, not shown yet: it may become a stop string."""

    def push(self, piece: str) -> str:
        """The text goes on. Returns what is sure to stand before every stop string."""
        self._held += piece
        first = len(self._held)
        for stop in self._stops:
            for length in range(min(len(stop) - 1, len(self._held)), 0, -1):
                if self._held.endswith(stop[:length]):
                    first = min(first, len(self._held) - length)
                    break
        shown, self._held = self._held[:first], self._held[first:]
        return shown

    def find(self, piece: str) -> tuple[int, int] | None:
        """Where the stop string stands that is complete first in what is held and this next piece; of those that end
        there, the longest. (start, end), or None."""
        text = self._held + piece
        found = [(start + len(stop), start) for stop in self._stops if (start := text.find(stop)) >= 0]
        if not found:
            return None
        end, start = min(found)
        return start, end

    def cut(self, piece: str, include: bool) -> str:
        """What is shown of the text that ends with the stop string in this piece."""
        found = self.find(piece)
        assert found is not None
        return (self._held + piece)[: found[1] if include else found[0]]

    def flush(self) -> str:
        """What is held; from here on stop strings are searched anew."""
        shown, self._held = self._held, ""
        return shown


class StopWatch:
    """Tells which token of an answer completes a stop string. It follows accepted tokens alone."""

    def __init__(self, tokenizer: Tokenizer, request: Request) -> None:
        self._detokenizer = Detokenizer(tokenizer, request.prompt_ids)
        self._search = StopStrings(request.sampling.stop)
        self._num_free = request.sampling.min_new_tokens
        """Tokens still to come whose text is no part of a stop string."""

    def first_end(self, tokens: Sequence[int]) -> int | None:
        """Take in the next tokens. The index of the first that completes a stop string; those behind it are not looked
        at."""
        for index, token in enumerate(tokens):
            if token < 0:
                return None
            piece = self._detokenizer.push([token])
            if self._num_free:
                self._num_free -= 1
                continue
            if self._search.find(piece):
                return index
            self._search.push(piece)
        return None


class AnswerText:
    """The text of an answer as it may be shown, step by step: no half of a character, and nothing that may still become
    a stop string."""

    def __init__(
        self, tokenizer: Tokenizer, prompt_ids: Sequence[int], sampling: SamplingParams, given: Sequence[int] = ()
    ) -> None:
        """`given`: tokens of the answer whose text has been shown before."""
        self._detokenizer = Detokenizer(tokenizer, prompt_ids)
        self._search = StopStrings(sampling.stop)
        self._include_stop = sampling.include_stop
        self._num_free = sampling.min_new_tokens if sampling.stop else 0
        self._shown_of(given, is_stopped=False)

    def push(self, output: StepOutput) -> str:
        """The text that became certain with a step; with the last one, all that is left."""
        shown = self._shown_of(output.text_ids, output.is_stopped)
        if output.finish_reason is not None and not output.is_stopped:
            shown += self._search.flush() + self._detokenizer.flush()
        return shown

    def _shown_of(self, tokens: Sequence[int], is_stopped: bool) -> str:
        """The text that becomes certain with these tokens; `is_stopped`: the last completes a stop string."""
        shown = ""
        for index, token in enumerate(tokens):
            piece = self._detokenizer.push([token])
            if self._num_free:
                self._num_free -= 1
                shown += piece
            elif is_stopped and index == len(tokens) - 1:
                shown += self._search.cut(piece, self._include_stop)
            else:
                shown += self._search.push(piece)
        return shown
