"""Answers that are broken off and go on: what a client has of them, the request for the rest, and how long to try."""

from __future__ import annotations

import random
import time
from dataclasses import dataclass, replace

import grpc

from cluster.pb.outrider.v1 import generation_pb2 as pb
from cluster.wire.answers import Chunk, read_chunk
from cluster.wire.statuses import CallError, has_no_room_now, is_away
from runtime.errors import ConfigError

FIRST_PAUSE_S = 0.1
LONGEST_PAUSE_S = 3.0
NO_LIMIT = 2**31
"""Retries, where time alone bounds them."""


@dataclass(frozen=True)
class Patience:
    """How long a client tries to go on with what was broken off. What comes of an answer begins both anew."""

    retries: int = 60
    """Most tries in a row; 0: none, the first break is an error."""
    seconds: float = 120.0
    """Longest time without a sign of the answer."""

    def __post_init__(self) -> None:
        if isinstance(self.retries, bool) or not isinstance(self.retries, int) or self.retries < 0:
            raise ConfigError("retries", self.retries, "is no number of tries", "Give a whole number from 0 on.")
        if isinstance(self.seconds, bool) or not isinstance(self.seconds, int | float) or not self.seconds >= 0:
            raise ConfigError("patience_s", self.seconds, "is no number of seconds", "Give one, 0 for no patience.")


class Retries:
    """The tries in a row, and the pauses between them: each twice as long as the one before, by chance up to a half
    shorter, so that the clients of a server that comes back do not come all at once."""

    def __init__(self, patience: Patience) -> None:
        self._patience = patience
        self.count = 0
        """Tries since the last sign of an answer."""
        self._heard_s = time.monotonic()

    def heard(self) -> None:
        """Something has come."""
        self.count, self._heard_s = 0, time.monotonic()

    def pause_after(self, error: CallError) -> float:
        """Seconds to wait before the next try. Raises the error where there is none, with what was tried."""
        pause = min(FIRST_PAUSE_S * 2**self.count, LONGEST_PAUSE_S) * random.uniform(0.5, 1.0)
        elapsed = time.monotonic() - self._heard_s
        if self.count >= self._patience.retries or elapsed + pause > self._patience.seconds:
            if self.count:
                tried = f"{error.details} (given up after {self.count} tries in {elapsed:.1f} s to go on)"
                raise CallError(error.address, error.code, tried) from error
            raise error
        self.count += 1
        return pause


class Resumption:
    """One request, what has come of its answers, and the request for the rest."""

    def __init__(self, request: pb.GenerateRequest, patience: Patience) -> None:
        self._first, self._retries = request, Retries(patience)
        self._so_far: dict[int, pb.AnswerSoFar] = {so_far.index: so_far for so_far in request.resume_from}
        self._key = request.resume_key
        self._started_s = self._call_s = time.monotonic()
        self._ttft_s: dict[int, float] = {}
        self._was_taken = self._has_resumed = False

    def request(self) -> pb.GenerateRequest:
        """What to send now: the request for what has not come yet."""
        self._call_s = time.monotonic()
        if not self._so_far and not self._has_resumed:
            return self._first
        request = pb.GenerateRequest()
        request.CopyFrom(self._first)
        del request.resume_from[:]
        request.resume_from.extend(self._so_far.values())
        if self._key:
            request.resume_key = self._key
        if request.HasField("deadline_s"):  # counts from the first call; none at all would be no number
            request.deadline_s = max(request.deadline_s - (self._call_s - self._started_s), 1e-6)
        return request

    def take(self, message: pb.GenerateResponse) -> Chunk:
        """The chunk of a response. Times count from the first call."""
        self._retries.heard()
        self._was_taken = True
        self._key = message.resume_key or self._key
        so_far = self._so_far.setdefault(message.index, pb.AnswerSoFar(index=message.index))
        so_far.token_ids.extend(message.token_ids)
        so_far.has_ended = message.HasField("usage")
        now = time.monotonic()
        self._ttft_s.setdefault(message.index, now - self._started_s)
        chunk = read_chunk(message, message.request_id)
        if chunk.usage is None or not self._has_resumed:
            return chunk
        before_s = self._call_s - self._started_s
        usage = replace(chunk.usage, ttft_s=self._ttft_s[message.index], latency_s=before_s + chunk.usage.latency_s)
        return replace(chunk, usage=usage)

    def is_whole_at(self, error: CallError) -> bool:
        """Whether nothing of the answers was missing any more when the call was broken off."""
        if self._has_resumed and error.details.startswith("resume_from.has_ended"):
            return True  # how many there are is the server's default
        sampling = self._first.sampling
        ended = sum(so_far.has_ended for so_far in self._so_far.values())
        return is_away(error) and sampling.HasField("n") and ended == sampling.n

    def pause_after(self, error: CallError, was_taken: bool) -> float:
        """Seconds to wait before the request for the rest is sent. Raises the error where it cannot be mended so.

        `was_taken`: the server had taken the call, or has answered another: before that, an address where nobody
        answers may be wrong.
        """
        self._was_taken |= was_taken
        is_in_use = (
            self._has_resumed and error.code is grpc.StatusCode.ALREADY_EXISTS
        )  # by the call that was broken off
        may = is_away(error) or self._has_resumed and has_no_room_now(error) or is_in_use
        if not may or not self._was_taken:
            raise error
        pause = self._retries.pause_after(error)
        self._has_resumed = True
        return pause

    @property
    def num_tries(self) -> int:
        """In a row, without a sign of the answer."""
        return self._retries.count
