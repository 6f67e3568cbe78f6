"""Calls that are broken off and resumed: the parts are the whole, tokens and text."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest

from cluster.client.client import Client
from cluster.pb.outrider.v1 import generation_pb2 as pb
from runtime.config import Config
from runtime.engine.engine import Engine
from tests.cluster.serving.serving import serving

pytestmark = [pytest.mark.system, pytest.mark.timeout(120)]

SAMPLING = {"max_new_tokens": 24, "temperature": 1.2, "seed": 3, "top_k": 80}


@pytest.fixture(scope="module")
def engine(tiny_model: Path) -> Iterator[Engine]:
    settings = [f"model.path={tiny_model}", "server.port=0", "scheduler.max_sequences=4", "model.device=cpu"]
    with Engine.from_config(Config.load(None, settings)) as engine:
        yield engine


@pytest.fixture(scope="module")
def client(engine: Engine) -> Iterator[Client]:
    with serving(engine) as server, Client(server.address) as client:
        yield client


def request(**fields) -> pb.GenerateRequest:
    return pb.GenerateRequest(text="Resume é", sampling=pb.SamplingParams(**SAMPLING, n=2), **fields)


def test_a_call_goes_on_from_what_the_client_has(client: Client) -> None:
    whole: dict[int, list[pb.GenerateResponse]] = {0: [], 1: []}
    for response in client._generation.Generate(request()):
        whole[response.index].append(response)
    for num_steps in (1, 5, 9):
        had = {index: responses[:num_steps] for index, responses in whole.items()}
        so_far = [
            pb.AnswerSoFar(
                token_ids=[token for response in responses for token in response.token_ids],
                index=index,
                has_ended=responses[-1].HasField("usage"),
            )
            for index, responses in had.items()
        ]
        for response in client._generation.Generate(request(resume_from=so_far)):
            had[response.index].append(response)
        for index, responses in whole.items():
            for field in ("token_ids", "text"):
                assert join(had[index], field) == join(responses, field)
            assert had[index][-1].usage.num_resumed_tokens == len(so_far[index].token_ids)


def join(responses: list[pb.GenerateResponse], field: str) -> list:
    return [item for response in responses for item in getattr(response, field)]


def test_what_was_never_said_is_refused(client: Client) -> None:
    call = client._generation.Generate(request(resume_from=[pb.AnswerSoFar(token_ids=[261], index=1)]))
    with pytest.raises(grpc.RpcError) as caught:
        next(call)
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert "resume_from" in caught.value.details() and "ends an answer" in caught.value.details()
