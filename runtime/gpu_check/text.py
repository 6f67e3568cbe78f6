"""A trained model that was brought along: tokens per second, tokens per step, and whether lookahead changes any, beside
Hugging Face's `generate` in the same run."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch

from runtime.config import Config, SamplingParams
from runtime.engine.engine import Engine
from runtime.gpu_check.setting import Report, Setting
from runtime.tokenizer import Tokenizer

PROMPTS = (
    "Why is the sky blue?",
    "Write a Python function that returns the n-th Fibonacci number, and explain it line by line.",
    "Translate into French: The weather is fine today, and we shall walk along the river until the evening.",
)


def check(setting: Setting) -> Report:
    """One request at a time, in turns."""
    if setting.model is None:
        setting.row("trained model", "none was brought along", "--model DIRECTORY")
        return {"ok": True, "model": None}
    count = 8 if setting.is_tiny else 128
    found: Report = {"model": str(setting.model), "modes": {}}
    prompts: list[list[int]] = []
    for mode, model, scheduler in (
        ("as it comes", {}, {"max_rows": 512}),
        ("deterministic", {"deterministic": True}, {"max_rows": 64}),
    ):
        config = config_of(setting, model, scheduler)
        with Engine.from_config(config) as engine:
            prompts = [prompt_of(engine.tokenizer, text) for text in PROMPTS]
            found["modes"][mode] = of_engine = measured(engine, prompts, count, setting)
        ahead, plain = of_engine["ahead"], of_engine["plain"]
        gain = ahead["tokens_per_s"] / plain["tokens_per_s"]
        setting.row(f"{mode}: plain", f"{plain['tokens_per_s']:,.1f} tokens/s")
        note = f"S = {ahead['tokens_per_step']:.2f}, {gain:.2f} x plain"
        setting.row(f"{mode}: lookahead", f"{ahead['tokens_per_s']:,.1f} tokens/s", note)
        setting.row(f"{mode}: tokens alike", f"{of_engine['alike']} of {of_engine['total']}")
    if not setting.is_late:
        found["hugging_face"] = hugging_face(setting, prompts, count)
        setting.row("transformers generate", f"{found['hugging_face']:,.1f} tokens/s")
    exact = found["modes"]["deterministic"]
    found["ok"] = exact["alike"] == exact["total"]
    return found


def prompt_of(tokenizer: Tokenizer, text: str) -> list[int]:
    """As a chat, where the model knows such."""
    try:
        return list(tokenizer.encode_chat([{"role": "user", "content": text}]))
    except Exception:  # no chat template
        return list(tokenizer.encode(text))


def config_of(setting: Setting, model: dict[str, Any], scheduler: dict[str, Any]) -> Config:
    assert setting.model is not None
    dtype = str(setting.dtype).removeprefix("torch.")
    return Config.from_dict(
        {
            "model": {"path": str(setting.model), "device": setting.device.type, "dtype": dtype, **model},
            "scheduler": {"max_sequences": 1, **scheduler},
            "cache": {"capacity": 1024},
        }
    )


def measured(engine: Engine, prompts: Sequence[Sequence[int]], count: int, setting: Setting) -> Report:
    """Rounds over all prompts, lookahead on and off in turns; the first one makes kernels and records graphs."""
    sampling = SamplingParams(max_new_tokens=count, ignore_eos=True)
    seconds, steps, tokens = {True: 0.0, False: 0.0}, {True: 0, False: 0}, 0
    alike = total = 0
    for round_ in range(1 if setting.is_tiny else 3):
        for prompt in prompts:
            answers = {}
            for on in (True, False):
                started = time.perf_counter()
                lookahead = engine.config.lookahead.model_copy(update={"enabled": on})
                (answers[on],) = engine.generate([list(prompt)], sampling, lookahead)
                if round_ or setting.is_tiny:
                    seconds[on] += time.perf_counter() - started
                    steps[on] += answers[on].usage.num_steps
            one, other = answers[True].token_ids, answers[False].token_ids
            tokens += len(other) if round_ or setting.is_tiny else 0
            total += len(other)
            pairs = enumerate(zip(one, other, strict=True))
            alike += next((index for index, pair in pairs if pair[0] != pair[1]), len(other))
    kinds = {"ahead": True, "plain": False}
    speeds = {
        kind: {"tokens_per_s": tokens / seconds[on], "tokens_per_step": tokens / steps[on]}
        for kind, on in kinds.items()
    }
    return {**speeds, "alike": alike, "total": total}


def hugging_face(setting: Setting, prompts: Sequence[Sequence[int]], count: int) -> float:
    """Tokens per second of `generate`, greedy."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(setting.model, dtype=setting.dtype).to(setting.device).eval()
    seconds = 0.0
    for round_ in range(2):
        for prompt in prompts:
            ids = torch.tensor([list(prompt)], device=setting.device)
            options = {"max_new_tokens": count, "min_new_tokens": count, "do_sample": False}
            started = time.perf_counter()
            model.generate(ids, attention_mask=torch.ones_like(ids), pad_token_id=0, **options)
            setting.wait()
            seconds += time.perf_counter() - started if round_ else 0.0
    return count * len(prompts) / seconds
