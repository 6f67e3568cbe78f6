"""Sequences share the pages that there are: a request waits until what it may need is free, and no step runs out."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from runtime import Config, Engine, LookaheadConfig, SamplingParams
from runtime.errors import ResourceExhaustedError
from runtime.mesh.mesh import Mesh
from runtime.model.cuda.decoder import CudaDecoder
from runtime.model.decoder import Decoder
from runtime.model.directory import checked_model
from runtime.model.loader import load_decoder
from runtime.tokenizer import Tokenizer
from runtime.workers.executor import LocalExecutor
from tests.zoo import some_tokens

GREEDY = SamplingParams(max_new_tokens=12, ignore_eos=True)
LOOKAHEAD = LookaheadConfig(planner=False, window_size=4, ngram_size=3, row_budget=16)


class Paged(CudaDecoder):
    """With so many pages."""

    num_pages = 5

    def make_caches(self, groups, num_slots, max_staged, num_pages=None):
        return super().make_caches(groups, num_slots, max_staged, self.num_pages)


def engine_on(place: Path, kind: type[CudaDecoder], **settings) -> Engine:
    config = Config.from_dict(
        {
            "model": {"path": str(place)},
            "scheduler": {"max_sequences": 4, "max_rows": 64},
            "lookahead": LOOKAHEAD.model_dump(),
            **settings,
        }
    )
    directory, spec = checked_model(config)
    decoder = load_decoder(directory, spec, Mesh(), torch.float32, "torch")
    assert isinstance(decoder, Decoder)
    return Engine(config, spec, Tokenizer(directory), LocalExecutor(config, spec, lambda *_: kind(decoder)))


@pytest.mark.slow
def test_requests_wait_for_pages_in_the_order_in_which_they_came(tiny_model) -> None:
    """Two pages each where four are: two run at a time, and a small one does not overtake who waits."""
    prompts = [some_tokens(290, seed=seed) for seed in range(3)] + [some_tokens(9, seed=3)]
    with engine_on(tiny_model, CudaDecoder) as engine:
        expected = [one.token_ids for one in engine.generate(prompts, GREEDY)]
    with engine_on(tiny_model, type("Small", (Paged,), {"num_pages": 4})) as engine:
        assert engine.executor.num_pages == (4,)
        for _ in range(2):  # what ended gives all of it back
            requests = [engine.make_request(prompt, GREEDY) for prompt in prompts]
            tokens: dict[str, list[int]] = {request.request_id: [] for request in requests}
            for request in requests:
                engine.add_request(request)
            most = 0
            while engine.has_work:
                for output in engine.step():
                    tokens[output.request_id] += output.token_ids
                waiting = list(engine._scheduler.waiting)
                assert waiting == requests[len(requests) - len(waiting) :]
                most = max(most, engine.num_running)
            assert most == 2
            assert [tuple(tokens[request.request_id]) for request in requests] == expected


def test_what_conversations_hold_is_told(tiny_model) -> None:
    with engine_on(tiny_model, Paged) as engine:
        session = engine.open_session()
        (*_, last) = engine.stream(some_tokens(5), GREEDY, session=session)
        assert last.finish_reason is not None
        with pytest.raises(ResourceExhaustedError, match="cache.capacity = 512: open conversations hold the memory"):
            engine.generate([some_tokens(290)], GREEDY)
        assert engine.generate([some_tokens(30)], GREEDY)[0].token_ids  # one page is left
        engine.close_session(session)
        assert engine.generate([some_tokens(290)], GREEDY)[0].token_ids


STREAMING = {"policy": "sep", "design": "streaming", "separators": [5, 9], "capacity": 300, "local": 200}


@pytest.mark.parametrize("cache", [{"policy": "sink", "window": 270}, STREAMING], ids=["sink", "streaming"])
def test_streaming_sequences_never_need_more_than_they_are_promised(tiny_model, cache) -> None:
    with engine_on(tiny_model, CudaDecoder, cache=cache) as engine:
        memory = engine._scheduler.memory
        caches = engine.executor._worker.caches
        for prompt in (some_tokens(540, seed=1), some_tokens(40, seed=2)):
            engine.add_request(engine.make_request(prompt, GREEDY.model_copy(update={"max_new_tokens": 40})))
        while engine.has_work:
            engine.step()
            for slot, promised in memory._promised.items():
                for held, most in zip(caches, promised, strict=True):
                    assert len(held.runs[slot].pages) + len(held.anchors[slot].pages) <= most
