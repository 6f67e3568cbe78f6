"""Logits that are NaN or infinite are the error of the request whose text reaches them, and of nothing else."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from runtime import Config, Engine, LookaheadConfig, SamplingParams
from runtime.engine.loop import EngineLoop
from runtime.request import FinishReason
from runtime.workers.pool import ProcessPool
from tests.models import save_tiny_model

PLAIN = LookaheadConfig(enabled=False)
AHEAD = LookaheadConfig(planner=False, window_size=4, ngram_size=3, guess_set_size=4, row_budget=24)
BROKEN = range(3, 256, 23)
"""Tokens without numbers. The model chooses them now and then, and guesses have them more often."""
SOUND, BAD = [10, 20, 30, 40], [10, BROKEN[2], 30]


@pytest.fixture(scope="module")
def broken(tmp_path_factory) -> Path:
    """A model whose embeddings of the BROKEN are NaN: whoever reads such a token has no numbers from there on."""
    return spoilt(tmp_path_factory.mktemp("broken"), "model.embed_tokens.weight", list(BROKEN), torch.nan)


def spoilt(directory: Path, name: str, rows: list[int] | slice, value: float) -> Path:
    path = save_tiny_model(directory, seed=5)
    weights = load_file(path / "model.safetensors")
    weights[name][rows] = value
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
    return path


def opened(path: Path, **model: object) -> Engine:
    return Engine.from_config(
        {
            "model": {"path": str(path), "device": "cpu", **model},
            "scheduler": {"max_sequences": 3, "max_rows": 96},
            "lookahead": {"planner": False},
        }
    )


KERNELS = [("native", "float32"), ("native", "bfloat16"), ("torch", "float32"), ("torch", "float16")]


@pytest.mark.parametrize(("kernels", "dtype"), KERNELS)
def test_lookahead_ends_where_one_token_at_a_time_does(broken, kernels, dtype):
    """Guesses without numbers stand in most steps; only those in the text matter."""
    reasons = set()
    with opened(broken, kernels=kernels, dtype=dtype) as engine:
        for temperature in (0.0, 1.0):
            for seed in range(5):
                sampling = SamplingParams(max_new_tokens=24, temperature=temperature, seed=seed)
                prompt = [token + seed for token in (11, 50, 11, 50, 97)]
                plain, ahead = (engine.generate([prompt], sampling, setting)[0] for setting in (PLAIN, AHEAD))
                assert (plain.token_ids, plain.finish_reason) == (ahead.token_ids, ahead.finish_reason)
                reasons.add(plain.finish_reason)
                if plain.finish_reason is FinishReason.ERROR:
                    assert plain.token_ids[-1] in BROKEN and "NaN" in plain.error and plain.error == ahead.error
                assert not set(plain.token_ids[:-1]) & set(BROKEN)
    assert {FinishReason.ERROR, FinishReason.LENGTH} <= reasons


@pytest.mark.parametrize("lookahead", [PLAIN, AHEAD], ids=["plain", "lookahead"])
@pytest.mark.parametrize("temperature", [0.0, 1.0], ids=["greedy", "sampled"])
def test_company_lives_on(broken, temperature, lookahead):
    sampling = SamplingParams(max_new_tokens=4, temperature=temperature)
    with opened(broken) as engine:
        alone = engine.generate([SOUND], sampling, lookahead)[0]
        found = engine.generate([BAD, SOUND, BAD, SOUND, BAD], sampling, lookahead)
        assert [one.finish_reason for one in found[::2]] == [FinishReason.ERROR] * 3
        assert all(one.token_ids == () and one.text == "" and one.usage.num_new_tokens == 0 for one in found[::2])
        assert [one.token_ids for one in found[1::2]] == [alone.token_ids] * 2


def test_the_loop_and_conversations_live_on(broken):
    with opened(broken) as engine:
        loop, ended = EngineLoop(engine), []
        try:
            sessions = [loop.open_session() for _ in range(2)]

            def turn(session, prompt):
                done = threading.Event()

                def take(output):
                    session.take(output)
                    if output.finish_reason is not None:
                        ended.append(output)
                        done.set()

                loop.submit(engine.make_request(prompt, SamplingParams(max_new_tokens=2), session=session), take)
                assert done.wait(30)
                return ended[-1]

            first = turn(sessions[0], SOUND)
            assert first.finish_reason is FinishReason.LENGTH
            assert turn(sessions[1], BAD).finish_reason is FinishReason.ERROR and "NaN" in ended[-1].error
            assert turn(sessions[0], SOUND).finish_reason is FinishReason.LENGTH
            assert turn(sessions[1], SOUND).finish_reason is FinishReason.ERROR  # it has the bad token in its text
            assert loop.failed is None and loop.stats.outcomes[FinishReason.ERROR] == 2
        finally:
            loop.close()


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize(("kernels", "dtype"), KERNELS)
def test_a_single_row_of_the_head(tmp_path, kernels, dtype, value):
    """Infinite weights times hidden values of both signs are NaN, whatever the kernel sums first."""
    path = spoilt(tmp_path, "lm_head.weight", [77], value)
    with opened(path, kernels=kernels, dtype=dtype) as engine:
        for seed in range(6):
            for temperature in (0.0, 1.0):
                sampling = SamplingParams(max_new_tokens=4, temperature=temperature, top_k=seed * 4)
                found = engine.generate([[seed, 9, 8]], sampling)[0]
                assert found.finish_reason is FinishReason.ERROR and found.token_ids == ()


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_overflow(tmp_path, dtype):
    """What float16 cannot hold: the same weights run in bfloat16."""
    path = spoilt(tmp_path, "model.layers.1.mlp.down_proj.weight", slice(None), 6e4)
    with opened(path, dtype=dtype) as engine:
        found = engine.generate([SOUND], SamplingParams(max_new_tokens=4))[0]
    assert (found.finish_reason is FinishReason.ERROR) is (dtype == "float16")
    assert dtype != "float16" or "overflow" in found.error


@pytest.mark.parametrize(("lp", "tp"), [(2, 1), (1, 2), (2, 2)])
@pytest.mark.system
def test_on_a_mesh(broken, lp, tp):
    config = Config.from_dict(
        {
            "model": {"path": str(broken), "device": "cpu"},
            "parallel": {"lp": lp, "tp": tp, "threads": 1},
            "scheduler": {"max_sequences": 2, "max_rows": 64},
            "lookahead": AHEAD.model_dump(),
        }
    )
    with Engine.from_config(config, ProcessPool()) as engine:
        for temperature in (0.0, 1.0):
            sampling = SamplingParams(max_new_tokens=24, temperature=temperature, seed=3)
            bad, plain = (engine.generate([prompt], sampling, PLAIN)[0] for prompt in (BAD, SOUND))
            company = engine.generate([SOUND, BAD, SOUND], sampling)
            assert bad.finish_reason is company[1].finish_reason is FinishReason.ERROR
            for ahead in company[::2]:
                assert (ahead.token_ids, ahead.finish_reason) == (plain.token_ids, plain.finish_reason)


EXTREMES = [
    {"top_p": 1e-300},
    {"top_p": 1e-45},
    {"top_k": 1},
    {"temperature": 100.0, "top_k": 1},
    {"temperature": 1e-5, "top_p": 1e-300, "top_k": 2**40},
    {"temperature": 1e-300},
    {"temperature": 5e-324},
    {"temperature": 1e-45, "top_p": 0.5},
    {"temperature": 1e-8, "top_k": 2**40},
]


@pytest.mark.parametrize("extreme", EXTREMES, ids=str)
def test_extreme_parameters_leave_the_largest_logit(tiny_model, extreme):
    with opened(tiny_model) as engine:
        greedy = engine.generate([SOUND], SamplingParams(max_new_tokens=12, ignore_eos=True))[0].token_ids
        sampling = SamplingParams(**{"temperature": 1.0, "max_new_tokens": 12, "ignore_eos": True} | extreme)
        for setting in (PLAIN, AHEAD):
            assert engine.generate([SOUND], sampling, setting)[0].token_ids == greedy


@pytest.mark.parametrize(
    "extreme",
    [
        {"temperature": 100.0},
        {"temperature": 0.01},
        {"top_k": 2**40, "seed": 2**63 - 1},
        {"top_k": 263, "top_p": 1 - 2**-53},
        {"max_new_tokens": 2**40, "stop_token_ids": tuple(range(0, 262, 3))},
    ],
    ids=str,
)
def test_extreme_parameters_are_lossless(tiny_model, extreme):
    sampling = SamplingParams(**{"temperature": 1.0, "max_new_tokens": 20} | extreme)
    with opened(tiny_model) as engine:
        plain, ahead = (engine.generate([SOUND], sampling, setting)[0] for setting in (PLAIN, AHEAD))
    assert plain.token_ids == ahead.token_ids and plain.finish_reason == ahead.finish_reason is not FinishReason.ERROR
