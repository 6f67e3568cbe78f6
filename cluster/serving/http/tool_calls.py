"""Calls of functions in answers: found in a growing text, in the markup that the model's template has for them."""

from __future__ import annotations

import json
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from runtime.engine.grammar import JSON_STYLE
from runtime.stops import StopStrings

Json = dict[str, Any]


@dataclass(frozen=True)
class CallForm:
    """How a model writes a call: `begin`, {"name": ..., `arguments`: {...}}, `end`."""

    begin: str
    end: str
    arguments: str = "arguments"
    is_listed: bool = False
    """The object stands in a list."""

    @staticmethod
    def of(template: str) -> CallForm | None:
        """That of a chat template; None: it is no JSON."""
        if "<function=" in template:
            return None
        if "<tool_call>" in template:  # Hermes, Qwen
            return CallForm("<tool_call>\n", "\n</tool_call>")
        if "[TOOL_CALLS]" in template:  # Mistral
            return CallForm("[TOOL_CALLS]", "", is_listed=True)
        return CallForm("", "", "parameters" if '"parameters": ' in template else "arguments")


@dataclass(frozen=True)
class Call:
    """A function, and what it is called with, as JSON."""

    name: str
    arguments: str


@dataclass(frozen=True)
class ToolUse:
    """What a conversation says of tools."""

    form: CallForm
    names: frozenset[str]
    bound: str | None = None
    """The function that must be called; "": one of them; None: the model chooses."""
    first_only: bool = False

    def reader(self) -> CallReader:
        """What finds the calls in one answer."""
        if self.bound is not None:
            return BoundReader(self)
        return MarkedReader(self) if self.form.begin.startswith("<") else BareReader(self)


class CallReader:
    """Splits a growing text into what is text and what are calls. A delta is text, or parts of calls."""

    def __init__(self, use: ToolUse) -> None:
        self._use = use
        self.num_calls = 0

    def push(self, text: str, is_last: bool) -> tuple[str, list[Json]]:
        """What the next piece adds: text, and OpenAI's deltas of calls."""
        raise NotImplementedError

    def _begun(self, name: str, arguments: str = "") -> Json:
        """The first delta of the next call."""
        self.num_calls += 1
        function = {"name": name, "arguments": arguments}
        call_id = secrets.token_hex(5)[:9]  # as long as Mistral's templates want them
        return {"index": self.num_calls - 1, "id": call_id, "type": "function", "function": function}

    def _more(self, arguments: str) -> list[Json]:
        """Of the newest call."""
        return [{"index": self.num_calls - 1, "function": {"arguments": arguments}}] if arguments else []

    def _read(self, text: str) -> list[Call]:
        """The calls that a text is; none where it is something else."""
        try:
            found = json.loads(text)
        except (ValueError, RecursionError):
            return []
        calls = [self._call(item) for item in (found if isinstance(found, list) else [found])]
        return [call for call in calls if call is not None] if all(calls) else []

    def _call(self, found: Any) -> Call | None:
        arguments = found.get("arguments", found.get("parameters", {})) if isinstance(found, dict) else None
        if not isinstance(arguments, dict) or found.get("name") not in self._use.names:
            return None
        return Call(found["name"], json.dumps(arguments, ensure_ascii=False))

    def _deltas(self, calls: Sequence[Call]) -> list[Json]:
        if self._use.first_only:
            calls = calls[: max(1 - self.num_calls, 0)]
        return [self._begun(call.name, call.arguments) for call in calls]


class MarkedReader(CallReader):
    """Calls between marks."""

    def __init__(self, use: ToolUse) -> None:
        super().__init__(use)
        self._begin, self._end = use.form.begin.strip(), use.form.end.strip()
        self._before = StopStrings([self._begin])
        self._inside: str | None = None
        """What has come behind the begin of a call."""

    def push(self, text: str, is_last: bool) -> tuple[str, list[Json]]:
        shown, deltas = "", []
        while True:
            if self._inside is None:
                found = self._before.find(text)
                if found is None:
                    shown += self._before.push(text)
                    break
                shown += self._before.cut(text, include=False)
                text = (self._before.flush() + text)[found[1] :]
                self._inside = ""
            self._inside += text
            inside, end, text = self._inside.partition(self._end)
            if not end and not is_last:
                break
            calls = self._read(inside)
            deltas += self._deltas(calls)
            shown += "" if calls else f"{self._begin}{inside}{end}"
            self._inside = None
            if not end:
                break
        if is_last:
            shown += self._before.flush()
        return ("" if self.num_calls and not shown.strip() else shown), deltas


class BareReader(CallReader):
    """An answer is calls from its beginning to its end, or none."""

    def __init__(self, use: ToolUse) -> None:
        super().__init__(use)
        self._held: str | None = ""

    def push(self, text: str, is_last: bool) -> tuple[str, list[Json]]:
        if self._held is None:
            return text, []
        self._held += text
        if self._held.lstrip()[:1] in ("", "{", "[") and not is_last:
            return "", []
        held, self._held = self._held, None
        calls = self._read(held)
        return ("", self._deltas(calls)) if calls else (held, [])


class BoundReader(CallReader):
    """An answer that is bound to be a call: its arguments, or the whole of it."""

    def __init__(self, use: ToolUse) -> None:
        super().__init__(use)
        self._held = ""

    def push(self, text: str, is_last: bool) -> tuple[str, list[Json]]:
        if self._use.bound:
            deltas = [] if self.num_calls else [self._begun(self._use.bound)]
            return "", deltas + self._more(text)
        self._held += text
        deltas = []
        if not self.num_calls:
            colon = JSON_STYLE["key_separator"]
            for name in self._use.names:
                head = f'{{"name"{colon}{json.dumps(name)}, "{self._use.form.arguments}"{colon}'
                if self._held.startswith(head):
                    deltas, self._held = [self._begun(name)], self._held[len(head) :]
                    break
        if self.num_calls:  # the last brace is the call's, not its arguments'
            keep = 0 if is_last and not self._held.endswith("}") else 1
            shown = self._held[: len(self._held) - keep]
            self._held = self._held[len(shown) :]
            deltas += self._more(shown)
        return "", deltas
