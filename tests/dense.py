"""An independent reference for controlled decoding: transformers' model over the whole text, and its processors."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from transformers import (
    AutoModelForCausalLM,
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from runtime.config import SamplingParams
from runtime.model.sampler import gumbel


class DenseReference:
    """What a token at each position has to be, by a forward pass over the whole text in float32."""

    def __init__(self, directory: Path, tolerance: float = 1e-3) -> None:
        """`tolerance`: by how much a score may be below the best, where two orders of summation may differ."""
        self.model = AutoModelForCausalLM.from_pretrained(directory).eval()
        self.ends = self.model.generation_config.eos_token_id or []
        self.tolerance = tolerance

    @torch.inference_mode()
    def logits(self, text: Sequence[int]) -> torch.Tensor:
        """[len(text), V]"""
        return self.model(torch.tensor([list(text)])).logits[0].double()

    def scores(self, text: list[int], num_prompt: int, logits: torch.Tensor, sampling: SamplingParams) -> torch.Tensor:
        """Of the token behind `text`, whose prompt has `num_prompt` tokens. [V]"""
        logits = logits.clone()
        if len(text) - num_prompt < sampling.min_new_tokens:
            ends = [*sampling.stop_token_ids, *([] if sampling.ignore_eos else np.atleast_1d(self.ends).tolist())]
            logits[ends] = -torch.inf
        for token, bias in sampling.logit_bias.items():
            logits[token] += bias
        processors = LogitsProcessorList()
        if sampling.repetition_penalty != 1:
            processors.append(RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty))
        logits = processors(torch.tensor([text]), logits[None])[0]
        for token, count in Counter(text[num_prompt:]).items():
            logits[token] -= sampling.frequency_penalty * count + sampling.presence_penalty
        if sampling.temperature == 0:
            return logits
        warpers = LogitsProcessorList([TemperatureLogitsWarper(sampling.temperature)])
        if sampling.min_p:
            warpers.append(MinPLogitsWarper(sampling.min_p))
        if sampling.top_k:
            warpers.append(TopKLogitsWarper(sampling.top_k))
        if sampling.top_p < 1:
            warpers.append(TopPLogitsWarper(sampling.top_p))
        noise = gumbel(np.array([sampling.seed]), np.array([len(text)]), (0, len(logits)), logits.device)[0]
        return warpers(torch.tensor([text]), logits[None])[0] + noise

    def check(self, prompt: Sequence[int], answer: Sequence[int], sampling: SamplingParams) -> None:
        """Assert that every token of the answer is the best, or one that a rounding could make it."""
        text = [*prompt, *answer]
        logits = self.logits(text)
        for place, token in enumerate(answer, len(prompt)):
            scores = self.scores(text[:place], len(prompt), logits[place - 1], sampling)
            assert scores[token] >= scores.max() - self.tolerance, (place - len(prompt), token, int(scores.argmax()))
