"""Rotary position embedding, angles computed in float64.

At a few million tokens float32 angles are off by a quarter radian; the tables of a step are tiny, so
the wider type costs nothing.
"""

from __future__ import annotations

import torch

from runtime.model.spec import RopeSpec

Tables = tuple[torch.Tensor, torch.Tensor]
"""cos and signed sin, [T, 1, d] each."""


class Rotary:
    def __init__(self, rope: RopeSpec, dtype: torch.dtype, device: torch.device) -> None:
        self.rope = rope
        self.dtype = dtype
        self.inv_freq = torch.tensor(rope.inv_freq, dtype=torch.float64, device=device)  # [d / 2]

    def tables(self, positions: torch.Tensor, lengths: torch.Tensor) -> Tables:
        """Tables for rows at `positions` [T] of sequences whose prompts have `lengths` [T] tokens."""
        angles = positions.double()[:, None] * self._inv_freq(positions, lengths)
        cos = (angles.cos() * self.rope.attention_scaling).to(self.dtype)
        sin = (angles.sin() * self.rope.attention_scaling).to(self.dtype)
        return torch.cat([cos, cos], dim=-1)[:, None], torch.cat([-sin, sin], dim=-1)[:, None]

    def _inv_freq(self, positions: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        """[1 or T, d / 2].

        Dynamic NTK: the base a token is rotated by follows the sequence's length when the token enters
        the cache, the prompt entering as a whole. So it depends on the token's position and the
        prompt's length alone, not on how many rows a step has.
        """
        dynamic = self.rope.dynamic
        if dynamic is None:
            return self.inv_freq[None]
        dim = 2 * len(self.inv_freq)
        seq_len = torch.maximum(positions + 1, lengths).clamp(min=dynamic.max_positions).double()
        stretch = dynamic.factor * seq_len / dynamic.max_positions - (dynamic.factor - 1)
        base = dynamic.theta * stretch ** (dim / (dim - 2))
        exponents = torch.arange(0, dim, 2, dtype=torch.float64, device=positions.device) / dim
        scaled = base[:, None] ** -exponents
        return torch.where(seq_len[:, None] > dynamic.max_positions, scaled, self.inv_freq)


def rotate(x: torch.Tensor, tables: Tables) -> torch.Tensor:
    """Rotate heads x [T, heads, d] whose pairs are (i, i + d/2), as Hugging Face checkpoints have them."""
    cos, sin = tables
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1), sin)
