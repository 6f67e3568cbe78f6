"""Token-for-token equality up to floating-point near-ties, every divergence checked and counted."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

Gap = Callable[[Sequence[int], int, int], float]
"""(tokens before, one candidate, the other) -> difference of their logits under a reference model."""


@dataclass
class Equality:
    """Compares pairs of outputs; a divergence must be a near-tie."""

    gap_of: Gap
    tolerance: float = 1e-4
    num_tokens: int = 0
    gaps: list[float] = field(default_factory=list)

    def check(self, prompt: Sequence[int], one: Sequence[int], other: Sequence[int], label: str = "") -> None:
        """Assert that both continue `prompt` alike up to the first near-tie."""
        for index, (left, right) in enumerate(zip(one, other, strict=False)):
            if left != right:
                gap = self.gap_of([*prompt, *one[:index]], left, right)
                assert gap < self.tolerance, f"{label}: token {index} is {left} or {right}, logits {gap:.2e} apart"
                self.gaps.append(gap)
                return
            self.num_tokens += 1
        assert len(one) == len(other), f"{label}: {len(one)} and {len(other)} tokens"


def reference_gap(directory) -> Gap:
    """Gaps by the Hugging Face model in `directory`, float32."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()

    @torch.inference_mode()
    def gap_of(context: Sequence[int], one: int, other: int) -> float:
        logits = model(torch.tensor([list(context)])).logits[0, -1]
        return abs(float(logits[one] - logits[other]))

    return gap_of
