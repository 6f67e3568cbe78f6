"""Streaming caches are exact: what the decoder computes over them is what a dense model computes with explicit masks
and distances, in float64, however the rows are cut into steps; and lookahead over them changes no token."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

from runtime import Config, Engine, LookaheadConfig, SamplingParams
from runtime.engine.scoring import Scorer
from runtime.equality import Equality
from runtime.errors import FieldError
from runtime.mesh.mesh import Mesh
from runtime.model.attention import RowBatch
from runtime.model.decoder import Decoder
from runtime.model.directory import load_spec
from runtime.model.kv_cache import KVCache
from runtime.model.loader import load_decoder
from runtime.retention import layer_groups
from tests.models import save_tiny_model
from tests.oracles import POLICIES, SEPARATORS, Dense, kept_ratios, seen, some_text
from tests.runtime.engine.test_engine import PLAIN

LENGTH = 80
LINEAR = {"rope_type": "linear", "rope_theta": 1e4, "factor": 3.0}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 32}
MODELS = {
    "llama": ("Llama", {}),
    "llama-linear": ("Llama", {"rope_parameters": LINEAR}),
    "llama-yarn": ("Llama", {"rope_parameters": YARN, "max_position_embeddings": 128}),
    "qwen2": ("Qwen2", {"hidden_size": 64, "num_attention_heads": 8, "num_key_value_heads": 2}),
    "qwen3": ("Qwen3", {"tie_word_embeddings": True}),
}


@dataclass
class Model:
    directory: Path
    dense: Dense
    decoder: Decoder


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, Model]:
    """Every model, its decoder in float64."""
    found = {}
    for name, (architecture, settings) in MODELS.items():
        place = save_tiny_model(tmp_path_factory.mktemp(name), architecture=architecture, **settings)
        found[name] = Model(place, Dense(place), load_decoder(place, load_spec(place), Mesh(), torch.float64))
    return found


class Stream:
    """One sequence through a decoder, over caches of a policy."""

    def __init__(self, decoder: Decoder, cache: dict) -> None:
        section = Config.from_dict({"cache": cache}).cache
        groups = layer_groups(section, decoder.spec.num_layers, 512)
        self.decoder = decoder
        self.caches: tuple[KVCache, ...] = decoder.make_caches(groups, num_slots=2, max_staged=64)
        self.slot = 1

    @property
    def length(self) -> int:
        return self.caches[0].retained[self.slot].length

    @property
    def room(self) -> int:
        """Most tokens of a chain that the next step may hold."""
        return min(cache.retained[self.slot].horizon for cache in self.caches) - self.length

    def rows(self, tokens: list[int], parents: list[int]) -> torch.Tensor:
        """Logits [t, V] of rows behind what is committed."""
        positions: list[int] = []
        for parent in parents:
            positions.append(self.length if parent < 0 else positions[parent] + 1)
        count = len(tokens)
        arrays = (np.array(column) for column in (tokens, positions, parents, [self.slot] * count, [0] * count))
        batch = RowBatch.build(*arrays, device=self.caches[0].device)
        return self.decoder.logits(self.decoder.forward(batch, self.caches))

    def commit(self, rows: list[int], tokens: list[int]) -> None:
        for cache in self.caches:
            cache.commit(self.slot, rows, tokens)

    def extend(self, tokens: list[int], rng: np.random.Generator | None = None) -> torch.Tensor:
        """Logits [t, V] of the sequence's next tokens, run in chunks of random sizes or, without `rng`, singly."""
        found = []
        while tokens:
            count = min(len(tokens), self.room, 1 if rng is None else int(rng.integers(1, 40)))
            chunk, tokens = tokens[:count], tokens[count:]
            found.append(self.rows(chunk, list(range(-1, count - 1))))
            self.commit(list(range(count)), chunk)
        return torch.cat(found)


def difference(one: torch.Tensor, other: torch.Tensor) -> float:
    assert one.shape == other.shape
    return (one.double() - other.double()).abs().max().item()


@pytest.mark.parametrize(
    ("model", "policy"),
    [
        *(("llama", policy) for policy in POLICIES),
        *((name, policy) for name in MODELS if name != "llama" for policy in ("sink", "sep", "streaming")),
    ],
)
def test_streamed_logits_equal_a_dense_model(models, model, policy) -> None:
    """At every position of a text that is evicted from many times, token by token and in chunks."""
    cache, tokens = POLICIES[policy], some_text(LENGTH)
    expected = models[model].dense.logits(tokens, seen(cache, tokens))
    assert expected.std() > 0.5
    if model == "llama":
        assert difference(Stream(models[model].decoder, cache).extend(tokens), expected) < 1e-9
    chunked = Stream(models[model].decoder, cache)
    assert difference(chunked.extend(tokens, np.random.default_rng(3)), expected) < 1e-9
    if policy != "full":  # the case tells something only if the policy matters
        full = models[model].dense.logits(tokens, seen(POLICIES["full"], tokens))
        assert difference(expected[-1], full[-1]) > 1e-2


@pytest.mark.parametrize("separators", [0.0, 0.7, 1.0])
@pytest.mark.parametrize("policy", ["sep", "streaming", "streaming-after", "streaming-tight"])
def test_any_share_of_separators(models, policy, separators) -> None:
    cache, tokens = POLICIES[policy], some_text(LENGTH, seed=1, separators=separators)
    expected = models["llama"].dense.logits(tokens, seen(cache, tokens))
    stream = Stream(models["llama"].decoder, cache)
    assert difference(stream.extend(tokens, np.random.default_rng(4)), expected) < 1e-9


@pytest.mark.parametrize("full_layers", [(0,), (-1,), (0, -1), (0, 1, 2)], ids=str)
def test_full_layers_keep_every_token(models, full_layers) -> None:
    """Hybrid models, the paper's H, T and H/T, and all layers full."""
    cache, tokens = POLICIES["sep"] | {"full_layers": full_layers}, some_text(LENGTH, seed=2)
    expected = models["llama"].dense.logits(tokens, seen(cache, tokens), full_layers)
    for rng in (None, np.random.default_rng(5)):
        assert difference(Stream(models["llama"].decoder, cache).extend(tokens, rng), expected) < 1e-9
    others = models["llama"].dense.logits(tokens, seen(cache, tokens))
    assert difference(expected[-1], others[-1]) > 1e-2


@pytest.mark.parametrize("policy", ["full", "sink", "sep", "streaming", "streaming-tight"])
def test_float32_is_close(models, policy) -> None:
    place = models["llama"].directory
    decoder = load_decoder(place, load_spec(place), Mesh(), torch.float32)
    cache, tokens = POLICIES[policy], some_text(LENGTH, seed=3)
    expected = models["llama"].dense.logits(tokens, seen(cache, tokens))
    assert difference(Stream(decoder, cache).extend(tokens, np.random.default_rng(6)), expected) < 1e-4


@pytest.mark.parametrize("policy", POLICIES)
def test_tree_rows_equal_plain_sequences(models, policy) -> None:
    """A random tree at many lengths: each row sees what it would see if the rows before it had been stored singly."""
    cache, text = POLICIES[policy], some_text(80, seed=4)
    rng = np.random.default_rng(7)
    stream = Stream(models["llama"].decoder, cache)
    stream.extend(text[:2])
    num_deep = 0
    while stream.length < 45:
        prefix = text[: stream.length]
        tokens, parents, depths = some_text(14, seed=stream.length), [], []
        for row in range(14):
            parent = int(rng.integers(max(row - 3, -1), row))
            depth = 0 if parent < 0 else depths[parent] + 1
            if depth >= stream.room:
                parent, depth = -1, 0
            parents.append(parent)
            depths.append(depth)
        logits = stream.rows(tokens, parents)
        for row in (int(np.argmax(depths)), *rng.choice(14, 2).tolist()):
            path, ancestor = [], row
            while ancestor >= 0:
                path.append(tokens[ancestor])
                ancestor = parents[ancestor]
            whole = prefix + path[::-1]
            expected = models["llama"].dense.logits(whole, seen(cache, whole))[-1]
            assert difference(logits[row], expected) < 1e-9
            num_deep += depths[row] > 2
        stream.extend(text[stream.length : stream.length + int(rng.integers(3, 9))], rng)
    assert num_deep > 3


@pytest.mark.parametrize("policy", [name for name in POLICIES if name != "full"])
def test_an_accepted_path_continues_like_a_plain_sequence(models, policy) -> None:
    """Accepted rows stand apart in the step, with rejected ones between them; evictions and compactions follow."""
    cache, stream = POLICIES[policy], Stream(models["llama"].decoder, POLICIES[policy])
    text = some_text(18, seed=8)
    stream.extend(text)
    for seed in range(10, 22):
        count = min(stream.room, 3)
        path, wrong = some_text(count, seed), some_text(count, seed + 100)
        tokens = [token for pair in zip(wrong, path, strict=True) for token in pair]
        parents = [(row - 1) // 2 * 2 - 1 for row in range(2 * count)]
        logits = stream.rows(tokens, parents)[1::2]
        stream.commit(list(range(1, 2 * count, 2)), path)
        text += path
        expected = models["llama"].dense.logits(text, seen(cache, text))
        assert difference(logits, expected[-count:]) < 1e-9


@pytest.mark.parametrize("policy", [name for name in POLICIES if name != "full"])
def test_before_the_first_eviction_every_policy_equals_full(models, policy) -> None:
    cache, tokens = POLICIES[policy], some_text(40, seed=5)
    first = next(p for p, view in enumerate(seen(cache, tokens)) if len(view) <= p)
    assert first >= 8
    full = models["llama"].dense.logits(tokens, seen(POLICIES["full"], tokens))
    streamed = Stream(models["llama"].decoder, cache).extend(tokens)
    assert difference(streamed[:first], full[:first]) < 1e-9
    assert difference(streamed[first], full[first]) > 1e-6


@pytest.mark.parametrize("num_initial", [0, 4])
def test_fundamental_sep_without_separators_is_sink_with_original_positions(models, num_initial) -> None:
    sep = {"policy": "sep", "separators": SEPARATORS, "num_initial": num_initial, "num_neighbors": 10}
    sink = {"policy": "sink", "num_sinks": num_initial, "window": 10, "positions": "original"}
    tokens = some_text(LENGTH, seed=6, separators=0)
    one, other = (Stream(models["llama"].decoder, cache).extend(tokens) for cache in (sep, sink))
    assert difference(one, other) < 1e-9


@pytest.mark.parametrize("policy", ["sink", "sink-original", "streaming", "streaming-original", "streaming-tight"])
def test_eviction_per_turn_equals_a_dense_model(models, policy) -> None:
    cache, tokens = POLICIES[policy] | {"evict": "turn"}, some_text(60, seed=7)
    coming = {0: 10, 10: 4, 14: 5, 19: 1, 20: 3, 23: 1, 24: 1, 25: 1, 26: 1, 27: 1, 28: 1}
    tokens = tokens[:29]
    expected = models["llama"].dense.logits(tokens, seen(cache, tokens, coming))
    stream, found = Stream(models["llama"].decoder, cache), []
    for start, count in coming.items():
        for kv in stream.caches:
            kv.begin_turn(stream.slot, count)
        found.append(stream.extend(tokens[start : start + count], np.random.default_rng(start)))
    assert difference(torch.cat(found), expected) < 1e-9
    assert any(len(view) <= p for p, view in enumerate(seen(cache, tokens, coming)))


@pytest.mark.parametrize("policy", ["full", "sink", "sink-original", "sep", "streaming", "streaming-original"])
def test_a_models_own_sliding_window_counts_the_same_distances(tmp_path, policy) -> None:
    """What a query sees in such a layer is nearer than the layer's window, in the cache's frame or in the text's."""
    place = save_tiny_model(tmp_path, architecture="Mistral", sliding_window=22)
    decoder = load_decoder(place, load_spec(place), Mesh(), torch.float64)
    cache, tokens = POLICIES[policy], some_text(70, seed=11)
    load_spec(place).check_cache(Config.from_dict({"cache": cache}).cache)
    views = [{j: d for j, d in view.items() if d < 22} for view in seen(cache, tokens)]
    expected = Dense(place).logits(tokens, views)
    assert difference(Stream(decoder, cache).extend(tokens, np.random.default_rng(9)), expected) < 1e-9


@pytest.mark.parametrize("policy", ["sink-none", "streaming-no-initial"])
def test_millions_of_tokens_into_a_text_distances_are_exact(models, policy) -> None:
    """What is seen depends on distances alone: behind four million forgotten tokens a text reads as at the start."""
    place = models["llama"].directory
    decoder = load_decoder(place, load_spec(place), Mesh(), torch.float32)
    cache, tokens = POLICIES[policy], some_text(LENGTH, seed=9)
    stream = Stream(decoder, cache)
    for kv in stream.caches:
        kv.retained[stream.slot].length = 4_000_000
    expected = models["llama"].dense.logits(tokens, seen(cache, tokens))
    assert difference(stream.extend(tokens, np.random.default_rng(8)), expected) < 1e-4


def test_slots_do_not_touch_each_other(models) -> None:
    """Two sequences take turns in one cache."""
    for policy in ("sink", "sep", "streaming"):
        cache, stream = POLICIES[policy], Stream(models["llama"].decoder, POLICIES[policy])
        texts = {slot: some_text(70, seed=20 + slot) for slot in range(2)}
        found: dict[int, list[torch.Tensor]] = {0: [], 1: []}
        for start in range(0, 70, 10):
            for slot, text in texts.items():
                stream.slot = slot
                found[slot].append(stream.extend(text[start : start + 10], np.random.default_rng(start)))
        for slot, text in texts.items():
            expected = models["llama"].dense.logits(text, seen(cache, text))
            assert difference(torch.cat(found[slot]), expected) < 1e-9


# Scores


@pytest.mark.parametrize("chunk", [1, 7, 512])
def test_scores_are_the_dense_models_in_chunks_of_any_size(models, chunk) -> None:
    place, dense = models["llama"].directory, models["llama"].dense
    tokens = some_text(LENGTH, seed=12)
    first = Scorer(Config.from_dict({"model": {"path": str(place)}}), chunk=chunk)
    for policy in ("full", "sink", "sep", "streaming-after-original"):
        cache = POLICIES[policy]
        read: list[int] = []
        scorer = first.with_policy(Config.from_dict({"cache": cache}).cache)
        scorer.score(some_text(30, seed=13))  # leaves nothing behind
        score = scorer.score(tokens, on_progress=read.append)
        views = seen(cache, tokens)
        expected = dense.logits(tokens, views)[:-1].log_softmax(-1).gather(1, torch.tensor(tokens[1:])[:, None])
        assert np.abs(score.log_probs - expected[:, 0].numpy()).max() < 1e-4
        assert (score.kept_last, score.kept_sum) == pytest.approx(kept_ratios(views))
        assert read == sorted(read) and read[-1] == LENGTH


@pytest.mark.parametrize(
    ("cache", "length"),
    [({"capacity": 64}, 65), (POLICIES["sep"] | {"capacity": 32}, 300), (POLICIES["sink"] | {"evict": "turn"}, 17)],
    ids=["full", "sep", "sink-turn"],
)
def test_a_text_that_does_not_fit_is_refused(models, cache, length) -> None:
    scorer = Scorer(Config.from_dict({"model": {"path": str(models["llama"].directory)}, "cache": cache}), chunk=16)
    with pytest.raises(FieldError) as error:
        scorer.score(some_text(length))
    assert error.value.remedy


# Lookahead


TALKATIVE = 16
"""A vocabulary so small that texts repeat themselves and candidates are accepted."""


@pytest.fixture(scope="module")
def talkative(tmp_path_factory) -> tuple[Path, Dense]:
    place = save_tiny_model(tmp_path_factory.mktemp("talkative"), vocab_size=TALKATIVE, seed=1)
    return place, Dense(place)


def talk(length: int, seed: int) -> list[int]:
    return np.random.default_rng(seed).integers(0, TALKATIVE, length).tolist()


def in_talk(policy: str) -> dict:
    """A policy whose separators the small vocabulary has."""
    cache = POLICIES[policy]
    return cache | {"separators": (5, 9, 13)} if cache["policy"] == "sep" else cache


@pytest.mark.parametrize("policy", POLICIES)
def test_lookahead_equals_one_at_a_time_decoding(talkative, policy) -> None:
    """Greedy alone, sampled in company; and what is decoded greedily is what the dense model chooses.

    Accepted runs must have crossed what the test is about: an eviction between their first row and their last, or,
    where the cache is compacted at certain lengths, runs that were cut there.
    """
    place, dense = talkative
    cache = in_talk(policy)
    prompts = [talk(4, seed=1), talk(37, seed=2)]
    greedy = SamplingParams(max_new_tokens=36, ignore_eos=True)
    sampled = SamplingParams(max_new_tokens=36, ignore_eos=True, temperature=0.5, seed=3)
    scheduler = {"max_sequences": 2, "max_rows": 64}
    equality = Equality(dense.gap_under(cache))
    exact = Equality(dense.gap_under(cache), tolerance=0.0)  # with Gumbel noise in the balance, no gap excuses anything
    num_crossed = 0
    with Engine.from_config({"model": {"path": str(place)}, "cache": cache, "scheduler": scheduler}) as engine:
        for prompt in prompts:
            one = engine.generate([prompt], greedy, PLAIN)[0]
            looked = engine.generate(
                [prompt], greedy, LookaheadConfig(planner=False, window_size=5, ngram_size=4, row_budget=30)
            )[0]
            text = [*prompt, *one.token_ids]
            best = dense.logits(text, seen(cache, text))[len(prompt) - 1 : -1].argmax(-1).tolist()
            equality.compare(prompt, best, one.token_ids, "dense")
            equality.compare(prompt, one.token_ids, looked.token_ids, "lookahead")
            num_crossed += crossings(cache, prompt, looked)
        together = engine.generate(prompts, sampled, LookaheadConfig(planner=False, sources=("suffix",), row_budget=30))
        for prompt, looked in zip(prompts, together, strict=True):
            one = engine.generate([prompt], sampled, PLAIN)[0]
            exact.compare(prompt, one.token_ids, looked.token_ids, "in company")
            num_crossed += crossings(cache, prompt, looked)
    assert exact.num_tokens == 2 * 36
    assert equality.lossless and exact.lossless, (equality, exact)
    assert len(equality.divergences) <= 1
    assert policy == "full" or num_crossed > 2


def crossings(cache: dict, prompt: list[int], completion) -> int:
    """Accepted runs of more than one token whose last row, or the row after it, does not see all that the first saw."""
    text = [*prompt, *completion.token_ids]
    views = seen(cache, text)
    compacts = cache.get("design") == "streaming"
    count, start = 0, len(prompt) - 1
    for length in completion.run_lengths:
        stop = start + length  # rows start .. stop - 1 stood in one step
        if length > 1:
            lost_within = not views[start].keys() <= views[stop - 1].keys()
            assert not (compacts and lost_within), "a run went on over a compaction"
            count += not views[start].keys() <= views[min(stop, len(text) - 1)].keys() if compacts else lost_within
        start = stop
    return count
