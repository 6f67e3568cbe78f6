"""What a token sees in training is what it sees when it is decoded, row by row."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from runtime.config import CacheConfig
from runtime.retention import layer_groups
from runtime.training.attention import NAME, announced, register
from runtime.training.config import StridedConfig
from runtime.training.corpus import pack
from runtime.training.visibility import attended_share, mark, rules
from tests.oracles import SEPARATORS, seen, some_text

LENGTH, NUM_LAYERS = 48, 4
SINK = 100
SEP = {"policy": "sep", "separators": SEPARATORS, "num_neighbors": 8}
POLICIES = {
    "full": {"policy": "full"},
    "sink": {"policy": "sink", "num_sinks": 3, "window": 9},
    "sink-none": {"policy": "sink", "num_sinks": 0, "window": 8},
    "sink-one": {"policy": "sink", "num_sinks": 1, "window": 20},
    "sep": {**SEP, "num_initial": 3},
    "sep-no-initial": {**SEP, "num_initial": 0, "num_neighbors": 11},
    "sep-H": {**SEP, "full_layers": (0,)},
    "sep-T": {**SEP, "full_layers": (-1,)},
    "sep-H/T": {**SEP, "full_layers": (0, -1)},
}
DOCUMENTS = [some_text(length, seed=length, separators=0.25) for length in (70, 5, 31, 1, 17, 2, 90)]


def config_of(settings) -> CacheConfig:
    return CacheConfig.model_validate(settings)


def packed(sink: int | None = None):
    return pack(DOCUMENTS, LENGTH, fill=0, sink=sink)


def masks_of(policy, samples) -> torch.Tensor:
    """[layers, B, T, T] as the layers of a Llama get them from transformers."""
    from transformers import LlamaConfig
    from transformers.masking_utils import create_causal_mask

    register()
    config = LlamaConfig(hidden_size=8, num_attention_heads=2, num_hidden_layers=NUM_LAYERS)
    config._attn_implementation = NAME
    embedded = torch.zeros(*samples.tokens.shape, 8)
    columns = (samples.tokens, samples.positions, samples.documents)
    positions = torch.from_numpy(samples.positions).long()
    with announced(mark(policy, *columns, torch.device("cpu")), "dense"):
        found = create_causal_mask(config, embedded, None, None, positions)
    return torch.stack([found.of_rule[found.rule_of[layer]][:, 0] for layer in range(NUM_LAYERS)])


def pieces(samples):
    """(sample, start, stop) of each document's pieces, what fills up left out."""
    for sample, numbers in enumerate(samples.documents):
        borders = [0, *(np.flatnonzero(np.diff(numbers)) + 1), len(numbers)]
        for start, stop in zip(borders, borders[1:], strict=False):
            if numbers[start] >= 0:
                yield sample, int(start), int(stop)


@pytest.mark.parametrize("sink", [None, SINK], ids=["plain", "sink_token"])
@pytest.mark.parametrize("name", POLICIES)
def test_masks_of_packed_documents_equal_retention_row_by_row(name, sink) -> None:
    """Every piece is decoded one token at a time by the retention that serves it; nothing beyond the piece is seen."""
    cache, samples = config_of(POLICIES[name]), packed(sink)
    masks = masks_of(rules(cache, None, NUM_LAYERS, LENGTH), samples)
    rows = 0
    for group in layer_groups(cache, NUM_LAYERS, LENGTH):
        for sample, start, stop in pieces(samples):
            retention = group.new()
            for query in range(stop - start):
                shown = retention.sees(np.array([query]), retention.positions, retention.anchored)
                stored = retention.positions if shown is None else retention.positions[shown[0]]
                expected = np.zeros(LENGTH, np.bool_)
                expected[[start + position for position in (*stored.tolist(), query)]] = True
                for layer in group.layers:
                    assert np.array_equal(masks[layer, sample, start + query], expected), (sample, query, layer)
                    rows += 1
                retention.commit([int(samples.tokens[sample, start + query])])
    assert rows == NUM_LAYERS * (sum(map(len, DOCUMENTS)) + (0 if sink is None else len(list(pieces(samples)))))


@pytest.mark.parametrize("name", [name for name in POLICIES if "/" not in name and name not in ("sep-H", "sep-T")])
def test_masks_equal_an_oracle_that_shares_no_code(name) -> None:
    samples = packed()
    masks = masks_of(rules(config_of(POLICIES[name]), None, NUM_LAYERS, LENGTH), samples)[1]
    for sample, start, stop in pieces(samples):
        for query, view in enumerate(seen(POLICIES[name], samples.tokens[sample, start:stop].tolist())):
            assert set(np.flatnonzero(masks[sample, start + query]) - start) == set(view)


def test_strided_keeps_every_stride_th_token_of_a_document() -> None:
    strided, samples = StridedConfig(stride=5, num_initial=2, num_neighbors=3), packed()
    mask = masks_of(rules(CacheConfig(), strided, NUM_LAYERS, LENGTH), samples)[0]
    for sample, start, stop in pieces(samples):
        for query in range(stop - start):
            expected = {key for key in range(query + 1) if key < 2 or key % 5 == 0 or query - key < 3}
            assert set(np.flatnonzero(mask[sample, start + query]) - start) == expected


def test_attended_share_counts_what_the_masks_show() -> None:
    cache = config_of(POLICIES["sep-H"])
    policy, samples = rules(cache, None, NUM_LAYERS, LENGTH), pack([some_text(LENGTH)], LENGTH, fill=0)
    masks = masks_of(policy, samples)
    share = attended_share(policy, samples.tokens[0], samples.positions[0])
    assert share == pytest.approx(masks.sum().item() / (NUM_LAYERS * LENGTH * (LENGTH + 1) / 2))
    assert 0.3 < share < 1


def test_a_mask_is_not_made_without_a_batch() -> None:
    """Else a model would see what no policy shows it, or the future, and nobody would be told."""
    from transformers import LlamaConfig, LlamaForCausalLM

    register()
    config = LlamaConfig(
        hidden_size=8,
        intermediate_size=8,
        num_attention_heads=2,
        num_hidden_layers=1,
        vocab_size=11,
        attn_implementation=NAME,
    )
    model = LlamaForCausalLM(config)
    with pytest.raises(RuntimeError, match="no batch is announced"):
        model(torch.zeros(1, 4, dtype=torch.long))
    samples = packed()
    marks = mark(
        rules(CacheConfig(), None, 1, LENGTH), samples.tokens, samples.positions, samples.documents, torch.device("cpu")
    )
    with announced(marks, "dense"), pytest.raises(RuntimeError, match="the batch announced has shape"):
        model(torch.zeros(1, 4, dtype=torch.long))


@pytest.mark.parametrize("architecture", ["Llama", "Qwen2", "Mistral"])
def test_packed_documents_give_the_logits_of_each_alone(architecture) -> None:
    """Through the whole model, a sliding window of its own included; later tokens change nothing either."""
    import transformers

    register()
    sizes = dict(
        hidden_size=16, intermediate_size=24, num_attention_heads=4, num_key_value_heads=2, num_hidden_layers=2
    )
    windows = {"Qwen2": {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}}
    windows["Mistral"] = {"sliding_window": 6}
    config = getattr(transformers, f"{architecture}Config")(
        **sizes, vocab_size=101, initializer_range=0.3, attn_implementation=NAME, **windows.get(architecture, {})
    )
    torch.manual_seed(0)
    model = getattr(transformers, f"{architecture}ForCausalLM")(config).eval()
    policy = rules(config_of({**SEP, "full_layers": (0,)}), None, 2, LENGTH)

    @torch.no_grad()
    def logits(samples) -> torch.Tensor:
        columns = (samples.tokens, samples.positions, samples.documents)
        tokens, positions, _ = (torch.from_numpy(column).long() for column in columns)
        with announced(mark(policy, *columns, torch.device("cpu")), "dense"):
            return model(tokens, position_ids=positions).logits

    together = packed()
    found = logits(together)
    for sample, start, stop in pieces(together):
        for end in {stop, (start + stop + 1) // 2} - {start + 1}:  # a token alone makes no sample
            alone = logits(pack([together.tokens[sample, start:end]], end - start, fill=0))
            assert torch.allclose(found[sample, start:end], alone[0], atol=1e-4)
