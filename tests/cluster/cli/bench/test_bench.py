"""`outrider bench` against servers whose answers are known: a scripted gRPC server, and one that speaks OpenAI's HTTP
as other projects do, well or badly."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from cluster.cli import commands as cli
from cluster.cli.batch.records import Record
from cluster.cli.bench import Job, asking, load, read_paces, run
from cluster.cli.bench.load import Pace
from cluster.cli.bench.targets import Piece
from runtime.config import Config
from runtime.errors import ConfigError, InvalidRequestError, WorkerError
from tests.cluster.serving.scripted_engine import ScriptedEngine
from tests.cluster.serving.serving import serving

pytestmark = [pytest.mark.system, pytest.mark.timeout(60)]


# gRPC


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    settings = ["server.port=0", "scheduler.max_sequences=8", "scheduler.max_waiting=0"]
    engine = ScriptedEngine(Config.load(None, settings), step_s=0.002)
    engine.capacity = 10**6
    with serving(engine) as server:
        yield server.address


@pytest.fixture
def outrider(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    def call(*arguments: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as ended:
            cli.main(list(arguments))
        captured = capsys.readouterr()
        return int(ended.value.code or 0), captured.out, captured.err

    return call


def test_a_sweep_over_grpc(address: str, outrider: Callable[..., tuple[int, str, str]], tmp_path: Path) -> None:
    options = ("--num-requests", "6", "--max-new-tokens", "12", "--prompt-tokens", "200:300", "--goodput", "e2el:60000")
    command = ("bench", "--url", address, "--concurrency", "1,3", *options, "--json", "--plot", str(tmp_path / "a.png"))
    code, out, _ = outrider(*command)
    assert code == 0
    first, second = json.loads(out)["loads"]
    for load_, streams in ((first, 1), (second, 3)):
        assert (load_["num_answered"], load_["errors"], load_["num_new_tokens"]) == (6, {}, 72)
        assert load_["tokens_per_chunk"] == 2.0 and load_["pace"] == streams  # runs of 1, 2, 3, 1, 2, 3
        assert load_["num_good"] == 6
        # Words are not cut to length, and a letter is a token here.
        assert 190 <= load_["num_prompt_tokens"] / 6 <= 310
        assert 0 < load_["itl_ms"]["median"] <= load_["e2el_ms"]["median"]
    assert (tmp_path / "a.png").stat().st_size > 10_000


def test_a_table_for_people(address: str, outrider: Callable[..., tuple[int, str, str]]) -> None:
    code, out, _ = outrider("bench", "--url", address, "--request-rate", "200", "--num-requests", "5", "--raw")
    assert code == 0
    for words in ("200 requests/s", "5 of 5", "TTFT ms", "TPOT ms", "ITL ms", "E2EL ms", "tokens per chunk"):
        assert words in out


def test_records_of_a_file_keep_their_own_parameters(address: str, tmp_path: Path) -> None:
    lines = [
        {"prompt": "A", "max_new_tokens": 3},
        {"messages": [{"role": "user", "content": "B"}]},
        {"token_ids": [70]},
    ]
    source = tmp_path / "in.jsonl"
    source.write_text("\n".join(map(json.dumps, lines)))
    (figures,) = run(Job(address, source, [Pace(concurrency=2)], {"max_new_tokens": 6}, {}))
    assert figures.num_answered == 3 and figures.num_new_tokens == 3 + 6 + 6
    (figures,) = run(Job(address, source, [Pace(concurrency=2)], {"max_new_tokens": 6}, {}, num_requests=7))
    assert figures.num_requests == 7


def test_errors_are_counted_by_kind_and_the_exit_code_says_so(
    address: str, outrider: Callable[..., tuple[int, str, str]]
) -> None:
    # 8 slots, and nobody may wait: of twenty at once some are refused.
    many = ("--max-new-tokens", "60", "--num-requests", "20")
    code, out, err = outrider("bench", "--url", address, "--concurrency", "20", *many, "--json")
    (figures,) = json.loads(out)["loads"]
    assert code == 1 and figures["errors"]["RESOURCE_EXHAUSTED"] == 20 - figures["num_answered"] > 0
    assert "scheduler.max_waiting" in err
    code, out, _ = outrider(
        *("bench", "--url", address, "--max-new-tokens", "2000", "--timeout", "0.2", "--num-requests", "2"),
        *("--json", "--warm-up", "0"),
    )
    assert code == 1 and json.loads(out)["loads"][0]["errors"] == {"timeout": 2}


def test_what_cannot_be_asked_is_refused_before_anything_is(
    outrider: Callable[..., tuple[int, str, str]], tmp_path: Path
) -> None:
    source = tmp_path / "in.jsonl"
    source.write_text('{"prompt": "A"}\n{"text": "B"}\n')
    base = ("bench", "--url", "localhost:1")
    for options, words in [
        (("--concurrency", "0"), "--concurrency"),
        (("--goodput", "itl:3"), "--goodput"),
        (("--prompt-tokens", "many"), "--prompt-tokens"),
        (("--plot", str(tmp_path / "a.txt")), "--plot"),
        (("--plot", str(tmp_path / "no" / "a.png")), "--plot"),
        (("--model", "m"), "--model"),
        ((str(source),), "record 2"),
        ((str(tmp_path / "none"),), "IN"),
    ]:
        code, out, err = outrider(*base, *options)
        assert (code, out) == (2, "") and words in err, err
    code, out, err = outrider("bench", "--url", "nowhere")
    assert code == 2 and "has no port" in err
    code, out, err = outrider(*base, "--warm-up", "0")
    assert code == 1 and "localhost:1 does not answer (UNAVAILABLE)" in err


def test_more_than_one_answer_is_refused(address: str) -> None:
    with pytest.raises(InvalidRequestError, match=r"^sampling\.n"):
        run(Job(address, None, read_paces("1", None), {"n": 2}, {}))


# HTTP, as other servers speak it


class Scripted:
    """An HTTP server that answers by a script: (seconds to wait, what to send) for each part of a response."""

    def __init__(self, script: list[tuple[float, bytes]], status: str = "200 OK") -> None:
        self.script, self.status = script, status
        self.bodies: list[Any] = []
        self.most = self._live = 0

    async def handle(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while head := await reader.readuntil(b"\r\n\r\n"):
                length = next(
                    (int(line[15:]) for line in head.lower().split(b"\r\n") if line[:15] == b"content-length:"), 0
                )
                body = await reader.readexactly(length)
                if head.startswith(b"GET /v1/models"):
                    content = b'{"data": [{"id": "m"}]}'
                    writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%b" % (len(content), content))
                    continue
                self.bodies.append((head.split()[1].decode(), head, json.loads(body)))
                self._live += 1
                self.most = max(self.most, self._live)
                writer.write(b"HTTP/1.1 %b\r\nTransfer-Encoding: chunked\r\n\r\n" % self.status.encode())
                for wait_s, part in self.script:
                    await asyncio.sleep(wait_s)
                    writer.write(b"%x\r\n%b\r\n" % (len(part), part) if part != b"CUT" else b"")
                    await writer.drain()
                self._live -= 1
                if self.script and self.script[-1][1] == b"CUT":
                    return
                writer.write(b"0\r\n\r\n")
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()

    def __enter__(self) -> str:
        self._events = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._events.run_forever)
        self._thread.start()
        start = asyncio.start_server(self.handle, "127.0.0.1", 0)
        self._server = asyncio.run_coroutine_threadsafe(start, self._events).result(10)
        return f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"

    def __exit__(self, *_: object) -> None:
        asyncio.run_coroutine_threadsafe(self._end(), self._events).result(10)
        self._events.call_soon_threadsafe(self._events.stop)
        self._thread.join(10)
        self._events.close()

    async def _end(self) -> None:
        self._server.close()
        calls = asyncio.all_tasks() - {asyncio.current_task()}
        for call in calls:
            call.cancel()
        await asyncio.gather(*calls, return_exceptions=True)


def sse(chunk: Any) -> bytes:
    return f"data: {json.dumps(chunk)}\n\n".encode()


def chunk(text: str, reason: str | None = None, **others: Any) -> bytes:
    return sse({"choices": [{"index": 0, "text": text, "finish_reason": reason}], "usage": None, **others})


USAGE = sse({"choices": [], "usage": {"prompt_tokens": 11, "completion_tokens": 6}})
DONE = b"data: [DONE]\n\n"
ANSWER = [(0.1, chunk("a")), (0.05, chunk("b")), (0.05, chunk("", "length")), (0.3, USAGE + DONE)]


def ask(url: str, record: Record | None = None, **others: Any) -> Any:
    """The figures of two requests, one after the other."""
    source = others.pop("source", None)
    assert source is None or record is None
    job = Job(url, source, others.pop("paces", [Pace(concurrency=1)]), {"max_new_tokens": 6}, {}, 2, **others)
    return run(job)[0]


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    source = tmp_path / "in.jsonl"
    source.write_text('{"prompt": "A", "temperature": 0.5, "logit_bias": {"5": 1.0}}\n')
    return source


def test_a_server_that_does_not_say_how_many_tokens_a_chunk_has(prompts: Path) -> None:
    with Scripted(ANSWER) as url:
        figures = ask(url, source=prompts)
    assert (figures.num_answered, figures.num_new_tokens, figures.num_prompt_tokens) == (2, 12, 22)
    assert figures.tokens_per_chunk == 3.0  # 6 tokens in 2 chunks with text
    # The end is the finish reason's chunk, not what comes behind it.
    assert 100 <= figures.ttft.median < 150 and 200 <= figures.e2el.median < 280
    assert figures.tpot.median == pytest.approx((figures.e2el.median - figures.ttft.median) / 5, rel=0.1)
    assert 50 <= figures.itl.median < 90


def test_the_body_has_openais_names(prompts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OUTRIDER_TOKEN", "secret-token")
    server = Scripted(ANSWER)
    with server as url:
        ask(url + "/v1/", source=prompts)
        path, head, body = server.bodies[0]
        assert path == "/v1/completions" and b"authorization: bearer secret-token" in head.lower()
        assert body == {
            "model": "m",
            "prompt": "A",
            "stream": True,
            "stream_options": {"include_usage": True},
            "max_tokens": 6,
            "temperature": 0.5,
            "logit_bias": {"5": 1.0},
        }
        prompts.write_text('{"messages": [{"role": "user", "content": "Hi"}], "logprobs": 3}\n')
        ask(url, source=prompts, model="mine")
        path, _, body = server.bodies[-1]
        assert path == "/v1/chat/completions" and body["model"] == "mine"
        assert (body["logprobs"], body["top_logprobs"]) == (True, 3)


def test_chunks_that_say_their_tokens_are_believed(prompts: Path) -> None:
    parts = [chunk("a", outrider={"num_tokens": 4}), chunk("", outrider={"num_tokens": 2}), chunk("", "stop")]
    with Scripted([(0.01, part) for part in parts] + [(0.0, DONE)]) as url:
        figures = ask(url, source=prompts)
    assert figures.num_new_tokens == 12 and figures.tokens_per_chunk == 3.0  # text that lags behind its tokens


@pytest.mark.parametrize(
    ("script", "status", "kind"),
    [
        ([(0.0, b'{"error": {"message": "no room"}}')], "429 Too Many Requests", "HTTP 429"),
        ([(0.0, chunk("a"))], "200 OK", "cut off"),
        ([(0.0, chunk("a")), (0.0, b"CUT")], "200 OK", "connection lost"),
        ([(0.0, chunk("a")), (0.0, sse({"error": {"message": "bad"}}))], "200 OK", "error in the stream"),
        ([(0.0, b"data: {no\n\n")], "200 OK", "malformed"),
        ([(0.0, chunk("", "stop") + DONE)], "200 OK", "no tokens"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_a_server_does_wrong_is_an_error_of_its_kind(
    script: list[tuple[float, bytes]], status: str, kind: str, prompts: Path
) -> None:
    with Scripted(script, status) as url:
        figures = ask(url, source=prompts, num_warm_up=0)
        with pytest.raises(WorkerError, match=kind):
            ask(url, source=prompts)  # its first request has no answer
    assert figures.errors == {kind: 2} and figures.num_answered == 0 and figures.first_error


def test_nobody_there(prompts: Path) -> None:
    figures = ask("http://127.0.0.1:1", source=prompts, num_warm_up=0)
    assert figures.errors == {"no connection": 2}
    with pytest.raises(ConfigError, match="^--url"):
        ask("http://[::1", source=prompts)


def test_a_token_goes_to_no_other_machine_in_the_clear(prompts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "secret-token")
    with pytest.raises(ConfigError, match="without TLS") as caught:
        ask("http://192.0.2.1:8000", source=prompts)
    assert "secret-token" not in str(caught.value)


def test_a_server_that_counts_no_tokens_cannot_be_given_lengths() -> None:
    with Scripted([(0.0, chunk("a", "stop")), (0.0, DONE)]) as url, pytest.raises(ConfigError, match="does not count"):
        ask(url)


def test_streams_never_wait_for_each_other(prompts: Path) -> None:
    server = Scripted(ANSWER)
    with server as url:
        began = time.monotonic()
        job = Job(url, prompts, read_paces("32", None), {"max_new_tokens": 6}, {}, 32, num_warm_up=0)
        (figures,) = run(job)
        assert server.most == 32 and figures.num_answered == 32
        assert time.monotonic() - began < 3.0  # one after the other they would take 6 s


# The load


class Fake:
    """A target that notes when it was asked, and answers slowly."""

    def __init__(self, seconds: float) -> None:
        self.seconds, self.asked_s, self.live, self.most = seconds, [], 0, 0  # type: ignore[var-annotated]

    async def answer(self, record: Record) -> AsyncIterator[Piece]:
        self.asked_s.append(time.perf_counter())
        self.live += 1
        self.most = max(self.most, self.live)
        await asyncio.sleep(self.seconds)
        self.live -= 1
        yield Piece(2, True, 5, 2)

    async def close(self) -> None:
        pass


def test_so_many_streams_run_and_no_more() -> None:
    target = Fake(0.02)
    timed, seconds = asyncio.run(load.run(target, [Record(0, "A")] * 10, Pace(concurrency=4), 0, 9.0, lambda _: None))
    assert target.most == 4 and len(timed) == 10 and seconds >= 3 * 0.02


def test_requests_come_at_their_rate_however_slow_the_answers_are() -> None:
    target = Fake(0.3)
    records = [Record(0, "A")] * 30
    timed, _ = asyncio.run(load.run(target, records, Pace(rate=100.0), 7, 9.0, lambda _: None))
    due = load.arrivals(100.0, 30, 7)
    late = [asked - target.asked_s[0] - when for asked, when in zip(target.asked_s, due, strict=True)]
    assert target.most >= 20 and max(map(abs, late)) < 0.1
    assert all(each.ttft_s >= 0.3 for each in timed)


def test_made_up_prompts_are_as_long_as_asked_and_all_differ() -> None:
    async def num_tokens(record: Record) -> int:
        return 7 + 3 * len(str(record.prompt).split())  # a template of 7 tokens, and 3 for each word

    async def made(seed: int) -> list[Record]:
        records = await asking.made_up((100, 200), False, seed, num_tokens)
        return [next(records) for _ in range(50)]

    records = asyncio.run(made(0))
    lengths = [asyncio.run(num_tokens(record)) for record in records]
    assert min(lengths) >= 98 and max(lengths) <= 202 and max(lengths) - min(lengths) > 60
    assert len({str(record.prompt)[:40] for record in records}) == 50
    assert records == asyncio.run(made(0)) != asyncio.run(made(1))
