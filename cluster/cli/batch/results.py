"""The lines of the output, and what a batch comes to."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from cluster.cli.terminal import counted
from cluster.wire.answers import Chunk, by_index
from runtime.errors import OutriderError
from runtime.request import TokenLogprobs

MAX_ERROR_LENGTH = 2000


class IncompleteError(OutriderError):
    """An answer has ended without its last chunk."""


@dataclass
class Totals:
    """What a batch has come to."""

    num_records: int = 0
    """Lines of the output that stand for a record of the input: answers, errors, and those of an earlier run."""
    num_errors: int = 0
    num_skipped: int = 0
    """Answered by an earlier run."""
    num_retries: int = 0
    """How often a request was made again."""
    num_tokens: int = 0
    num_steps: int = 0
    seconds: float = 0.0
    first_error: str = ""

    def as_dict(self) -> dict[str, float]:
        return {
            "num_records": self.num_records,
            "num_errors": self.num_errors,
            "num_skipped": self.num_skipped,
            "num_retries": self.num_retries,
            "num_new_tokens": self.num_tokens,
            "tokens_per_step": self.num_tokens / self.num_steps if self.num_steps else 0.0,
            "tokens_per_s": self.num_tokens / self.seconds if self.seconds else 0.0,
            "seconds": self.seconds,
        }

    def summary(self) -> str:
        """One line of figures."""
        skipped = f", {self.num_skipped} of an earlier run" if self.num_skipped else ""
        records, errors = counted(self.num_records, "record"), counted(self.num_errors, "error")
        figures = self.as_dict()
        return (
            f"{records} ({errors}{skipped}), {counted(self.num_tokens, 'token')} in {self.seconds:.1f} s: "
            f"{figures['tokens_per_s']:.1f} tokens/s, {figures['tokens_per_step']:.2f} tokens per step"
        )


def answer(chunks: Sequence[Chunk]) -> dict[str, Any]:
    """A whole stream as the fields of an output record: those of its answer, or of several a list, `choices`, and their
    sums. Raises IncompleteError if it is not whole."""
    choices = [_choice(part) for part in by_index(chunks)]
    if not choices:
        raise IncompleteError("the stream ended before the answer did")
    if len(choices) == 1:
        return choices[0]
    num_new, num_steps = (sum(choice[name] for choice in choices) for name in ("num_new_tokens", "num_steps"))
    return {
        "choices": choices,
        "num_prompt_tokens": choices[0]["num_prompt_tokens"],
        "num_new_tokens": num_new,
        "num_steps": num_steps,
    }


def _choice(chunks: Sequence[Chunk]) -> dict[str, Any]:
    last = chunks[-1]
    if last.finish_reason is None or last.usage is None:
        raise IncompleteError("the stream ended before the answer did")
    usage = last.usage
    logprobs = [one for chunk in chunks for one in chunk.logprobs]
    of_prompt = [one for chunk in chunks for one in chunk.prompt_logprobs]
    return {
        "text": "".join(chunk.text for chunk in chunks),
        "token_ids": [token for chunk in chunks for token in chunk.token_ids],
        "finish_reason": last.finish_reason.value,
        **({"logprobs": [_logprobs(one) for one in logprobs]} if logprobs else {}),
        **({"prompt_logprobs": [one and _logprobs(one) for one in of_prompt]} if of_prompt else {}),
        "num_prompt_tokens": usage.num_prompt_tokens,
        **({"num_reused_tokens": usage.num_reused_tokens} if usage.num_reused_tokens else {}),
        "num_new_tokens": usage.num_new_tokens,
        "num_steps": usage.num_steps,
        "tokens_per_step": usage.tokens_per_step,
        "rows_per_step": usage.rows_per_step,
        "ttft_s": usage.ttft_s,
        "latency_s": usage.latency_s,
        "num_seen_tokens": usage.num_seen_tokens,
        "kept_last": usage.kept_last,
        "kept_sum": usage.kept_sum,
    }


def _logprobs(one: TokenLogprobs) -> dict[str, Any]:
    top = [{"token_id": token_id, "logprob": logprob} for token_id, logprob in one.top]
    return {"logprob": one.logprob, **({"top": top} if top else {})}


def error_line(record_id: str | int, text: str) -> dict[str, Any]:
    return {"id": record_id, "error": text if len(text) <= MAX_ERROR_LENGTH else text[: MAX_ERROR_LENGTH - 3] + "..."}


def encoded(result: dict[str, Any]) -> bytes:
    """A line of JSON that every reader takes: no NaN, no half of a surrogate pair."""
    finite = {
        key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in result.items()
    }
    return (json.dumps(finite, ensure_ascii=False, allow_nan=False) + "\n").encode("utf-8", "replace")
