"""Which tokens a policy keeps and shows: the runtime's account equals lists that are played token by token.

The oracles themselves are checked first, against tables worked by hand and against Hugging Face.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

from runtime import Config
from runtime.retention import Ledger, Retention, layer_groups
from tests.models import save_tiny_model
from tests.oracles import POLICIES, SEPARATORS, Dense, Seen, kept_ratios, seen, some_text

PLAIN, DOT = 50, SEPARATORS[0]


# The oracles


def test_oracle_sinks_follow_the_papers_figure() -> None:
    """StreamingLLM, figure 4: four sinks and four tokens; token 9 sees 0 1 2 3 and 6 7 8 9, as places 0 to 7."""
    views = seen({"policy": "sink", "num_sinks": 4, "window": 4}, [PLAIN] * 10)
    assert views[2] == {0: 2, 1: 1, 2: 0}
    assert views[7] == {j: 7 - j for j in range(8)}
    assert views[9] == {0: 7, 1: 6, 2: 5, 3: 4, 6: 3, 7: 2, 8: 1, 9: 0}
    views = seen({"policy": "sink", "num_sinks": 4, "window": 4, "positions": "original"}, [PLAIN] * 10)
    assert views[9] == {0: 9, 1: 8, 2: 7, 3: 6, 6: 3, 7: 2, 8: 1, 9: 0}


def test_oracle_fundamental_design_by_hand() -> None:
    text = [DOT, PLAIN, PLAIN, DOT, PLAIN, PLAIN, DOT, PLAIN, PLAIN]
    cache = {"policy": "sep", "separators": [DOT], "num_initial": 2, "num_neighbors": 2}
    views = seen(cache, text)
    assert [sorted(view) for view in views[5:7]] == [[0, 1, 3, 4, 5], [0, 1, 3, 5, 6]]
    assert [sorted(view) for view in views[7:]] == [[0, 1, 3, 6, 7], [0, 1, 3, 6, 7, 8]]
    assert views[8] == {0: 8, 1: 7, 3: 5, 6: 2, 7: 1, 8: 0}


def test_oracle_streaming_design_by_hand() -> None:
    """a = 1, s = 2, w = 2, c = 6: once six tokens are stored, the past window gives up all but its dots."""
    text = [PLAIN, DOT, PLAIN, DOT, PLAIN, PLAIN, DOT, PLAIN, PLAIN, PLAIN]
    cache = {
        "policy": "sep",
        "design": "streaming",
        "separators": [DOT],
        "num_initial": 1,
        "max_separators": 2,
        "local": 2,
        "capacity": 6,
    }
    before = seen(cache, text)
    assert sorted(before[5]) == [0, 1, 2, 3, 4, 5]
    assert before[6] == {0: 5, 1: 4, 3: 3, 4: 2, 5: 1, 6: 0}  # 0 1 3 4 5 stayed, and that makes six again
    assert before[7] == {0: 5, 1: 4, 3: 3, 5: 2, 6: 1, 7: 0}
    assert before[8] == {0: 5, 1: 4, 3: 3, 6: 2, 7: 1, 8: 0}
    assert before[9] == {0: 5, 3: 4, 6: 3, 7: 2, 8: 1, 9: 0}  # 6 became a separator, and 1 made room
    after = seen(cache | {"compact_at": "after"}, text)
    assert sorted(after[6]) == [0, 1, 2, 3, 4, 5, 6]
    assert after[7] == {0: 5, 1: 4, 3: 3, 5: 2, 6: 1, 7: 0}
    assert after[8] == {0: 6, 1: 5, 3: 4, 5: 3, 6: 2, 7: 1, 8: 0}
    assert after[9] == {0: 5, 3: 4, 6: 3, 7: 2, 8: 1, 9: 0}
    assert seen(cache | {"positions": "original"}, text)[9] == {0: 9, 3: 6, 6: 3, 7: 2, 8: 1, 9: 0}


def test_oracle_eviction_per_turn_by_hand() -> None:
    """Four to come, two stored, room for eight: nothing goes. Then four more, six stored: sinks and two others stay."""
    cache = {"policy": "sink", "num_sinks": 2, "window": 6, "evict": "turn"}
    views = seen(cache, [PLAIN] * 14, {0: 2, 2: 4, 6: 4, 10: 4})
    assert views[5] == {j: 5 - j for j in range(6)}
    assert views[6] == {0: 4, 1: 3, 4: 2, 5: 1, 6: 0}
    assert views[9] == {0: 7, 1: 6, 4: 5, 5: 4, 6: 3, 7: 2, 8: 1, 9: 0}
    assert views[13] == {0: 7, 1: 6, 8: 5, 9: 4, 10: 3, 11: 2, 12: 1, 13: 0}
    with pytest.raises(OverflowError):
        seen(cache, [PLAIN] * 9, {0: 1, 1: 8})


LINEAR = {"rope_type": "linear", "rope_theta": 1e4, "factor": 3.0}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 32}


@pytest.mark.parametrize(
    ("architecture", "settings"),
    [
        ("Llama", {}),
        ("Llama", {"attention_bias": True, "rope_parameters": LINEAR}),
        ("Llama", {"rope_parameters": YARN, "max_position_embeddings": 128}),
        ("Qwen2", {"hidden_size": 64, "num_attention_heads": 8, "num_key_value_heads": 2}),
        ("Qwen3", {"tie_word_embeddings": True}),
    ],
    ids=["llama", "llama-linear", "llama-yarn", "qwen2", "qwen3"],
)
@pytest.mark.slow
def test_oracle_model_equals_hugging_face(tmp_path, architecture, settings) -> None:
    """All tokens seen; half of them hidden; every distance doubled. Hugging Face keeps norms and angles in float32."""
    from transformers import AutoModelForCausalLM

    save_tiny_model(tmp_path, architecture=architecture, **settings)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float64, attn_implementation="eager")
    dense, tokens = Dense(tmp_path), some_text(40)
    full = seen({"policy": "full"}, tokens)
    sparse = seen(POLICIES["sep"], tokens)
    doubled = [{j: 2 * distance for j, distance in view.items()} for view in full]
    mask = torch.full((1, 1, 40, 40), float("-inf"), dtype=torch.float64)
    for query, view in enumerate(sparse):
        mask[..., query, list(view)] = 0
    assert (mask[0, 0].tril() < 0).any()
    ids, places = torch.tensor([tokens]), torch.arange(40)[None]
    with torch.inference_mode():
        for views, expected in (
            (full, model(ids)),
            (sparse, model(ids, attention_mask=mask, position_ids=places)),
            (doubled, model(ids, position_ids=2 * places)),
        ):
            assert (dense.logits(tokens, views) - expected.logits[0]).abs().max() < 5e-5
            assert expected.logits.std() > 0.5


# The runtime's account


def config_of(cache, **sections) -> Config:
    return Config.from_dict({"cache": cache, **sections})


def retention_of(cache) -> Retention:
    (group,) = layer_groups(config_of(cache).cache, 1, 512)
    return group.new()


def account(retention: Retention, tokens: list[int], rng: np.random.Generator | None = None) -> Seen:
    """What each token sees by the runtime's account, committed in chunks of random sizes or, without `rng`, singly.

    The keys of a chunk are those stored and, at their true distance, those of the chunk itself.
    """
    views: Seen = []
    while len(views) < len(tokens):
        start = len(views)
        stop = min(start + (1 if rng is None else int(rng.integers(1, 40))), len(tokens), retention.horizon)
        assert start < stop, "no progress"
        chunk = np.array(tokens[start:stop])
        queries = np.arange(start, stop)
        keys = np.concatenate([retention.positions, queries])
        anchored = np.concatenate([retention.anchored, retention.may_anchor(queries, chunk)])
        sees = retention.sees(queries, keys, anchored)
        visible = np.ones((len(queries), len(keys)), bool) if sees is None else sees
        visible = visible & (keys <= queries[:, None])
        num_slots = retention.num_slot_anchors
        slots = retention.slots(queries) if num_slots else queries
        for row, query in enumerate(queries.tolist()):
            distances = query - keys
            distances[:num_slots] = slots[row] - np.arange(num_slots)
            views.append({int(keys[k]): int(distances[k]) for k in np.flatnonzero(visible[row])})
        assert retention.num_seen(chunk).tolist() == [len(view) for view in views[start:]]
        retention.commit(chunk)
        assert retention.length == stop and retention.num_stored <= retention.max_stored
    return views


TEXTS = {
    "random": some_text(150),
    "no-separators": some_text(150, separators=0),
    "separators-only": some_text(150, separators=1),
    "many-separators": some_text(150, separators=0.6),
    "early-separators": [*some_text(30, separators=0.7), *some_text(100, separators=0)],
    "late-separators": [*some_text(60, separators=0), *some_text(90, separators=0.7)],
    "c": some_text(20),
    "c+1": some_text(21),
    "c+2": some_text(22),
    "one": [5],
}


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("name", POLICIES)
def test_retained_tokens_equal_the_oracle_at_every_step(name, text) -> None:
    cache, tokens = POLICIES[name], TEXTS[text]
    expected = seen(cache, tokens)
    assert account(retention_of(cache), tokens) == expected
    for seed in range(3):
        assert account(retention_of(cache), tokens, np.random.default_rng(seed)) == expected
    if len(tokens) > 100 and not (name.startswith("sep") and text == "separators-only"):
        assert (len(expected[-1]) < len(tokens)) == (name != "full")


def test_a_reset_sequence_starts_anew() -> None:
    for cache in POLICIES.values():
        retention = retention_of(cache)
        account(retention, TEXTS["random"])
        retention.reset()
        assert account(retention, TEXTS["many-separators"]) == seen(cache, TEXTS["many-separators"])


@pytest.mark.parametrize("name", POLICIES)
def test_bounded_policies_stay_bounded(name) -> None:
    """After 5,000 tokens no more is stored than after 200, except under full and where every separator is kept."""
    cache = POLICIES[name]
    retention, tokens = retention_of(cache), some_text(5000, separators=0 if name.startswith("sep") else 0.2)
    most = 0
    for start in range(0, len(tokens), 8):
        retention.commit(tokens[start : start + 8]) if retention.horizon > start + 8 else [
            retention.commit([token]) for token in tokens[start : start + 8]
        ]
        most = max(most, retention.num_stored) if start < 200 else most
        assert name == "full" or retention.num_stored <= max(most, 64)


def test_merged_and_multi_byte_separators_by_id_are_separators() -> None:
    """Separators are ids, whatever their text."""
    cache = POLICIES["sep"] | {"separators": (0, 200, 261)}
    tokens = some_text(60, vocabulary=262)
    tokens[10], tokens[15], tokens[20] = 200, 261, 0
    views = account(retention_of(cache), tokens)
    assert {10, 15, 20} <= set(views[-1]) and views == seen(cache, tokens)


# Conversations


@pytest.mark.parametrize(
    "name",
    ["sink", "sink-original", "sink-none", "streaming", "streaming-original", "streaming-tight", "streaming-recent"],
)
def test_eviction_per_turn_equals_the_oracle(name) -> None:
    cache = POLICIES[name] | {"evict": "turn"}
    size = config_of(cache).cache.size
    rng = np.random.default_rng(1)
    num_compactions = 0
    for seed in range(20):
        tokens, turns = some_text(120, seed), {}
        retention = retention_of(cache)
        views: Seen = []
        while len(views) < len(tokens):
            start, coming = len(views), int(rng.integers(1, 9))
            turns[start] = coming
            num_compactions += retention.begin_turn(coming) is not None
            try:
                expected = seen(cache, tokens[: start + coming], turns)
            except OverflowError:
                assert retention.num_stored + coming > size
                break
            assert retention.num_stored + coming <= size
            used = int(rng.integers(1, coming + 1))  # an answer may end early
            part = account_from(retention, tokens[start : start + used])
            views += part
            assert views == expected[: len(views)]
    assert num_compactions > 20


def account_from(retention: Retention, tokens: list[int]) -> Seen:
    """`account` of one turn in one chunk, behind what is stored."""
    queries = np.arange(retention.length, retention.length + len(tokens))
    keys = np.concatenate([retention.positions, queries])
    assert retention.sees(queries, keys, np.zeros(len(keys), bool)) is None
    num_slots = retention.num_slot_anchors
    views = []
    for query, slot in zip(queries.tolist(), retention.slots(queries).tolist(), strict=True):
        visible = keys[keys <= query]
        distances = query - visible
        distances[:num_slots] = slot - np.arange(num_slots)
        views.append(dict(zip(visible.tolist(), distances.tolist(), strict=True)))
    retention.commit(tokens)
    return views


# The coordinator's ledger


@pytest.mark.parametrize("name", [name for name in POLICIES if name != "full"])
def test_kept_ratios_equal_the_oracle(name) -> None:
    cache = config_of(POLICIES[name]).cache
    tokens = TEXTS["random"]
    ledger = Ledger(layer_groups(cache, 3, 512), None)
    assert (ledger.kept_last, ledger.kept_sum) == (1, 1)
    for stop in range(1, len(tokens) + 1):
        ledger.commit(tokens[stop - 1 : stop])
        assert (ledger.kept_last, ledger.kept_sum) == pytest.approx(kept_ratios(seen(POLICIES[name], tokens[:stop])))


def test_kept_ratios_are_averaged_over_layers() -> None:
    cache = config_of(POLICIES["sep"] | {"full_layers": (0, -1)}).cache
    tokens = TEXTS["random"]
    groups = layer_groups(cache, 4, 512)
    assert sorted(group.layers for group in groups) == [(0, 3), (1, 2)]
    ledger = Ledger(groups, None)
    for start in range(0, len(tokens), 7):
        ledger.commit(tokens[start : start + 7])
    last, total = kept_ratios(seen(POLICIES["sep"], tokens))
    assert (ledger.kept_last, ledger.kept_sum) == pytest.approx(((last + 1) / 2, (total + 1) / 2))


@pytest.mark.parametrize(
    ("cache", "full_layers"), [("full", ()), ("sep", ()), ("sep-no-initial", ()), ("sep", (1,))], ids=str
)
def test_a_bounded_sequence_is_full_when_a_token_sees_its_capacity(cache, full_layers) -> None:
    """With full layers, all tokens count."""
    settings = POLICIES[cache] | {"capacity": 32} | ({"full_layers": full_layers} if full_layers else {})
    tokens = TEXTS["random"]
    views = seen(POLICIES["full"] if full_layers else settings, tokens)
    expected = next(p for p, view in enumerate(views) if len(view) == 32)
    ledger = Ledger(layer_groups(config_of(settings).cache, 2, 32), 32)
    assert ledger.full_at(tokens) == expected
    ledger.commit(tokens[:20])
    assert ledger.full_at(tokens[20:]) == expected - 20
    assert ledger.full_at(tokens[20:22]) == 2
