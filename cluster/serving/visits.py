"""One call, whichever door it came through: who calls, what it has used, and how it ended."""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field

from cluster.serving.access import Caller
from cluster.serving.limits import Account
from cluster.serving.metrics import Metrics
from runtime.request import Request, StepOutput
from runtime.tokenizer import Tokenizer


@dataclass
class Visit:
    """Filled in on the way; whoever ends the call logs it (cluster.serving.logs)."""

    door: str
    """grpc or http."""
    method: str
    """The call's name, or the method and path; never what a client made up."""
    account: Account
    metrics: Metrics
    caller: Caller | None = None
    """None: nobody needs a token."""
    visit_id: str = field(default_factory=lambda: uuid.uuid4().hex)
    """Names the call in logs; over HTTP it is x-request-id."""
    request_id: str | None = None
    """What client and engine call it, where it has got so far."""
    status: str = ""
    """A gRPC status or an HTTP one."""
    _newest_s: dict[str, float] = field(default_factory=dict)
    """When each answer's newest tokens came."""
    began_s: float = field(default_factory=time.perf_counter)
    num_prompt_tokens: int = 0
    num_new_tokens: int = 0
    ttft_s: float | None = None
    """Arrival to first token."""
    prompts: list[str] = field(default_factory=list)
    texts: dict[int, list[str]] | None = None
    """Pieces of the answers, by index, and before them the prompts: where they are to be written down."""

    def admit(self, requests: Sequence[Request], tokenizer: Tokenizer) -> None:
        """Its requests have been taken in; those that answer the same prompt count it once."""
        prompts = {request.prompt_ids for request in requests}
        if self.texts is not None:
            self.prompts += [tokenizer.decode(ids) for ids in prompts]
        num_tokens = sum(map(len, prompts))
        self.num_prompt_tokens += num_tokens
        self.account.spend(num_tokens)
        self.metrics.admit(requests, num_tokens)

    def take(self, output: StepOutput, text: str) -> None:
        """A step has given it tokens, and this text became certain."""
        if self.texts is not None:
            self.texts.setdefault(output.index, []).append(text)
        self.num_new_tokens += len(output.token_ids)
        self.account.spend(len(output.token_ids))
        if self.ttft_s is None and output.token_ids:
            self.ttft_s = output.usage.ttft_s
        now_s = time.perf_counter()
        before_s = self._newest_s.get(output.request_id)
        self._newest_s[output.request_id] = now_s
        self.metrics.take(output, now_s - before_s if before_s is not None else None)

    @property
    def seconds(self) -> float:
        """Since it began."""
        return time.perf_counter() - self.began_s
