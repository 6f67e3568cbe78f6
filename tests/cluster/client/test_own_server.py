"""A server of our own is there while it is needed, says what it does, and leaves nothing behind."""

from __future__ import annotations

import pytest

from cluster.actors import processes
from cluster.client.client import Client
from cluster.client.own_server import own_server
from runtime.errors import WorkerError

pytestmark = [pytest.mark.system, pytest.mark.timeout(180)]


def test_it_answers_and_is_gone(tiny_model) -> None:
    settings = [f"model.path={tiny_model}", "model.device=cpu", "lookahead.enabled=false"]
    with own_server(settings) as (server, address):
        with Client(address) as client:
            answer = client.complete(token_ids=[1, 2, 3], sampling={"max_new_tokens": 4, "ignore_eos": True})
        family = [server, *server.children(recursive=True)]
        assert len(answer.token_ids) == 4
    assert not processes.alive(family)


def test_what_keeps_it_from_starting_is_said(capfd) -> None:
    with pytest.raises(WorkerError, match=r"exit code 2.*\n.*model.path"), own_server(["model.path=/nowhere.gguf"]):
        pass
    assert "model.path" in capfd.readouterr().err
