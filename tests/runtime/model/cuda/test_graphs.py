"""Steps in fixed shapes compute what steps of any shape do. CUDA graphs replay just these; here they are called."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from runtime import Config, Engine, LookaheadConfig, SamplingParams
from runtime.mesh.mesh import Mesh
from runtime.model.cuda.graphs import Graph, GraphedDecoder, Shape
from runtime.model.decoder import Decoder
from runtime.model.directory import load_spec
from runtime.model.loader import load_decoder
from tests.models import save_tiny_model
from tests.oracles import POLICIES, some_text
from tests.runtime.engine.test_engine import PLAIN
from tests.runtime.engine.test_streaming_exact import Stream, difference
from tests.zoo import Runner, make_model, some_tokens

BUCKETS = (4, 8, 16, 32)


def small_buckets(decoder: Decoder, **settings) -> GraphedDecoder:
    return GraphedDecoder(decoder, **({"row_buckets": BUCKETS, "min_stored": 8} | settings))


def torch_decoder(place: Path, dtype: torch.dtype) -> Decoder:
    decoder = load_decoder(place, load_spec(place), Mesh(), dtype, kernels="torch")
    assert isinstance(decoder, Decoder)
    return decoder


@pytest.fixture(scope="module")
def decoder(tiny_model) -> Decoder:
    return torch_decoder(tiny_model, torch.float64)


def step_by_step(plain: Stream, graphed: Stream, text: list[int], seed: int) -> float:
    """Run a text through both, trees between its chunks, paths of some of them accepted; the largest difference."""
    rng = np.random.default_rng(seed)
    worst, read = 0.0, 0
    while read < len(text):
        room = plain.room
        chain = text[read : read + min(room, int(rng.integers(1, 20)))]
        count = int(rng.integers(0, 12))
        parents = [
            *range(-1, len(chain) - 1),
            *(int(rng.integers(-1, min(room, len(chain)) - 1)) for _ in range(count)),
        ]
        tokens = chain + some_text(count, seed=read)
        worst = max(worst, difference(graphed.rows(tokens, parents), plain.rows(tokens, parents)))
        for stream in (plain, graphed):
            stream.commit(list(range(len(chain))), chain)
        read += len(chain)
    return worst


@pytest.mark.parametrize("policy", POLICIES)
def test_fixed_shapes_equal_steps_of_any_shape(decoder, policy) -> None:
    graphed = small_buckets(decoder)
    plain, fixed = Stream(decoder, POLICIES[policy]), Stream(graphed, POLICIES[policy])
    assert step_by_step(plain, fixed, some_text(90, seed=1), seed=2) < 1e-10
    assert len({shape.num_rows for shape in graphed.shapes}) > 1
    assert policy.startswith("streaming-") or len({shape.sizes for shape in graphed.shapes}) > 1


@pytest.mark.parametrize("full_layers", [(0,), (0, -1)], ids=str)
def test_layers_that_keep_other_tokens_have_sizes_of_their_own(decoder, full_layers) -> None:
    cache = POLICIES["sep"] | {"full_layers": full_layers}
    graphed = small_buckets(decoder)
    assert step_by_step(Stream(decoder, cache), Stream(graphed, cache), some_text(90, seed=3), seed=4) < 1e-10
    assert any(one != other for (one, _), (other, _) in (shape.sizes for shape in graphed.shapes))


@pytest.mark.parametrize("variant", ["llama", "mistral-window", "qwen3-bias-window", "qwen2-rope-dynamic"])
def test_sliding_windows_and_rotations_in_float32(tmp_path: Path, variant: str) -> None:
    make_model(variant).save_pretrained(tmp_path)
    plain = torch_decoder(tmp_path, torch.float32)
    runners = [Runner(plain), Runner(small_buckets(plain))]
    tokens = some_tokens(60)
    for start, stop in ((0, 30), (30, 31), (31, 47), (47, 60)):
        one, other = (runner.extend(tokens[start:stop], rope_length=30) for runner in runners)
        assert difference(one, other) < 1e-5
    one, other = (runner.rows(tokens[:6], parents=[-1, 0, 0, 1, 2, -1], rope_length=30) for runner in runners)
    assert difference(one, other) < 1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(tiny_model, dtype) -> None:
    plain = torch_decoder(tiny_model, dtype)
    streams = Stream(plain, POLICIES["sink"]), Stream(small_buckets(plain), POLICIES["sink"])
    assert step_by_step(*streams, some_text(40, seed=5), seed=6) < 0.1


@pytest.mark.parametrize("num_stored", [0, 1, 15, 16, 17, 40])
@pytest.mark.parametrize("num_rows", [1, 4, 5, 15, 16, 17])
def test_at_the_edges_of_buckets(decoder, num_stored, num_rows) -> None:
    """The largest row bucket is 16; of 40 tokens, 32 are more than the next bucket below the slot's capacity holds."""
    graphed = small_buckets(decoder, row_buckets=(4, 16), min_stored=16)
    runners = [Runner(one, capacity=40, max_staged=20) for one in (decoder, graphed)]
    for runner in runners:
        for start in range(0, num_stored, 17):
            runner.extend(some_tokens(min(17, num_stored - start), seed=start))
    before = graphed.shapes
    one, other = (runner.rows(some_tokens(num_rows, seed=7)) for runner in runners)
    assert difference(one, other) < 1e-10
    bucket = {1: 4, 4: 4, 5: 16, 15: 16, 16: 16, 17: None}[num_rows]
    stored = {0: 16, 1: 16, 15: 16, 16: 16, 17: 32, 40: 40}[num_stored]
    assert graphed.shapes[-1:] == ([Shape(0, bucket, ((stored, 0),))] if bucket else before[-1:])


def test_a_row_bucket_is_no_larger_than_the_room_to_stage(decoder) -> None:
    graphed = small_buckets(decoder)
    runners = [Runner(one, capacity=30, max_staged=9) for one in (decoder, graphed)]
    for start in range(0, 30, 6):
        for runner in runners:
            runner.extend(some_tokens(6, seed=start))
    one, other = (runner.rows(some_tokens(9)) for runner in runners)
    assert difference(one, other) < 1e-10
    assert graphed.shapes[-1] == Shape(0, 9, ((30, 0),))


def test_rows_that_fill_up_touch_nothing_that_counts(decoder) -> None:
    """Neither the stored tokens, nor the real rows' room, nor other slots, nor what lies beyond the bucket."""
    runner = Runner(small_buckets(decoder), num_slots=2)
    (cache,) = runner.caches
    for slot in range(2):
        runner.extend(some_tokens(13, seed=slot), slot)
    before = cache.buffer.clone()
    runner.rows(some_tokens(5, seed=3), slots=[1] * 5)
    changed = (cache.buffer != before).any(-1).any(1).any(1).any(1)  # [slots, rows]
    assert not changed[0].any()
    assert changed[1].nonzero()[:, 0].tolist() == list(range(13, 13 + 8))
    staged = cache.buffer[1, ..., 13:18, :].clone()
    reference = Runner(decoder)
    reference.extend(some_tokens(13, seed=1))
    reference.rows(some_tokens(5, seed=3))
    assert difference(staged, reference.caches[0].buffer[0, ..., 13:18, :]) < 1e-10


def test_what_an_earlier_sequence_left_is_not_seen(decoder) -> None:
    """Large leftovers have no weight, and an overflow does not outlive its sequence."""
    tokens = some_tokens(20)
    expected = Runner(decoder).rows(tokens)
    for leftover in (1e30, float("nan"), float("inf")):
        runner = Runner(small_buckets(decoder))
        runner.caches[0].buffer.fill_(leftover)
        if leftover != 1e30:
            runner.caches[0].reset(0)
        assert difference(runner.rows(tokens), expected) < 1e-10


def test_several_sequences_run_as_they_are(decoder) -> None:
    graphed = small_buckets(decoder)
    tokens, slots = some_tokens(8), [0] * 3 + [1] * 5
    parents = [-1, 0, 1, -1, 3, 4, 5, 6]
    one, other = (Runner(each, num_slots=2).rows(tokens, parents, slots) for each in (decoder, graphed))
    assert torch.equal(one, other) and not graphed.shapes


def test_least_recently_used_shapes_go_first(decoder) -> None:
    graphed = small_buckets(decoder, max_graphs=2)
    runner = Runner(graphed)
    for count in (3, 7, 3, 15):
        runner.rows(some_tokens(count))
    assert [shape.num_rows for shape in graphed.shapes] == [4, 16]


LOOKAHEAD = LookaheadConfig(planner=False, window_size=5, ngram_size=4, row_budget=30)


def engine_on(place: Path, cache: dict, decoder: Decoder | GraphedDecoder, monkeypatch) -> Engine:
    settings = {
        "model": {"path": str(place)},
        "cache": cache,
        "scheduler": {"max_sequences": 2, "max_rows": 64},
        "lookahead": LOOKAHEAD.model_dump(),
    }
    with monkeypatch.context() as patch:
        patch.setattr("runtime.workers.worker.load_decoder", lambda *_, **__: decoder)
        return Engine.from_config(Config.from_dict(settings))


@pytest.fixture(scope="module")
def talkative(tmp_path_factory) -> Path:
    """Its vocabulary is so small that texts repeat themselves and candidates are accepted."""
    return save_tiny_model(tmp_path_factory.mktemp("talkative"), vocab_size=16, seed=1)


@pytest.mark.parametrize("policy", ["full", "sink", "sep", "streaming"])
@pytest.mark.slow
def test_an_engine_on_fixed_shapes_gives_the_same_tokens(talkative, policy, monkeypatch) -> None:
    """Greedy alone, with lookahead and without, and sampled in company."""
    cache = POLICIES[policy]
    cache = cache | {"separators": (5, 9, 13)} if cache["policy"] == "sep" else cache
    prompts = [np.random.default_rng(seed).integers(0, 16, length).tolist() for seed, length in ((1, 4), (2, 37))]
    greedy = SamplingParams(max_new_tokens=24, ignore_eos=True)
    sampled = SamplingParams(max_new_tokens=24, ignore_eos=True, temperature=0.5, seed=3)

    def outputs(decoder: Decoder | GraphedDecoder) -> list[Sequence[int]]:
        with engine_on(talkative, cache, decoder, monkeypatch) as engine:
            alone = [engine.generate([p], greedy, how)[0] for p in prompts for how in (PLAIN, LOOKAHEAD)]
            assert any(one.usage.tokens_per_step > 1.1 for one in alone)
            return [one.token_ids for one in [*alone, *engine.generate(prompts, sampled)]]

    plain = torch_decoder(talkative, torch.float32)
    graphed = GraphedDecoder(plain, BUCKETS, min_stored=16)
    found = outputs(graphed)
    assert found[0] == found[1] and found[2] == found[3]
    assert found == outputs(plain)
    assert len(graphed.shapes) > 3


def test_min_rows_gives_plain_steps_the_shapes_of_lookahead(talkative, monkeypatch) -> None:
    graphed = GraphedDecoder(torch_decoder(talkative, torch.float32), BUCKETS, min_rows=30)
    greedy = SamplingParams(max_new_tokens=20, ignore_eos=True)
    with engine_on(talkative, {"capacity": 64}, graphed, monkeypatch) as engine:
        plain = engine.generate([[3, 1, 4, 1]], greedy, PLAIN)[0]
        shapes = graphed.shapes
        looked = engine.generate([[3, 1, 4, 1]], greedy, LOOKAHEAD)[0]
    assert plain.token_ids == looked.token_ids and looked.usage.num_steps < plain.usage.num_steps
    assert len(shapes) == 1
    assert {replace(shape, slot=0) for shape in graphed.shapes} == {Shape(0, 32, ((64, 0),))}


class Operations(TorchDispatchMode):
    """Every operation, with its scalars and with the sizes and places of its tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        def describe(one: object) -> object:
            return (one.shape, one.stride(), one.storage_offset()) if isinstance(one, torch.Tensor) else one

        self.seen.append(str((func, tree_map(describe, (args, kwargs)))))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("policy", ["full", "sink", "streaming"])
@pytest.mark.parametrize("variant", ["llama-attention_bias", "mistral-window", "qwen3-rope-dynamic"])
def test_what_a_graph_holds_is_the_same_for_every_step_of_a_shape(tmp_path, variant, policy, monkeypatch) -> None:
    """The same operations on the same places, none of which waits for the device or reads host memory, however many
    rows and stored tokens there are and whatever the rows see."""
    make_model(variant).save_pretrained(tmp_path)
    graphed = GraphedDecoder(torch_decoder(tmp_path, torch.float32), row_buckets=(16,))
    stream = Stream(graphed, POLICIES[policy])
    recorded: dict[Shape, list[list[str]]] = {}
    run = graphed.decoder.run

    def watched(*arguments) -> torch.Tensor:
        with Operations() as operations, monkeypatch.context() as patch:
            patch.delattr(torch, "from_numpy")
            found = run(*arguments)
        recorded.setdefault(graphed.shapes[-1], []).append(operations.seen)
        return found

    monkeypatch.setattr(Decoder, "run", lambda self, *arguments: watched(*arguments))
    for start in range(0, 60, 6):
        stream.extend(some_text(6, seed=start), np.random.default_rng(start))
        stream.rows(some_text(5), [-1, 0, 0, 1, -1])
    assert all(seen == steps[0] for steps in recorded.values() for seen in steps)
    assert max(len(steps) for steps in recorded.values()) > 10
    names = " ".join(line for steps in recorded.values() for line in steps[0])
    for forbidden in ("_local_scalar_dense", "nonzero", "masked_select", "lift_fresh"):
        assert forbidden not in names


def test_a_graph_is_recorded_the_second_time_and_then_replayed(monkeypatch) -> None:
    """Only the order of things; no graph is made here."""
    events: list[str] = []
    stream = SimpleNamespace(device="cuda:0", wait_stream=lambda other: events.append("wait"))
    for name, stand_in in {
        "current_stream": lambda device: stream,
        "stream": lambda _: nullcontext(),
        "CUDAGraph": lambda: SimpleNamespace(replay=lambda: events.append("replay")),
        "graph": lambda *_, **__: nullcontext(),
    }.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
    recorder = SimpleNamespace(stream=stream, pool=(0, 1))
    result = torch.zeros(1)

    def run() -> torch.Tensor:
        events.append("run")
        return result

    graph = Graph(run, recorder)  # type: ignore[arg-type]
    assert all(graph() is result for _ in range(4))
    assert events == ["wait", "run", "wait", "run", "replay", "replay", "replay"]
