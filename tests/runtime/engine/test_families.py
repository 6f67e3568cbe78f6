"""Every family decodes with lookahead what it decodes one token at a time, under every cache policy it allows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from runtime import Engine, SamplingParams
from tests.models import save_tiny_model

SHARED: dict[str, Any] = {"num_hidden_layers": 2}
NEOX = {"num_key_value_heads": 9, "hidden_act": "gelu"}
PHI3 = {
    "sliding_window": None,
    "pad_token_id": None,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5},
}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "neox": ("GPTNeoX", NEOX),
    "phi3": ("Phi3", PHI3),
    "olmo2": ("Olmo2", {"pad_token_id": None}),
    "gemma3": (
        "Gemma3",
        {
            **{"pad_token_id": None, "sliding_window": 32, "query_pre_attn_scalar": 12, "tie_word_embeddings": True},
            "layer_types": ["sliding_attention", "full_attention"],
        },
    ),
}
POLICIES: dict[str, dict[str, Any]] = {
    "full": {},
    "sink": {"policy": "sink", "num_sinks": 2, "window": 18},
    "sep": {"policy": "sep", "num_neighbors": 12, "full_layers": [0]},
    "streaming": {
        **{"policy": "sep", "design": "streaming", "num_initial": 2},
        **{"max_separators": 4, "local": 12, "capacity": 24},
    },
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    found = {}
    for name, (architecture, settings) in FAMILIES.items():
        folder = tmp_path_factory.mktemp(name)
        found[name] = save_tiny_model(folder, architecture=architecture, **SHARED, **settings)
    return found


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("family", FAMILIES)
def test_lookahead_equals_one_token_at_a_time(models, family, policy) -> None:
    prompts = ["ab, ab. cd; ab, ab. ", "The cat. The cat, the"]
    texts = []
    for lookahead in ({"enabled": False}, {"planner": False, "row_budget": 24, "window_size": 3, "ngram_size": 3}):
        config = {"model": {"path": str(models[family])}, "cache": POLICIES[policy], "lookahead": lookahead}
        with Engine.from_config(config) as engine:
            params = [SamplingParams(max_new_tokens=40), SamplingParams(max_new_tokens=40, temperature=0.9, seed=7)]
            answers = [answer for param in params for answer in engine.generate(prompts, param)]
            texts.append([answer.token_ids for answer in answers])
            steps = [answer.usage.num_steps for answer in answers]
    assert texts[0] == texts[1]
    assert min(map(len, texts[0])) > 0 and min(steps) < 40  # something was guessed
