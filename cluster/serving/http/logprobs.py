"""Log-probabilities in OpenAI's two forms: that of chats, and the older one of completions."""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from typing import Any

from runtime.request import TokenLogprobs
from runtime.tokenizer import Tokenizer


def text_of(tokenizer: Tokenizer, token_id: int) -> str:
    """A token's text; bytes that are no character by themselves as \\xNN."""
    return tokenizer.token_bytes(token_id).decode("utf-8", "backslashreplace")


def of_chat(
    tokenizer: Tokenizer, token_ids: Sequence[int], found: Sequence[TokenLogprobs | None]
) -> list[dict[str, Any] | None]:
    """Each token's as chats have it; None where there is none, at a text's beginning."""
    return [
        None
        if each is None
        else _token(tokenizer, token_id, each.logprob)
        | {"top_logprobs": [_token(tokenizer, likely, logprob) for likely, logprob in each.top]}
        for token_id, each in zip(token_ids, found, strict=True)
    ]


def _token(tokenizer: Tokenizer, token_id: int, logprob: float) -> dict[str, Any]:
    content = tokenizer.token_bytes(token_id)
    return {
        "token": content.decode("utf-8", "backslashreplace"),
        "logprob": _finite(logprob),
        "bytes": list(content),
    }


def _finite(logprob: float) -> float:
    """JSON has no infinity; this is what OpenAI writes for a token that cannot come."""
    return max(logprob, -9999.0)


class OlderForm:
    """As completions have them: lists side by side, with each token's place in the text."""

    def __init__(self, tokenizer: Tokenizer, offset: int = 0) -> None:
        """`offset`: characters before the first token."""
        self._tokenizer, self._offset = tokenizer, offset
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token_ids: Sequence[int], found: Sequence[TokenLogprobs | None]) -> dict[str, list[Any]]:
        """The next tokens'."""
        lists: dict[str, list[Any]] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
        for token_id, each in zip(token_ids, found, strict=True):
            lists["tokens"].append(text_of(self._tokenizer, token_id))
            lists["token_logprobs"].append(None if each is None else _finite(each.logprob))
            top = {} if each is None else {text_of(self._tokenizer, one): _finite(value) for one, value in each.top}
            lists["top_logprobs"].append(None if each is None else top)
            lists["text_offset"].append(self._offset)
            if self._tokenizer.shows(token_id):
                self._offset += len(self._decoder.decode(self._tokenizer.token_bytes(token_id)))
        return lists
