"""Structured output: what a JSON schema, a regular expression, a choice or a grammar allows next, by llguidance."""

from __future__ import annotations

import json
import threading
from collections.abc import Collection, Sequence
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np

from runtime.config import SamplingParams
from runtime.core import Constraint
from runtime.errors import ConfigError, InvalidRequestError
from runtime.step import Int32
from runtime.tokenizer import Tokenizer

if TYPE_CHECKING:
    import llguidance  # which is loaded where a request wants it

MOST_BYTES = 1 << 16
"""Of a grammar's text."""
MOST_KEPT = 256
"""Grammars that stay compiled."""

# What bounds the work on a grammar: to compile it takes a fraction of a second, a mask some milliseconds, at most.
LIMITS: dict[str, Any] = {
    "initial_lexer_fuel": 1_000_000,
    "step_lexer_fuel": 100_000,
    "step_max_items": 20_000,
    "max_items_in_row": 1000,
    "max_lexer_states": 50_000,
    "max_grammar_size": 100_000,
}
JSON_STYLE: Any = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}


class Grammar(Constraint):
    """What one sequence's grammar allows. It follows accepted tokens; guesses are looked at and taken back."""

    def __init__(self, matcher: llguidance.LLMatcher, ends: Collection[int], vocab_size: int) -> None:
        super().__init__()
        self._matcher, self._ends = matcher, frozenset(ends)
        self._num_words = -(-vocab_size // 32)
        self.error: str | None = None
        """Why it cannot go on: a step of it takes too much."""

    def mask(self, path: Sequence[int]) -> Int32:
        """As Constraint.mask; behind an end token, and where it cannot go on, everything is allowed."""
        words = np.full(self._num_words, -1, np.int32)
        if self.error is not None or not self._ends.isdisjoint(path):
            return words
        if path and not self._matcher.consume_tokens(list(path)):
            self.error = self._matcher.get_error()
            return words
        self._matcher.unsafe_compute_mask_ptr(words.ctypes.data, words.nbytes)
        if self._matcher.is_error():
            self.error = self._matcher.get_error()
            return np.full(self._num_words, -1, np.int32)
        if path:
            self._matcher.rollback(len(path))
        return words

    def accept(self, tokens: Sequence[int]) -> None:
        """The answer has gone on by these tokens."""
        said = [token for token in tokens if token not in self._ends]
        if self.error is None and said and not self._matcher.consume_tokens(said):
            self.error = self._matcher.get_error()


class Grammars:
    """Compiles grammars for one model. Safe from any thread; the first of all takes a second."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, eos_token_ids: Collection[int]) -> None:
        self._tokenizer, self._vocab_size, self._eos_token_ids = tokenizer, vocab_size, eos_token_ids
        self._made: llguidance.LLTokenizer | None = None
        self._making = threading.Lock()
        self._compiled = lru_cache(MOST_KEPT)(self._compile)

    @cached_property
    def _ends(self) -> list[int]:
        """The tokens that may end an answer: the model's, and the one that ends a turn of a chat."""
        end = self._tokenizer.turn_end_id
        return sorted({*self._eos_token_ids, *([end] if end is not None and end < self._vocab_size else [])})

    def prepare(self) -> None:
        """Do now what takes that second, if this model can have grammars."""
        if self._ends and self._tokenizer.backend_json is not None:
            self._ll_tokenizer()

    def grammar(self, sampling: SamplingParams) -> Grammar | None:
        """A new sequence's; None where nothing is asked of its text. Raises InvalidRequestError."""
        given = sampling.structure
        if given is None:
            return None
        return Grammar(self._compiled(*given).deep_copy(), self._ends, self._vocab_size)

    def _compile(self, kind: str, text: str) -> llguidance.LLMatcher:
        import llguidance

        field = f"sampling.{kind}"
        remedy = "See docs/controls.md for what may be asked."
        if len(text.encode()) > MOST_BYTES:
            raise InvalidRequestError(field, text, f"has more than {MOST_BYTES} bytes", "Send a smaller one.")
        if not self._ends:
            raise InvalidRequestError(field, text, "needs an end token, and the model has none", "Leave it out.")
        try:
            source = _source(kind, text)
        except (ValueError, RecursionError) as error:
            raise InvalidRequestError(field, text, f"cannot be read ({_brief(error)})", remedy) from None
        matcher = llguidance.LLMatcher(
            self._ll_tokenizer(), source, log_level=0, limits=llguidance.LLParserLimits(**LIMITS)
        )
        if matcher.is_error():
            raise InvalidRequestError(field, text, f"is refused ({_brief(matcher.get_error())})", remedy)
        probe = Grammar(matcher.deep_copy(), self._ends, self._vocab_size)
        words = probe.mask([])
        if probe.error is not None or not words.any():
            problem = "allows no text at all" if probe.error is None else f"is too complex ({_brief(probe.error)})"
            raise InvalidRequestError(field, text, problem, remedy)
        return matcher

    def _ll_tokenizer(self) -> llguidance.LLTokenizer:
        import llguidance

        with self._making:
            if self._made is None:
                backend = self._tokenizer.backend_json
                if backend is None:
                    problem = "has no tokenizer.json, which structured output needs"
                    raise ConfigError(
                        "model.path", "the model", problem, "Convert its tokenizer, or ask for free text."
                    )
                self._made = llguidance.LLTokenizer(backend, n_vocab=self._vocab_size, eos_token=self._ends)
            return self._made


def _source(kind: str, text: str) -> str:
    """The grammar as llguidance reads it. Raises ValueError."""
    import llguidance

    matcher = llguidance.LLMatcher
    if kind in ("json_schema", "json_object"):
        schema = json.loads(text)
        if isinstance(schema, dict) and "x-guidance" in schema:
            raise ValueError("x-guidance is no keyword of JSON schemas")
        return matcher.grammar_from_json_schema(text, overrides=JSON_STYLE)
    if kind == "regex":
        return matcher.grammar_from_regex(text)
    if kind == "choice":
        return matcher.grammar_from_lark("start: " + " | ".join(json.dumps(option) for option in json.loads(text)))
    return matcher.grammar_from_lark(text)


def _brief(error: object) -> str:
    lines = str(error).strip().splitlines() or ["no reason given"]
    return lines[0][:200]
