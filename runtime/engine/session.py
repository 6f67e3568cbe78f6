"""A conversation as its owner sees it: the turns share one cache slot, and nothing is computed twice."""

from __future__ import annotations

from dataclasses import dataclass

from runtime.request import StepOutput


@dataclass
class Session:
    """Handle of an open session; `Engine.make_request` makes the next turn of it."""

    session_id: str
    last_token: int | None = None
    """The last token of the text, where that is an answer's; None after a prompt that was read in part."""
    num_turns: int = 0
    """Turns that have ended, and left something in the cache."""
    num_seen_tokens: int = 0

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
