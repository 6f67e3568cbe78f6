"""The trained models, served: losses through Outrider under each policy, and of the strided baseline under its mask."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.training.runs import Plan, Scale
from runtime.config import CacheConfig, Config
from runtime.engine.scoring import Scorer
from runtime.retention import with_separator_ids
from runtime.tokenizer import Tokenizer
from runtime.training.config import StridedConfig
from runtime.training.corpus import Samples, pack
from runtime.training.visibility import attended_share, rules

Served = str
"""How a model is served: a policy within the trained length, or `N + rest` on streams beyond it."""
OWN = "own"
"""The policy that the checkpoint itself names."""
SINKS = (0, 1, 4)
SHARE_SAMPLES = 6
END_ID = 0
"""Of the tokenizer that the benchmark trains."""


@cache
def _tokenizer(folder: Path) -> Tokenizer:
    return Tokenizer(folder)


def _ids(file: Path, tokenizer: Path) -> list[int]:
    return _tokenizer(tokenizer).encode(file.read_text(encoding="utf-8"), add_special_tokens=False)


def samples_of(file: Path, tokenizer: Path, scale: Scale, sink: int | None = None) -> Samples:
    """As training packs the file. `sink`: the model's sink token."""
    return pack([[*_ids(file, tokenizer), END_ID]], scale.length, fill=END_ID, sink=sink)


def streams_of(file: Path, tokenizer: Path, scale: Scale) -> list[list[int]]:
    """Texts longer than the trained length, from places all over the file."""
    ids = _ids(file, tokenizer)
    starts = np.linspace(0, len(ids) - scale.stream_length, scale.streams).astype(int)
    return [ids[start : start + scale.stream_length] for start in starts]


def attended(
    cache: dict[str, Any], strided: dict[str, Any] | None, samples: Samples, tokenizer: Path, scale: Scale
) -> float:
    """The share of its past that a token sees under a policy, over whole samples."""
    section = with_separator_ids(CacheConfig.model_validate(cache), _tokenizer(tokenizer))
    policy = rules(section, None if strided is None else StridedConfig(**strided), 1, scale.length)
    chosen = range(0, len(samples), max(1, len(samples) // SHARE_SAMPLES))
    return float(
        np.mean([attended_share(policy, samples.tokens[i], samples.positions[i]) for i in list(chosen)[:SHARE_SAMPLES]])
    )


def losses(
    model: Path, plan: Plan, plans: list[Plan], validation: Path, streams: list[list[int]], scale: Scale
) -> dict[Served, float]:
    """Nats per token of a model under each way of serving it."""
    torch.set_num_threads(1)
    run: dict[str, Any] = {"model": {"path": str(model), "device": "cpu"}}
    found: dict[Served, float] = {}
    scorer = Scorer(Config.from_dict(run if plan.strided is None else {**run, "cache": {"policy": "full"}}))
    head = scorer.tokenizer.encode("")  # the sink token, where there is one
    samples = samples_of(validation, model, scale, head[0] if head else None)
    pieces = [row[numbers >= 0].tolist() for row, numbers in zip(samples.tokens, samples.documents, strict=True)]
    if plan.strided is None:
        found[OWN] = _loss(scorer, pieces)
    for other in plans:
        if other.strided is None and not other.sink_token:
            found[other.name] = _loss(scorer.with_policy(_section({"policy": "full", **other.cache})), pieces)
    for sinks in SINKS:
        section = _section({"policy": "sink", "num_sinks": sinks, "window": scale.length - sinks})
        found[f"{sinks} + rest"] = _loss(scorer.with_policy(section), [[*head, *ids] for ids in streams], scale.length)
    return found


def _section(settings: dict[str, Any]) -> CacheConfig:
    return CacheConfig.model_validate(settings)


def _loss(scorer: Scorer, texts: list[list[int]], behind: int = 0) -> float:
    """Mean over the tokens of all texts behind position `behind`."""
    return float(-np.concatenate([scorer.score(ids).log_probs[behind:] for ids in texts]).mean())
