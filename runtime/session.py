"""A conversation as its owner sees it: the turns share one cache slot, and nothing is computed twice."""

from __future__ import annotations

from dataclasses import dataclass

from runtime.request import StepOutput


@dataclass
class Session:
    """Handle of an open session; `Engine.make_request` makes the next turn of it."""

    session_id: str
    last_token: int | None = None
    """The newest token of the conversation's answers."""
    num_turns: int = 0
    """Turns that have ended."""

    def take(self, output: StepOutput) -> None:
        """To be called with every output of the session's turns."""
        if output.token_ids:
            self.last_token = output.token_ids[-1]
        self.num_turns += output.finish_reason is not None
