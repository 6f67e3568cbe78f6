"""`model.deterministic`: lookahead changes no bit, and what could is refused."""

from __future__ import annotations

import os
import random
import shutil

import pytest

from runtime import Engine, LookaheadConfig, SamplingParams
from runtime.errors import ConfigError
from runtime.model import native
from tests.models import save_tiny_model

WORKS, REASON = native.available()
if not WORKS and not (os.environ.get("CI") and shutil.which("g++")):
    pytest.skip(REASON, allow_module_level=True)

PLAIN = LookaheadConfig(enabled=False)
WIDE = LookaheadConfig(planner=False, window_size=6, ngram_size=4, row_budget=70)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.slow
def test_deterministic_lookahead_equals_plain_to_the_last_token(tiny_model, dtype):
    """No near-tie is excused: in bfloat16 there would be many."""
    generator = random.Random(1)
    prompts = [generator.choices(range(256), k=generator.randint(1, 90)) for _ in range(6)]
    settings = {
        "model": {"path": str(tiny_model), "dtype": dtype, "deterministic": True},
        "lookahead": {"planner": False},
        "scheduler": {"max_sequences": 6, "max_rows": 480},
    }
    with Engine.from_config(settings) as engine:
        for temperature in (0.0, 0.7):
            sampling = SamplingParams(max_new_tokens=60, temperature=temperature, seed=2, ignore_eos=True)
            alone = [engine.generate([prompt], sampling, PLAIN)[0].token_ids for prompt in prompts]
            looked = [engine.generate([prompt], sampling, WIDE)[0] for prompt in prompts]
            assert [answer.token_ids for answer in looked] == alone
            assert [answer.token_ids for answer in engine.generate(prompts, sampling, WIDE)] == alone
            assert sum(answer.usage.num_steps for answer in looked) < 6 * 60


def test_deterministic_refuses_what_could_change_a_bit(tmp_path, tiny_model):
    gelu = save_tiny_model(tmp_path / "gelu", hidden_act="gelu")
    with pytest.raises(ConfigError, match="model.kernels"):
        Engine.from_config({"model": {"path": str(gelu), "deterministic": True}})
    with pytest.raises(ConfigError, match="model.kernels"):
        Engine.from_config({"model": {"path": str(tiny_model), "deterministic": True, "dtype": "float16"}})
    with pytest.raises(ConfigError, match="model.deterministic"):
        Engine.from_config({"model": {"path": str(tiny_model), "deterministic": True}, "parallel": {"tp": 3}})
    with pytest.raises(ConfigError, match="model.deterministic"):
        Engine.from_config({"model": {"path": str(tiny_model), "deterministic": True, "kernels": "torch"}})
