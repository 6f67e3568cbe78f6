"""What the server writes down: a line for each call, and neither prompts nor tokens, whatever fails."""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest

from cluster.client.client import Client
from cluster.serving import logs
from cluster.wire.statuses import CallError
from runtime.config import Config, ServerConfig
from runtime.errors import InvalidRequestError, WorkerError
from tests.cluster.serving.scripted_engine import ScriptedEngine
from tests.cluster.serving.serving import serving

pytestmark = [pytest.mark.system, pytest.mark.timeout(60)]

TOKEN, SECRET = "right-token-0123456789", "xyzzy"


@pytest.fixture
def written(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], str]]:
    """All that has been logged, as JSON lines."""
    root = logging.getLogger()
    before, level = root.handlers[:], root.level
    stream = io.StringIO()
    logs.configure(ServerConfig(log_format="json"), stream)
    for client in ("httpx", "httpcore"):  # which are in this process, too
        monkeypatch.setattr(logging.getLogger(client), "disabled", True)
    yield stream.getvalue
    root.handlers[:] = before
    root.setLevel(level)


@pytest.fixture
def engine() -> ScriptedEngine:
    return ScriptedEngine(Config.load(None, ["server.port=0", "server.model_name=letters"]))


def calls(text: str) -> list[dict[str, object]]:
    return [line for line in map(json.loads, text.splitlines()) if line["logger"] == "outrider.access"]


def test_every_call_has_a_line_with_ids_status_tokens_and_durations(
    engine: ScriptedEngine, written: Callable[[], str], tmp_path: Path
) -> None:
    (tmp_path / "tokens").write_text(f"ann {TOKEN}")
    with serving(engine, http=True, tokens_file=str(tmp_path / "tokens")) as server:
        with httpx.Client(base_url=server.url, headers={"authorization": f"Bearer {TOKEN}"}, trust_env=False) as http:
            answered = http.post("/v1/completions", json={"prompt": "A", "max_tokens": 3})
            refused = http.post("/v1/completions", json={"prompt": "A", "max_tokens": 0})
            http.get("/made/up/path")
            assert http.get("/live").status_code == 200  # again and again, by whoever has the page open: no line
        with Client(server.address, token=TOKEN) as client:
            client.complete("AB", sampling={"max_new_tokens": 4}, request_id="mine")
    first, second, third, last = calls(written())
    assert first["id"] == answered.headers["x-request-id"] and first["request_id"] == answered.json()["id"]
    assert (first["door"], first["method"], first["status"]) == ("http", "POST /v1/completions", "200")
    assert (first["prompt_tokens"], first["new_tokens"], first["caller"]) == (1, 3, "ann")
    assert 0 < first["ttft_s"] <= first["seconds"]
    assert (second["status"], second["id"]) == ("400", refused.headers["x-request-id"])
    assert third["method"] == "GET (other)" and third["status"] == "404"
    assert (last["door"], last["method"], last["status"], last["request_id"]) == ("grpc", "Generate", "OK", "mine")
    assert last["new_tokens"] == 4


def test_neither_prompts_nor_tokens_are_in_logs_or_errors(
    engine: ScriptedEngine, written: Callable[[], str], tmp_path: Path
) -> None:
    (tmp_path / "tokens").write_text(TOKEN)
    told: list[str] = []
    bodies: list[dict] = [
        {"prompt": SECRET, "max_tokens": 2},
        {"prompt": SECRET * 30},
        {"prompt": SECRET, "unknown": 1},
        {"prompt": [SECRET, 1]},
        {"messages": [{"role": "user", "content": SECRET}], "n": 0},
        {"messages": [{"role": "user", "content": [{"type": "image_url", "text": SECRET}]}]},
        {"messages": [{"role": SECRET, "content": SECRET}]},
        {"messages": SECRET},
        {"prompt": SECRET, "json_schema": {"type": SECRET}},
    ]
    with serving(engine, http=True, tokens_file=str(tmp_path / "tokens")) as server:
        with httpx.Client(base_url=server.url, trust_env=False) as http, Client(server.address, token=TOKEN) as client:
            for token in (TOKEN, TOKEN + "x"):
                for path in ("/v1/completions", "/v1/chat/completions", f"/{SECRET}", f"/v1/models?{SECRET}"):
                    for body in bodies:
                        told.append(http.post(path, json=body, headers={"authorization": f"Bearer {token}"}).text)
            told.append(
                http.post(
                    "/v1/completions",
                    content=f'{{"prompt": "{SECRET}',
                    headers={"authorization": f"Bearer {TOKEN}", "content-type": "application/json"},
                ).text
            )
            failures = [InvalidRequestError("prompt", SECRET, "is odd", "Mend it."), ValueError(SECRET)]
            for failure in failures:

                def broken(*_: object, failure: Exception = failure) -> None:
                    raise failure

                working, engine.make_request = engine.make_request, broken  # type: ignore[method-assign, assignment]
                told.append(
                    http.post(
                        "/v1/completions", json={"prompt": SECRET}, headers={"authorization": f"Bearer {TOKEN}"}
                    ).text
                )
                with pytest.raises(CallError) as error:
                    client.complete(SECRET)
                told.append(str(error.value))
                engine.make_request = working  # type: ignore[method-assign]
    everything = written()
    assert everything and len(told) > 60
    assert SECRET not in everything and TOKEN not in everything
    for text in told:
        assert TOKEN not in text
        # A name of a role, a path or a field is told back, prompts are not.
        if SECRET in text and '"choices"' not in text:
            assert "role" in text or f"/{SECRET}" in text or "messages = " in text, text


def test_prompts_are_logged_where_that_is_asked_for(engine: ScriptedEngine, written: Callable[[], str]) -> None:
    with serving(engine, http=True, log_prompts=True) as server, Client(server.address) as client:
        client.complete("A", sampling={"max_new_tokens": 3})
    (line,) = calls(written())
    assert (line["prompts"], line["answers"]) == (["A"], ["BCD"])


def test_text_lines_have_the_same_fields(engine: ScriptedEngine) -> None:
    record = logging.LogRecord("outrider.access", logging.INFO, "", 0, "call", (), None)
    record.fields = {"id": "1", "method": "POST /x", "seconds": 0.5}
    assert logs.TextFormatter().format(record).endswith('outrider.access INFO call id=1 method="POST /x" seconds=0.5')


def test_a_failing_engine_is_told_without_prompts(engine: ScriptedEngine, written: Callable[[], str]) -> None:
    with serving(engine, http=True) as server, httpx.Client(base_url=server.url, trust_env=False) as http:
        engine.error = WorkerError("rank 3 is gone")
        answer = http.post("/v1/completions", json={"prompt": SECRET, "max_tokens": 5})
        assert answer.status_code == 503 and answer.headers["retry-after"]
        assert http.get("/health").status_code == http.get("/ready").status_code == 503
    assert SECRET not in written()
