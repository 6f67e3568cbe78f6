"""Streaming caches on every (lp, tp) shape give the tokens of one process, with real gloo workers on this machine."""

from __future__ import annotations

import multiprocessing as mp
import traceback
from multiprocessing.connection import Connection, wait

import pytest

from runtime import Config, Engine, LookaheadConfig, SamplingParams
from runtime.equality import Equality
from runtime.model.spec import ModelSpec
from runtime.workers.pool import WORKER_ENVIRONMENT
from runtime.workers.roster import Place
from tests.models import save_tiny_model
from tests.oracles import Dense, seen
from tests.runtime.engine.test_engine import PLAIN
from tests.runtime.engine.test_streaming_exact import TALKATIVE, in_talk, talk

pytestmark = pytest.mark.system

POLICIES = {
    "sink": in_talk("sink"),
    "sink-original": in_talk("sink-original"),
    "sink-turn": in_talk("sink") | {"evict": "turn", "window": 60},
    "sep": in_talk("sep") | {"full_layers": (0, -1)},
    "streaming": in_talk("streaming"),
    "streaming-after": in_talk("streaming-after-original"),
}
PROMPTS = [talk(5, seed=21), talk(33, seed=22), talk(1, seed=23)]
TURNS = [talk(length, seed=30 + length) for length in (18, 3, 9)]
GREEDY = SamplingParams(max_new_tokens=24, ignore_eos=True)
SAMPLED = SamplingParams(max_new_tokens=20, ignore_eos=True, temperature=0.6, seed=8)
WIDE = LookaheadConfig(planner=False, window_size=6, ngram_size=3, guess_set_size=6)


class LastingPool:
    """Worker processes that serve one engine after the other: starting Python and torch takes longer than a test."""

    host = "127.0.0.1"
    own_devices = False

    def __init__(self, num_processes: int) -> None:
        context = mp.get_context("spawn")
        self._processes, self._pipes = [], []
        for _ in range(num_processes):
            ours, theirs = context.Pipe()
            process = context.Process(target=_work, args=(theirs,), daemon=True)
            process.start()
            self._processes.append(process)
            self._pipes.append(ours)
        self._busy: dict[int, Connection] = {}

    def open(self, config: Config, spec: ModelSpec) -> None:
        self._model = config, spec

    def start(self, place: Place) -> None:
        pipe = self._busy[place.worker] = self._pipes[place.position]
        pipe.send((*self._model, place))

    def failures(self) -> dict[int, str]:
        ended = wait(list(self._busy.values()), timeout=0)
        return {number: str(pipe.recv()) for number, pipe in self._busy.items() if pipe in ended}

    def end(self, worker: int) -> None:
        raise AssertionError("every worker answers")

    def close(self) -> None:
        for pipe in self._busy.values():
            assert pipe.poll(30), "a worker does not end"
            assert pipe.recv() is None
        self._busy = {}

    def shut_down(self) -> None:
        for process in self._processes:
            process.kill()
            process.join()


def _work(pipe: Connection) -> None:
    from runtime.workers.worker import serve

    while True:
        job = pipe.recv()
        try:
            serve(*job)
            pipe.send(None)
        except BaseException:
            pipe.send(traceback.format_exc())


@pytest.fixture(scope="module")
def pool():
    with pytest.MonkeyPatch.context() as patch:
        for name, value in WORKER_ENVIRONMENT.items():
            patch.setenv(name, value)
        pool = LastingPool(4)
    yield pool
    pool.shut_down()


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    place = save_tiny_model(tmp_path_factory.mktemp("talkative"), vocab_size=TALKATIVE, seed=1)
    return place, Dense(place)


def make_config(place, policy: str, lp: int = 1, tp: int = 1) -> Config:
    return Config.from_dict(
        {
            "model": {"path": str(place)},
            "parallel": {"lp": lp, "tp": tp},
            "cache": POLICIES[policy],
            "scheduler": {"max_sequences": 4, "max_rows": 64},
        }
    )


def converse(engine: Engine, sampling: SamplingParams, lookahead: LookaheadConfig) -> list[int]:
    """The text of a conversation of several turns."""
    session, text = engine.open_session(), []
    for prompt in TURNS:
        engine.add_request(engine.make_request(prompt, sampling, lookahead, session=session))
        text += prompt
        while engine.has_work:
            for output in engine.step():
                session.take(output)
                text += output.token_ids
    engine.close_session(session)
    return text


@pytest.fixture(scope="module")
def alone(model):
    """What one process without lookahead gives: greedy answers, and the text of a sampled conversation."""
    found = {}
    for policy in POLICIES:
        with Engine.from_config(make_config(model[0], policy)) as engine:
            answers = [engine.generate([prompt], GREEDY, PLAIN)[0].token_ids for prompt in PROMPTS]
            found[policy] = answers, converse(engine, SAMPLED, PLAIN)
    return found


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize(("lp", "tp"), [(2, 1), (1, 3), (2, 2)], ids=["lp2", "tp3", "lp2-tp2"])
def test_every_mesh_equals_one_process(pool, model, alone, policy, lp, tp):
    """Requests in company and a conversation, with lookahead, over evictions and compactions on every rank."""
    place, dense = model
    answers, text = alone[policy]
    equality = Equality(dense.gap_under(POLICIES[policy]))
    with Engine.from_config(make_config(place, policy, lp, tp), pool) as engine:
        completions = engine.generate(PROMPTS, GREEDY, WIDE)
        for prompt, one, other in zip(PROMPTS, answers, completions, strict=True):
            equality.compare(prompt, one, other.token_ids)
        assert converse(engine, SAMPLED, WIDE) == text
    assert equality.lossless and len(equality.divergences) <= 1, equality
    assert sum(length > 1 for completion in completions for length in completion.run_lengths) > 5


@pytest.mark.parametrize("policy", POLICIES)
def test_what_one_process_gives_is_the_dense_models_choice(model, alone, policy):
    """So the meshes are right, not only alike; and the texts are long enough to lose tokens."""
    cache, (answers, conversation) = POLICIES[policy], alone[policy]
    for prompt, answer in zip(PROMPTS, answers, strict=True):
        text = [*prompt, *answer]
        logits = model[1].logits(text, seen(cache, text), cache.get("full_layers", ()))
        for p in range(len(prompt) - 1, len(text) - 1):
            assert float(logits[p].max() - logits[p, text[p + 1]]) < 1e-4
    assert len(conversation) == sum(map(len, TURNS)) + 60
    assert len(seen(cache | {"evict": "token"} if cache.get("evict") else cache, conversation)[-1]) < len(conversation)
