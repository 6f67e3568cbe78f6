"""Two ranks on the one GPU, by way of the host: lookahead-parallel and tensor-parallel meshes give the tokens of one
process."""

from __future__ import annotations

import tempfile
from pathlib import Path

from runtime.config import Config, LookaheadConfig, SamplingParams
from runtime.engine.engine import Engine
from runtime.gpu_check.models import random_tokens, save_random_model
from runtime.gpu_check.setting import Report, Setting

MESHES = ((1, 1), (2, 1), (1, 2))


def check(setting: Setting) -> Report:
    """In float32, whose near-ties are rare. On a machine with several GPUs each rank has its own."""
    with tempfile.TemporaryDirectory() as folder:
        model = save_random_model(Path(folder), setting.is_tiny)
        answers = {mesh: tokens_of(setting, model, *mesh) for mesh in MESHES if not setting.is_late}
    expected = answers.get((1, 1))
    found: Report = {"meshes": {}, "ok": len(answers) == len(MESHES)}
    for (lp, tp), tokens in answers.items():
        alike = tokens == expected
        found["meshes"][f"{lp}x{tp}"] = alike
        found["ok"] = found["ok"] and alike
        setting.row(f"lp={lp} tp={tp}", "the same tokens" if alike else "WRONG: other tokens")
    return found


def tokens_of(setting: Setting, model: Path, lp: int, tp: int) -> list[tuple[int, ...]]:
    """Greedy and drawn, two at a time."""
    config = Config.from_dict(
        {
            "model": {"path": str(model), "device": setting.device.type, "dtype": "float32"},
            "parallel": {"lp": lp, "tp": tp},
            "scheduler": {"max_sequences": 2, "max_rows": 64},
            "cache": {"capacity": 512},
            "lookahead": LookaheadConfig(planner=False, row_budget=24, window_size=4).model_dump(),
        }
    )
    count = 8 if setting.is_tiny else 48
    prompts = [random_tokens(30, 256, seed) for seed in range(2)]
    with Engine.from_config(config) as engine:
        return [
            answer.token_ids
            for temperature in (0.0, 0.8)
            for answer in engine.generate(
                prompts, SamplingParams(max_new_tokens=count, temperature=temperature, seed=2, ignore_eos=True)
            )
        ]
