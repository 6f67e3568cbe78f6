"""The engine's thread loses no request, whatever the engine or a callback does."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from queue import Queue

import pytest

from runtime.config import Config
from runtime.engine.loop import EngineLoop
from runtime.errors import DuplicateRequestError, InvalidRequestError, ResourceExhaustedError, WorkerError
from runtime.request import FinishReason, Request, StepOutput
from tests.cluster.serving.scripted_engine import ScriptedEngine

pytestmark = pytest.mark.timeout(30)


class Caller:
    """Collects the outputs of one request."""

    def __init__(self) -> None:
        self.outputs: Queue[StepOutput] = Queue()

    def __call__(self, output: StepOutput) -> None:
        self.outputs.put(output)

    def next(self) -> StepOutput:
        return self.outputs.get(timeout=10)

    def all(self) -> list[StepOutput]:
        outputs = [self.next()]
        while outputs[-1].finish_reason is None:
            outputs.append(self.next())
        assert self.outputs.empty()
        return outputs


@pytest.fixture
def engine() -> ScriptedEngine:
    return ScriptedEngine(Config.load(None, ["scheduler.max_sequences=2", "scheduler.max_waiting=2"]))


@pytest.fixture
def loop(engine: ScriptedEngine) -> Iterator[EngineLoop]:
    loop = EngineLoop(engine, heartbeat_s=0.05)
    yield loop
    engine.gate.set()
    loop.close()


def request(engine: ScriptedEngine, name: str, **sampling: object) -> Request:
    return engine.make_request([1, 2, 3], engine.config.sampling.merged(sampling), request_id=name)


def eventually(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_every_output_reaches_its_own_caller(engine: ScriptedEngine, loop: EngineLoop) -> None:
    callers = {f"r{index}": Caller() for index in range(4)}
    for index, (name, caller) in enumerate(callers.items()):
        loop.submit(request(engine, name, max_new_tokens=5 + index), caller)
    for index, (name, caller) in enumerate(callers.items()):
        outputs = caller.all()
        assert {output.request_id for output in outputs} == {name}
        assert sum(len(output.token_ids) for output in outputs) == 5 + index
        assert outputs[-1].finish_reason is FinishReason.LENGTH
    assert loop.stats.outcomes == {FinishReason.LENGTH: 4}
    assert (loop.stats.num_running, loop.stats.num_waiting) == (0, 0)


def test_submit_does_not_wait_for_a_step(engine: ScriptedEngine, loop: EngineLoop) -> None:
    engine.gate.clear()
    first, second = Caller(), Caller()
    loop.submit(request(engine, "first", max_new_tokens=4), first)
    assert engine.stepping.wait(10)
    loop.submit(request(engine, "second", max_new_tokens=4), second)  # hangs here if it waits
    assert (loop.stats.num_running, loop.stats.num_waiting) == (1, 1)
    engine.gate.set()
    assert first.all() and second.all()


def test_bad_requests_are_refused_to_the_caller(engine: ScriptedEngine, loop: EngineLoop) -> None:
    bad = Request("bad", (engine.spec.vocab_size,), engine.config.sampling, engine.config.lookahead)
    with pytest.raises(InvalidRequestError, match="token"):
        loop.submit(bad, pytest.fail)
    engine.gate.clear()
    callers = [Caller() for _ in range(4)]
    requests = [request(engine, f"r{index}") for index in range(4)]
    for submitted, caller in zip(requests, callers, strict=True):
        loop.submit(submitted, caller)
    with pytest.raises(ResourceExhaustedError, match="queue is full"):
        loop.submit(request(engine, "one-more"), pytest.fail)
    with pytest.raises(DuplicateRequestError, match="r0"):
        loop.submit(request(engine, "r0"), pytest.fail)
    loop.cancel("r3")
    engine.gate.set()
    assert callers[3].all()[-1].finish_reason is FinishReason.CANCELLED
    assert callers[0].all()[-1].finish_reason is FinishReason.LENGTH


def test_cancel_frees_the_slot_and_the_id(engine: ScriptedEngine, loop: EngineLoop) -> None:
    caller = Caller()
    loop.submit(request(engine, "r", max_new_tokens=10**6), caller)
    caller.next()
    loop.cancel("r")
    assert caller.all()[-1].finish_reason is FinishReason.CANCELLED
    assert not engine.has_work
    loop.cancel("r")  # it has ended: this must not hit the next request of that name
    again = Caller()
    loop.submit(request(engine, "r", max_new_tokens=3), again)
    assert again.all()[-1].finish_reason is FinishReason.LENGTH


def test_cancel_before_the_engine_has_seen_the_request(engine: ScriptedEngine, loop: EngineLoop) -> None:
    engine.gate.clear()
    busy, caller = Caller(), Caller()
    loop.submit(request(engine, "busy", max_new_tokens=8), busy)
    assert engine.stepping.wait(10)
    loop.submit(request(engine, "r"), caller)
    loop.cancel("r")
    engine.gate.set()
    (only,) = caller.all()
    assert (only.finish_reason, only.token_ids, only.usage.num_prompt_tokens) == (FinishReason.CANCELLED, (), 3)
    assert busy.all()[-1].finish_reason is FinishReason.LENGTH


def test_a_refusal_by_the_engine_itself_does_not_hang_the_request(engine: ScriptedEngine, loop: EngineLoop) -> None:
    engine.refusal = ResourceExhaustedError("scheduler.max_waiting", 2, "no room", "Try again.")
    caller = Caller()
    loop.submit(request(engine, "r"), caller)
    (only,) = caller.all()
    assert only.finish_reason is FinishReason.ERROR and "no room" in (only.error or "")
    engine.refusal = None
    loop.submit(request(engine, "r", max_new_tokens=2), caller)
    assert caller.all()[-1].finish_reason is FinishReason.LENGTH


@pytest.mark.parametrize("error", [WorkerError("rank 2 died"), ZeroDivisionError("a bug")])
def test_a_failing_step_ends_every_request_with_the_error(error: Exception) -> None:
    engine, failures = ScriptedEngine(Config.load(None, ["scheduler.max_sequences=2"])), Queue()
    loop = EngineLoop(engine, on_failure=failures.put)
    callers = [Caller() for _ in range(4)]
    requests = [request(engine, f"r{index}", max_new_tokens=10**6) for index in range(4)]
    for submitted, caller in zip(requests, callers, strict=True):
        loop.submit(submitted, caller)
    shown = callers[0].next()
    engine.error = error
    for caller in callers:
        last = caller.all()[-1]
        assert last.finish_reason is FinishReason.ERROR and str(error) in (last.error or "")
        assert caller is not callers[0] or last.usage.num_new_tokens >= len(shown.token_ids)
    assert failures.get(timeout=10) is error is loop.failed
    with pytest.raises(WorkerError, match=str(error)):
        loop.submit(request(engine, "later"), pytest.fail)
    loop.cancel("r0")
    loop.close()


def test_a_failing_heartbeat_is_noticed_without_requests(engine: ScriptedEngine, loop: EngineLoop) -> None:
    eventually(lambda: engine.num_heartbeats > 2)
    engine.error = WorkerError("gone")
    eventually(lambda: loop.failed is engine.error)


def test_a_callback_that_raises_hurts_nobody_else(engine: ScriptedEngine, loop: EngineLoop) -> None:
    calls = []

    def broken(output: StepOutput) -> None:
        calls.append(output)
        raise RuntimeError("the caller's bug")

    other = Caller()
    loop.submit(request(engine, "broken", max_new_tokens=10**6), broken)
    loop.submit(request(engine, "other", max_new_tokens=20), other)
    assert sum(len(output.token_ids) for output in other.all()) == 20
    eventually(lambda: not engine.has_work)
    assert len(calls) == 1 and loop.failed is None


def test_close_ends_what_is_live_and_refuses_the_rest(engine: ScriptedEngine) -> None:
    before = {thread for thread in threading.enumerate() if thread.name == "outrider-engine"}  # of other tests' servers
    loop, caller = EngineLoop(engine), Caller()
    loop.submit(request(engine, "r", max_new_tokens=10**6), caller)
    caller.next()
    loop.close()
    loop.close()
    assert caller.all()[-1].finish_reason is FinishReason.CANCELLED
    with pytest.raises(WorkerError, match="shutting down"):
        loop.submit(request(engine, "later"), pytest.fail)
    assert {thread for thread in threading.enumerate() if thread.name == "outrider-engine"} <= before


def test_requests_from_many_threads_all_end(engine: ScriptedEngine, loop: EngineLoop) -> None:
    ended: Queue[FinishReason | None] = Queue()

    def run(number: int) -> None:
        for turn in range(10):
            caller, name = Caller(), f"{number}-{turn}"
            while True:
                submitted = request(engine, name, max_new_tokens=6)
                try:
                    loop.submit(submitted, caller)
                    break
                except ResourceExhaustedError:
                    time.sleep(0.001)
            if turn % 3 == 0:
                loop.cancel(name)
            ended.put(caller.all()[-1].finish_reason)

    threads = [threading.Thread(target=run, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert ended.qsize() == 80
    assert sum(loop.stats.outcomes.values()) == 80
