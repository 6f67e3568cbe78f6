"""A conversation as its owner sees it: the turns share one cache slot, and nothing is computed twice."""

from __future__ import annotations

from dataclasses import dataclass

from runtime.request import Past, StepOutput


@dataclass
class Session:
    """Handle of an open session; `Engine.make_request` makes the next turn of it."""

    session_id: str
    last_token: int | None = None
    """The last token of the text, where that is an answer's; None after a prompt that was read in part."""
    num_turns: int = 0
    """Turns that have ended, and left something in the cache."""
    num_seen_tokens: int = 0

    @classmethod
    def with_past(cls, session_id: str, past: Past | None) -> Session:
        """One that is opened with this past, if it has one."""
        if past is None or not past.token_ids:
            return cls(session_id)
        last_token = past.token_ids[-1] if past.ends_in_answer else None
        return cls(session_id, last_token, num_turns=1, num_seen_tokens=past.num_cached)

    def take(self, output: StepOutput) -> None:
        """To be called with every output of the session's turns."""
        if output.token_ids:
            self.last_token = output.token_ids[-1]
        usage = output.usage
        if output.finish_reason is None or usage.num_seen_tokens == self.num_seen_tokens:
            return
        self.num_turns += 1
        self.num_seen_tokens = usage.num_seen_tokens
        if usage.num_new_tokens == 0:
            self.last_token = None
