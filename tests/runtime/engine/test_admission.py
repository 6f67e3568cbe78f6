"""Ids are used once at a time, and there is room for so many."""

from __future__ import annotations

import pytest

from runtime.config import LookaheadConfig, SamplingParams, SchedulerConfig
from runtime.engine.admission import Admission
from runtime.errors import DuplicateRequestError, InvalidRequestError, ResourceExhaustedError
from runtime.request import Request


def request(name: str, session: str | None = None) -> Request:
    return Request(name, (1,), SamplingParams(), LookaheadConfig(), session)


def test_an_id_is_free_again_when_its_request_has_ended() -> None:
    admission = Admission(SchedulerConfig())
    admission.admit(request("a"))
    with pytest.raises(DuplicateRequestError, match="request_id = 'a'"):
        admission.admit(request("a"))
    admission.end("a")
    admission.end("never there")
    admission.admit(request("a"))


def test_as_many_requests_as_run_and_may_wait_and_no_more() -> None:
    admission = Admission(SchedulerConfig(max_sequences=1, max_waiting=1))
    admission.admit(request("a"))
    admission.admit(request("b"))
    with pytest.raises(ResourceExhaustedError, match="scheduler.max_waiting = 1"):
        admission.admit(request("c"))
    admission.end("a")
    admission.admit(request("c"))


def test_a_conversation_is_open_and_has_one_turn_at_a_time() -> None:
    admission = Admission(SchedulerConfig(max_sequences=4, max_sessions=1))
    with pytest.raises(InvalidRequestError, match="session_id = 's': is not open"):
        admission.admit(request("a", "s"))
    admission.open("s")
    with pytest.raises(DuplicateRequestError, match="session_id = 's'"):
        admission.open("s")
    with pytest.raises(ResourceExhaustedError, match="scheduler.max_sessions = 1"):
        admission.open("t")
    admission.admit(request("a", "s"))
    with pytest.raises(InvalidRequestError, match="has a turn that has not ended"):
        admission.admit(request("b", "s"))
    admission.end("a")
    admission.admit(request("b", "s"))
    admission.close("s")
    admission.open("t")
