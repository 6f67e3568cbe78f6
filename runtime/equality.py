"""Token-for-token equality up to floating-point near-ties, every divergence measured and counted.

Where the two best logits nearly tie, summing in another order may pick the other one. So where two
outputs part, a reference model tells how far apart the logits of the two tokens are.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

Gap = Callable[[Sequence[int], int, int], float]
"""(tokens before, one candidate, the other) -> distance of their logits under a reference model."""


@dataclass(frozen=True)
class Divergence:
    """Where two outputs part."""

    label: str
    index: int
    """New tokens before it."""
    one: int
    other: int
    gap: float
    """Distance of the two tokens' logits; infinite where one output simply ended."""


@dataclass
class Equality:
    """Compares pairs of outputs and keeps count."""

    gap_of: Gap
    tolerance: float = 1e-4
    num_tokens: int = 0
    """Tokens compared, up to each first divergence."""
    divergences: list[Divergence] = field(default_factory=list)

    def compare(self, prompt: Sequence[int], one: Sequence[int], other: Sequence[int], label: str = "") -> None:
        """Compare two continuations of `prompt`, up to the first token where they part."""
        common = next((i for i, pair in enumerate(zip(one, other, strict=False)) if pair[0] != pair[1]), None)
        if common is None:
            self.num_tokens += min(len(one), len(other))
            if len(one) != len(other):
                self.divergences.append(Divergence(label, min(len(one), len(other)), -1, -1, float("inf")))
            return
        self.num_tokens += common
        gap = self.gap_of([*prompt, *one[:common]], one[common], other[common])
        self.divergences.append(Divergence(label, common, one[common], other[common], gap))

    @property
    def lossless(self) -> bool:
        """Every divergence is a near-tie."""
        return all(divergence.gap < self.tolerance for divergence in self.divergences)

    def __str__(self) -> str:
        gaps = ", ".join(f"{d.label or 'token'} {d.index}: {d.gap:.1e}" for d in self.divergences)
        return f"{self.num_tokens} tokens alike, {len(self.divergences)} divergences" + (f" ({gaps})" if gaps else "")


def hugging_face_gap(directory: str | Path) -> Gap:
    """Gaps by the Hugging Face model in `directory`, in float32."""
    import torch
    from transformers import AutoModelForCausalLM

    return gap_by(AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval())


def gap_by(model) -> Gap:  # type: ignore[no-untyped-def]
    """Gaps by a Hugging Face causal language model."""
    import torch

    @torch.inference_mode()
    def gap_of(context: Sequence[int], one: int, other: int) -> float:
        ids = torch.tensor([list(context)], device=model.device)
        logits = model(ids, attention_mask=torch.ones_like(ids)).logits[0, -1]
        return abs(float(logits[one] - logits[other]))

    return gap_of
