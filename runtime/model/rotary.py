"""Rotary position embedding, angles computed in float64.

Features of a pair stand side by side, so that one complex product turns all heads at once. (Its last
bits do not depend on the number of rows if d/2 is a multiple of 8, the vector kernel's stride.) At a few
million tokens float32 angles are off by a quarter radian; the factors of a step are few, so the wider
type costs nothing.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from runtime.model.spec import RopeSpec


class Rotary:
    def __init__(self, rope: RopeSpec, device: torch.device) -> None:
        self.rope = rope
        self.inv_freq = torch.tensor(rope.inv_freq, dtype=torch.float64, device=device)  # [d / 2]

    def turns(self, positions: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        """Complex [T, d / 2] for rows at `positions` [T] of sequences whose prompts have `lengths` [T] tokens."""
        angles = positions.double()[:, None] * self._inv_freq(positions, lengths)
        return torch.polar(torch.full_like(angles, self.rope.attention_scaling), angles)

    def turn(self, keys: torch.Tensor, offsets: NDArray[np.int64]) -> torch.Tensor:
        """Rotated keys [..., n, d] as if each of the n had been rotated at a position `offsets` [n] further on."""
        angles = torch.from_numpy(offsets).to(keys.device).double()[:, None] * self.inv_freq
        wide = torch.promote_types(keys.dtype, torch.float32)
        pairs = torch.view_as_complex(keys.to(wide).unflatten(-1, (-1, 2)).contiguous())
        turned = pairs * torch.polar(torch.ones_like(angles), angles).to(wide.to_complex())
        return torch.view_as_real(turned).flatten(-2).to(keys.dtype)

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


def pairs_adjacent(heads: torch.Tensor, num_rotated: int | None = None) -> torch.Tensor:
    """Reorder heads [..., d] whose pairs are (i, i + d/2), as Hugging Face has them, to pairs (2i, 2i + 1).

    `num_rotated`: of heads that are rotated in part, the first features, whose pairs are (i, i + num_rotated/2); None:
    all. Done to the weights of queries and keys alike, it leaves their products as they were.
    """
    rotated, still = heads[..., :num_rotated], heads[..., heads.shape[-1] if num_rotated is None else num_rotated :]
    return torch.cat([rotated.unflatten(-1, (2, -1)).mT.flatten(-2), still], dim=-1)
