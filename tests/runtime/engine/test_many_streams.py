"""Sixty-four streams by default: each is what it would be alone, and slots take no memory that the machine has not."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import psutil

from runtime import Config, Engine, LookaheadConfig, SamplingParams
from runtime.engine.memory import ALWAYS, HostMemory
from runtime.model.directory import checked_model
from runtime.request import FinishReason, Request
from runtime.retention import layer_groups
from tests.zoo import some_tokens

LOOKAHEAD = {"sources": ["suffix", "recycle", "jacobi"], "window_size": 4, "ngram_size": 3}


def config_of(place: Path, **sections: Any) -> Config:
    return Config.from_dict({"model": {"path": str(place), "device": "cpu"}, "lookahead": LOOKAHEAD} | sections)


def mixed(number: int) -> list[tuple[list[int], dict[str, Any]]]:
    """Prompts from 1 to 200 tokens, greedy and sampled, with controls of all kinds."""
    generator = random.Random(5)
    kinds: list[dict[str, Any]] = [
        {},
        {"temperature": 0.8, "top_p": 0.9},
        {"temperature": 1.0, "top_k": 20, "repetition_penalty": 1.2},
        {"temperature": 0.7, "min_p": 0.05, "frequency_penalty": 0.5},
        {"logit_bias": {65: 4.0}, "presence_penalty": 0.5},
        {"stop_token_ids": [97, 98], "min_new_tokens": 3},
    ]
    return [
        (
            some_tokens(generator.choice((1, 2, 9, 60, 200)), seed=index),
            {"max_new_tokens": generator.randint(1, 24), "seed": index, **kinds[index % len(kinds)]},
        )
        for index in range(number)
    ]


def test_sixty_four_mixed_streams_are_each_the_single_request(tiny_model: Path) -> None:
    asked = mixed(64)
    with Engine.from_config(config_of(tiny_model)) as engine:
        off = LookaheadConfig(enabled=False)
        alone = [engine.generate([prompt], SamplingParams(**kind), off)[0].token_ids for prompt, kind in asked]
    with Engine.from_config(config_of(tiny_model)) as engine:
        runs: dict[str, list[int]] = {}
        requests = [engine.make_request(prompt, SamplingParams(**kind)) for prompt, kind in asked]
        cancelled = [engine.make_request(some_tokens(40, seed=99 + i), {"max_new_tokens": 99}) for i in range(6)]
        for index, request in enumerate([*requests[:30], *cancelled, *requests[30:]]):
            engine.add_request(request)
            runs[request.request_id] = []
            if index % 7 == 0:  # they come one after the other, while others run
                for output in engine.step():
                    runs[output.request_id] += output.token_ids
        most = 0
        for step in range(10_000):
            if step in (3, 5):
                for request in cancelled[step % 2 :: 2]:
                    engine.abort(request.request_id)
            outputs = engine.step()
            most = max(most, engine.num_running)
            for output in outputs:
                runs[output.request_id] += output.token_ids
                assert output.finish_reason is not FinishReason.ERROR
            if not engine.has_work:
                break
        assert most > 40
        assert [tuple(runs[request.request_id]) for request in requests] == alone


def test_sixty_four_slots_cost_nothing_before_they_are_used(tiny_model: Path) -> None:
    long = {"capacity": 100_000, "beyond_trained": True}
    process = psutil.Process()
    with Engine.from_config(config_of(tiny_model, cache=long)) as engine:
        assert engine.cache_report().num_slots == 64
        addresses = 64 * engine.cache_report().bytes_per_sequence
        before = process.memory_info().rss
        engine.generate([some_tokens(20, seed=index) for index in range(64)], {"max_new_tokens": 2})
        grown = process.memory_info().rss - before
    assert addresses > 2 << 30 and grown < 256 << 20


def test_fewer_rows_make_fewer_slots() -> None:
    assert Config.load(None, []).scheduler.num_slots == 64
    assert Config.load(None, ["scheduler.max_rows=64"]).scheduler.num_slots == 32
    assert Config.load(None, ["scheduler.max_rows=64", "scheduler.max_sequences=3"]).scheduler.num_slots == 3


# Memory that is short


def memory_for(place: Path, budget: int) -> HostMemory:
    config = config_of(place)
    _, spec = checked_model(config)
    return HostMemory(config, spec, layer_groups(config.cache, spec.num_layers, spec.max_positions), budget)


def request_of(num_tokens: int, session_id: str | None = None) -> Request:
    sampling, lookahead = SamplingParams(max_new_tokens=1), LookaheadConfig()
    return Request("r", tuple(range(num_tokens)), sampling, lookahead, session_id)


def test_slots_beyond_the_first_wait_for_memory(tiny_model: Path) -> None:
    probe = memory_for(tiny_model, 0)
    probe.promise(0, request_of(100))
    small = probe._written[0]
    memory = memory_for(tiny_model, 10 * small)
    for slot in range(ALWAYS):
        assert slot in memory.among(range(64), request_of(100))
        memory.promise(slot, request_of(100))
    assert list(memory.among([3, 8, 9], request_of(100))) == [3, 8, 9]
    memory.promise(8, request_of(100))
    memory.promise(9, request_of(100))
    assert list(memory.among([3, 10, 11], request_of(1))) == [3]
    memory.give_back(9)  # its pages stay, for whoever comes into the slot
    assert list(memory.among([9, 10], request_of(100))) == [9]
    assert list(memory.among([9, 10], request_of(200))) == []
    assert list(memory.among([9, 10], request_of(1, "a conversation, which may fill its slot"))) == []


def test_requests_that_wait_for_memory_are_answered_all_the_same(tiny_model: Path) -> None:
    prompts = [some_tokens(50, seed=index) for index in range(20)]
    with Engine.from_config(config_of(tiny_model)) as engine:
        expected = [one.token_ids for one in engine.generate(prompts, {"max_new_tokens": 8})]
        memory = engine._scheduler.memory = memory_for(tiny_model, 0)
        requests = [engine.make_request(prompt, {"max_new_tokens": 8}) for prompt in prompts]
        runs: dict[str, list[int]] = {request.request_id: [] for request in requests}
        for request in requests:
            engine.add_request(request)
        while engine.has_work:
            assert engine.can_step
            for output in engine.step():
                runs[output.request_id] += output.token_ids
            assert engine.num_running <= ALWAYS
        assert [tuple(run) for run in runs.values()] == expected and len(memory._written) == ALWAYS


def test_accepted_tokens_say_who_proposed_them_and_slots_what_they_hold(tiny_model: Path) -> None:
    unplanned = {**LOOKAHEAD, "planner": False, "row_budget": 24}
    with Engine.from_config(config_of(tiny_model, lookahead=unplanned)) as engine:
        session = engine.open_session()
        repeated = [*range(60, 80)] * 4
        outputs = list(engine.stream(repeated, {"max_new_tokens": 24, "logit_bias": {65: 50.0}}, session=session))
        assert sum(len(output.sources) for output in outputs) == 24 - len(outputs) > 0
        for output in outputs:
            assert len(output.sources) == max(len(output.token_ids) - 1, 0)
            assert all(names and set(names) <= set(LOOKAHEAD["sources"]) for names in output.sources)
        (held,) = engine.slots()
        assert (held.state, held.num_tokens) == ("held", 80 + 23)  # the last token waits uncached
        engine.close_session(session)
        assert [slot.state for slot in engine.slots()] == ["left"]
        request = engine.make_request([5, 6, 7], {"max_new_tokens": 3})
        engine.add_request(request)
        engine.step()
        assert {slot.state for slot in engine.slots()} == {"left", "running"}
        engine.abort(request.request_id)
        engine.step()
