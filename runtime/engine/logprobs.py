"""Log-probabilities as a step's rows give them, and those of prompts, which come in parts."""

from __future__ import annotations

import math

import numpy as np

from runtime.request import TokenLogprobs
from runtime.step import Int32


def read(words: Int32, count: int) -> TokenLogprobs:
    """What one row gave [1 + 2 k] (StepPlan.result_width), with so many of the likeliest tokens."""
    logprob, likeliest = words[:1].view(np.float32)[0], words[1:].reshape(-1, 2)[:count]
    pairs = zip(likeliest[:, 0].tolist(), np.ascontiguousarray(likeliest[:, 1]).view(np.float32).tolist(), strict=True)
    return TokenLogprobs(float(logprob), tuple((token, value) for token, value in pairs if value > -math.inf))


class PromptLogprobs:
    """Those of the prompts that are being read, by request."""

    def __init__(self) -> None:
        self._found: dict[str, list[TokenLogprobs]] = {}

    def add(self, request_id: str, words: Int32, count: int) -> None:
        """Rows that scored a prompt [n, 1 + 2 k], in the order of the text."""
        self._found.setdefault(request_id, []).extend(read(row, count) for row in np.ascontiguousarray(words))

    def take(self, request_id: str, num_tokens: int) -> tuple[TokenLogprobs | None, ...]:
        """All of a prompt of so many tokens: None for the first, where nothing stands before it."""
        found = self._found.pop(request_id, [])
        return (*[None] * (num_tokens - len(found)), *found)

    def drop(self, request_id: str) -> None:
        """The request is over."""
        self._found.pop(request_id, None)
