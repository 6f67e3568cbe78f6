"""What people hand to a client is sent as it is meant, or refused in words before it is sent."""

from __future__ import annotations

import math
from typing import Any

import grpc
import pytest

from cluster.client.client import Client
from cluster.pb.outrider.v1 import generation_pb2 as pb
from cluster.wire.requests import prompted
from cluster.wire.statuses import CallError
from runtime import ConfigError, InvalidRequestError, LookaheadConfig, SamplingParams

REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"messages": [{"role": "user", "content": None}]}, "messages[0].content"),
    ({"messages": [{"role": "user"}]}, "messages[0].content"),
    ({"messages": ["x"]}, "messages[0]"),
    ({"prompt": "A", "sampling": [1]}, "sampling"),
    ({"prompt": "A", "sampling": "x"}, "sampling"),
    ({"prompt": "A", "lookahead": True}, "lookahead"),
    ({"prompt": "A", "lookahead": {"sources": "suffix"}}, "lookahead.sources"),
    ({"prompt": "A", "sampling": {"temperature": None}}, "sampling.temperature"),
    ({"prompt": "A", "sampling": {"temperature": True}}, "sampling.temperature"),
    ({"prompt": "A", "sampling": {"temperature": "0.5"}}, "sampling.temperature"),
    ({"prompt": "A", "sampling": {"max_new_tokens": 3.5}}, "sampling.max_new_tokens"),
    ({"prompt": "A", "request_id": 5}, "request_id"),
    ({"prompt": "A", "request_id": "\ud83d"}, "request_id"),
    ({"prompt": "A", "timeout_s": "5"}, "timeout_s"),
    ({"prompt": "A", "timeout_s": -1}, "timeout_s"),
    ({"prompt": "A", "timeout_s": math.nan}, "timeout_s"),
]


@pytest.mark.parametrize(("arguments", "field"), REFUSED, ids=lambda value: str(value)[:60])
def test_what_cannot_be_meant_is_refused_by_name(arguments: dict[str, Any], field: str) -> None:
    with Client("localhost:1") as client, pytest.raises(InvalidRequestError) as caught:
        client.generate(**arguments)
    assert caught.value.field == field and caught.value.remedy


def test_parameters_may_be_those_of_the_engine() -> None:
    sampling, lookahead = SamplingParams(max_new_tokens=2, temperature=0.0), LookaheadConfig(enabled=False)
    request = prompted(pb.GenerateRequest, "A", None, None, sampling, lookahead)  # type: ignore[arg-type]
    assert request.sampling == pb.SamplingParams(max_new_tokens=2, temperature=0.0)
    assert request.lookahead == pb.LookaheadParams(enabled=False)
    assert prompted(pb.GenerateRequest, "A", None, None, {"top_k": 3.0}, None).sampling.top_k == 3


def test_a_closed_client_says_so() -> None:
    client = Client("localhost:1")
    client.close()
    client.close()
    for use in (lambda: client.generate("A", timeout_s=math.inf), client.converse, client.server_info):
        with pytest.raises(CallError, match="the client is closed") as caught:
            use()
        assert caught.value.code is grpc.StatusCode.CANCELLED


@pytest.mark.parametrize("address", [None, 50051, b"localhost:50051"])
def test_an_address_that_is_no_text_is_refused(address: Any) -> None:
    with pytest.raises(ConfigError, match="^address = .* no text"):
        Client(address)
