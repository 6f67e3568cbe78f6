"""Workers that die or hang in the middle of answers: these go on, token for token the same, on a mesh made whole."""

from __future__ import annotations

import dataclasses
import os
import random
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from runtime import Config, Engine, LookaheadConfig, SamplingParams
from runtime.engine import engine as engines
from runtime.model.decoder import Decoder
from runtime.model.directory import checked_model, resolve_model
from runtime.model.loader import load_decoder
from runtime.request import FinishReason
from runtime.tokenizer import Tokenizer
from runtime.workers.mesh_executor import MeshExecutor
from runtime.workers.pool import ProcessPool
from tests.models import save_tiny_model
from tests.runtime.engine.test_streaming_exact import TALKATIVE, in_talk, talk

pytestmark = [pytest.mark.system, pytest.mark.slow]

ASKED = {
    "greedy": (talk(5, seed=1), SamplingParams(max_new_tokens=90, ignore_eos=True)),
    "sampled": (talk(40, seed=2), SamplingParams(max_new_tokens=90, ignore_eos=True, temperature=0.8, seed=3)),
    "penalties": (
        talk(9, seed=4),
        SamplingParams(max_new_tokens=90, ignore_eos=True, temperature=0.7, seed=5, repetition_penalty=1.3),
    ),
}
POLICIES = {
    "full": {"policy": "full"},
    "sink": in_talk("sink"),
    "streaming": in_talk("streaming"),
}


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("talkative"), vocab_size=TALKATIVE, seed=1)


def config_of(model: Path, lp: int, tp: int, policy: str) -> Config:
    return Config.from_dict(
        {
            "model": {"path": str(model)},
            "parallel": {"lp": lp, "tp": tp},
            "cache": POLICIES[policy],
            "scheduler": {"max_sequences": 4, "max_rows": 64},
            "lookahead": {"planner": False, "window_size": 4, "ngram_size": 3},
        }
    )


def in_company(engine: Engine) -> Iterator[dict[str, list[int]]]:
    """The answers so far, all asked at the same time, after each step."""
    requests = {
        name: engine.make_request(prompt, sampling, request_id=name) for name, (prompt, sampling) in ASKED.items()
    }
    found: dict[str, list[int]] = {name: [] for name in ASKED}
    for request in requests.values():
        engine.add_request(request)
    while engine.has_work:
        for output in engine.step():
            assert output.finish_reason in (None, FinishReason.LENGTH), output
            found[output.request_id] += output.token_ids
        yield found


def alone(model: Path, policy: str) -> dict[str, list[int]]:
    with Engine.from_config(config_of(model, 1, 1, policy)) as engine:
        off = LookaheadConfig(enabled=False)
        return {
            name: list(engine.generate(prompt, sampling, off)[0].token_ids)
            for name, (prompt, sampling) in ASKED.items()
        }


def wait_until_whole(engine: Engine) -> None:
    deadline = time.monotonic() + 60
    while engine.executor.num_replicas < engine.config.parallel.lp:
        assert time.monotonic() < deadline
        time.sleep(0.1)
        engine.heartbeat()


@pytest.mark.parametrize(
    ("lp", "tp", "policy", "number"),
    [
        (2, 1, "streaming", signal.SIGKILL),
        (1, 2, "sink", signal.SIGKILL),
        pytest.param(2, 2, "full", signal.SIGKILL, marks=pytest.mark.long),
        pytest.param(2, 1, "sink", signal.SIGSTOP, marks=pytest.mark.long),
    ],
)
def test_answers_go_on_as_if_nothing_had_been(model, monkeypatch, lp, tp, policy, number) -> None:
    monkeypatch.setattr(engines, "UNTIMED_S", 0.1)
    monkeypatch.setitem(engines.LEAST_PATIENCE_S, "cpu", 1.0)
    expected, pool, choice = alone(model, policy), ProcessPool(), random.Random(6)
    with Engine.from_config(config_of(model, lp, tp, policy), pool) as engine:
        executor = engine.executor
        assert isinstance(executor, MeshExecutor)
        for fault in range(2 if number == signal.SIGKILL else 1):
            pauses, last = [0.0], time.monotonic()
            when = choice.randrange(3, 20)
            found: dict[str, list[int]] = {}
            for step, found in enumerate(in_company(engine)):  # noqa: B007
                pauses.append(time.monotonic() - last)
                if step == when:
                    victim = choice.choice(list(pool._workers.values()))
                    os.kill(victim.pid, number)
                last = time.monotonic()
            assert found == expected
            assert executor.num_lost >= fault + 1
            if lp > 1 and number == signal.SIGKILL:
                assert max(pauses) < 5  # some tenths of a second where nothing else runs
            wait_until_whole(engine)
        assert len(pool._workers) == lp * tp


def test_a_conversation_and_what_is_reused_survive_the_loss_of_a_replica(model) -> None:
    pool = ProcessPool()
    turns = [talk(18, seed=7), talk(6, seed=8)]
    sampling = SamplingParams(max_new_tokens=24, ignore_eos=True)

    def talked(engine: Engine, fault) -> list[tuple[int, ...]]:
        session, answers = engine.open_session(), []
        for turn in turns:
            outputs = list(engine.stream(turn, sampling, session=session))
            answers.append(tuple(token for output in outputs for token in output.token_ids))
            fault()
        return [*answers, engine.generate(turns[0] + [3, 1], sampling)[0].token_ids]

    with Engine.from_config(config_of(model, 1, 1, "full")) as engine:
        expected = talked(engine, lambda: None)
    with Engine.from_config(config_of(model, 2, 1, "full"), pool) as engine:

        def lose_one() -> None:
            """Kill the older worker while nothing runs, and wait until another has copied what there is."""
            first = min(pool._workers)
            os.kill(pool._workers[first].pid, signal.SIGKILL)
            engine.heartbeat()
            wait_until_whole(engine)

        assert talked(engine, lose_one) == expected
        assert engine.executor.num_lost == 2  # so nobody is left who was there in the beginning


POISON = 7


def poisoned_decoder(config: Config, spec, mesh):
    """A worker.DecoderMaker: a decoder that ends its process when it sees a certain token."""

    class Poisoned(Decoder):
        def step(self, batch, *rest):
            if (batch.tokens == POISON).any():
                os._exit(3)
            return super().step(batch, *rest)

    decoder = load_decoder(resolve_model(config.model.path), spec, mesh, torch.float32, "torch")
    return Poisoned(**{field.name: getattr(decoder, field.name) for field in dataclasses.fields(decoder)})


def test_a_request_that_ends_the_workers_is_failed_and_the_others_are_not(tiny_model) -> None:
    config = Config.from_dict(
        {
            "model": {"path": str(tiny_model)},
            "parallel": {"tp": 2},
            "scheduler": {"max_sequences": 4, "max_rows": 64},
            "lookahead": {"enabled": False},
        }
    )
    directory, spec = checked_model(config)
    sampling = SamplingParams(max_new_tokens=6, ignore_eos=True, logit_bias={POISON: -100.0})
    good = [[1, 2, 3], [4, 5]]
    with Engine.from_config(config.model_copy(update={"parallel": type(config.parallel)()})) as engine:
        expected = [answer.token_ids for answer in engine.generate(good, sampling)]
    executor = MeshExecutor(config, spec, ProcessPool(poisoned_decoder))
    with Engine(config, spec, Tokenizer(directory), executor) as engine:
        one, bad, other = engine.generate([good[0], [9, POISON], good[1]], sampling)
        assert [one.token_ids, other.token_ids] == expected
        assert bad.finish_reason is FinishReason.ERROR and not bad.token_ids
        assert bad.error is not None and "has ended the workers" in bad.error
        assert executor.num_lost >= 3
        assert engine.generate([good[0]], sampling)[0].token_ids == expected[0]
