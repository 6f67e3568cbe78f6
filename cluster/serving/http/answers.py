"""From steps' outputs to what clients read: choices piece by piece, whole answers, usage."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from cluster.serving.http.logprobs import OlderForm, of_chat
from cluster.serving.http.reading import Asked
from cluster.serving.http.replies import dump
from cluster.wire.answers import num_accepted
from runtime.request import StepOutput, Usage
from runtime.tokenizer import Tokenizer

Json = dict[str, Any]
DONE = b"data: [DONE]\n\n"


@dataclass(frozen=True)
class Piece:
    """What a step adds to a choice."""

    index: int
    content: Json
    """What a delta has: content, tool_calls; of a completion: text."""
    logprobs: Any
    """The tokens', in the call's form; None: not asked for."""
    finish_reason: str | None
    outrider: Json
    """Ours: tokens of the step, and at a choice's end the usage."""


class Choice:
    """One answer that grows."""

    def __init__(self, asked: Asked, index: int, tokenizer: Tokenizer) -> None:
        self._asked, self._index, self._tokenizer = asked, index, tokenizer
        self._request = asked.requests[index]
        self._echo = asked.echoes[index] if asked.echoes else ""
        self._older = OlderForm(tokenizer)
        self._calls = asked.tools.reader() if asked.tools is not None else None
        self._is_first = True

    def push(self, output: StepOutput, text: str) -> Piece:
        """The next step, and the text that became certain with it."""
        content: Json = {"content": text} if self._asked.is_chat else {"text": self._echo + text}
        reason = str(output.finish_reason) if output.finish_reason is not None else None
        if self._calls is not None:
            shown, deltas = self._calls.push(text, reason is not None)
            content = {"content": shown} | ({"tool_calls": deltas} if deltas else {})
            reason = "tool_calls" if reason == "stop" and self._calls.num_calls else reason
        if self._is_first and self._asked.is_chat:
            content = {"role": "assistant", **content}
        piece = Piece(self._index, content, self._logprobs(output), reason, self._ours(output))
        self._echo, self._is_first = "", False
        return piece

    def _logprobs(self, output: StepOutput) -> Any:
        if self._asked.logprobs is None:
            return None
        ids, found = list(output.text_ids), list(output.logprobs[: len(output.text_ids)])
        if self._asked.is_chat:
            return {"content": of_chat(self._tokenizer, ids, found)}
        if self._asked.echoes and self._is_first:
            return self._older.push([*self._request.prompt_ids, *ids], [*output.prompt_logprobs, *found])
        return self._older.push(ids, found)

    def _ours(self, output: StepOutput) -> Json:
        ours: Json = {"num_tokens": len(output.token_ids), "num_accepted": num_accepted(output)}
        if output.sources:
            ours["sources"] = [names[0] if names else None for names in output.sources]
        if self._asked.return_token_ids:
            ours["token_ids"] = output.token_ids
            if self._is_first:
                ours["prompt_token_ids"] = self._request.prompt_ids
        if output.prompt_logprobs and not self._asked.echoes:
            found = of_chat(self._tokenizer, self._request.prompt_ids, output.prompt_logprobs)
            ours["prompt_logprobs"] = found
        if output.finish_reason is not None:
            ours["usage"] = usage_of(output.usage)
        return ours


def _message(run: Sequence[Piece]) -> Json:
    """What an assistant has said in all."""
    text = "".join(each.content["content"] for each in run)
    calls: list[Json] = []
    for delta in (one for each in run for one in each.content.get("tool_calls", ())):
        if delta["index"] == len(calls):
            calls.append({"id": delta["id"], "type": "function", "function": dict(delta["function"])})
        else:
            calls[delta["index"]]["function"]["arguments"] += delta["function"]["arguments"]
    message: Json = {"role": "assistant", "content": text or None if calls else text, "refusal": None}
    return message | ({"tool_calls": calls} if calls else {})


def usage_of(usage: Usage) -> Json:
    """Ours, whole."""
    derived = {"tokens_per_step": usage.tokens_per_step, "rows_per_step": usage.rows_per_step}
    return asdict(usage) | derived


class Envelope:
    """What is around the choices of an answer."""

    def __init__(self, asked: Asked, model: str) -> None:
        self._asked = asked
        kind = "chat.completion" if asked.is_chat else "text_completion"
        self._whole = {"id": asked.answer_id, "object": kind, "created": asked.created, "model": model}
        self._chunk = self._whole | {"object": f"{kind}.chunk" if asked.is_chat else kind}
        self._usages: dict[int, Usage] = {}

    def event(self, piece: Piece) -> bytes:
        """A server-sent event with a piece."""
        shown: Json = {"index": piece.index, "logprobs": piece.logprobs, "finish_reason": piece.finish_reason}
        shown |= {"delta": piece.content} if self._asked.is_chat else piece.content
        chunk = {**self._chunk, "choices": [shown], "outrider": piece.outrider}
        if self._asked.running_usage:
            chunk["usage"] = self.usage
        elif self._asked.include_usage:
            chunk["usage"] = None
        return event(chunk)

    def last_events(self) -> bytes:
        """What a stream ends with."""
        if not self._asked.include_usage:
            return DONE
        return event({**self._chunk, "choices": [], "usage": self.usage}) + DONE

    def whole(self, pieces: Iterable[Piece]) -> bytes:
        """An answer that does not stream."""
        runs: list[list[Piece]] = [[] for _ in self._asked.requests]
        for piece in pieces:
            runs[piece.index].append(piece)
        choices = [self._joined(run) for run in runs]
        return dump({**self._whole, "choices": choices, "usage": self.usage})

    def _joined(self, run: Sequence[Piece]) -> Json:
        logprobs = None
        if run[0].logprobs is not None:
            logprobs = {key: [one for each in run for one in each.logprobs[key]] for key in run[0].logprobs}
        lengths = [each.outrider["num_tokens"] for each in run if each.outrider["num_tokens"]]
        ours = run[0].outrider | run[-1].outrider
        ours = {key: value for key, value in ours.items() if key not in ("num_tokens", "num_accepted", "sources")}
        ours |= {"run_lengths": lengths}
        if self._asked.return_token_ids:
            ours["token_ids"] = [one for each in run for one in each.outrider["token_ids"]]
        choice: Json = {"index": run[0].index, "logprobs": logprobs, "finish_reason": run[-1].finish_reason}
        if self._asked.is_chat:
            return choice | {"message": _message(run), "outrider": ours}
        return choice | {"text": "".join(each.content["text"] for each in run), "outrider": ours}

    def count(self, output: StepOutput, index: int) -> None:
        """Take note of what a choice has cost so far."""
        self._usages[index] = output.usage

    @property
    def usage(self) -> Json:
        """OpenAI's, of all choices."""
        num_prompt = self._asked.num_prompt_tokens
        num_new = sum(usage.num_new_tokens for usage in self._usages.values())
        return {
            "prompt_tokens": num_prompt,
            "completion_tokens": num_new,
            "total_tokens": num_prompt + num_new,
            "prompt_tokens_details": {"cached_tokens": self._cached},
        }

    @property
    def _cached(self) -> int:
        """Of the prompts, what was in the cache before the call; further answers share what the first has read."""
        firsts = self._asked.firsts
        return sum(usage.num_reused_tokens for index, usage in self._usages.items() if index in firsts)


def event(chunk: Json) -> bytes:
    """A server-sent event."""
    return b"data: %b\n\n" % dump(chunk)
