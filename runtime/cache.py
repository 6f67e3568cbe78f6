"""KVCache: the keys and values of every sequence slot, on one tensor-parallel rank.

A slot holds `lengths[slot]` committed tokens, and behind them the rows that the current step staged.
Whether a staged row becomes part of the sequence is known only after verification: `commit` moves the
accepted rows up, and the next step writes over the rest.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from runtime.errors import ConfigError


@dataclass(frozen=True)
class Stage:
    """Where one step's t rows of a sequence go, and the L + t tokens they may see: views, one per layer."""

    rows: tuple[torch.Tensor, ...]
    """[2, num_kv_heads, t, head_dim] each: keys and values, to be written."""
    keys: tuple[torch.Tensor, ...]
    """[num_kv_heads, head_dim, L + t] each: transposed, as the scores want them."""
    values: tuple[torch.Tensor, ...]
    """[num_kv_heads, L + t, head_dim] each."""


class KVCache:
    """One buffer [num_slots, num_layers, 2, num_kv_heads, capacity + max_staged, head_dim].

    On the CPU its pages get memory only when they are first written, so a large capacity costs
    nothing until sequences are that long. Policy `full`: token i of a sequence stands at row i.
    """

    def __init__(
        self,
        num_slots: int,
        num_layers: int,
        num_kv_heads: int,
        head_dim: int,
        capacity: int,
        max_staged: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        """`capacity`: tokens per sequence; `max_staged`: most rows of one sequence in one step.

        Raises ConfigError if the machine cannot give that much memory.
        """
        self.capacity = capacity
        self.max_staged = max_staged
        shape = (num_slots, num_layers, 2, num_kv_heads, capacity + max_staged, head_dim)
        try:
            self.buffer = torch.empty(shape, dtype=dtype, device=device)
        except RuntimeError as error:
            size = math.prod(shape) * dtype.itemsize / 2**30
            problem = f"{num_slots} slots of that length need {size:.1f} GiB on {device}, which cannot be had"
            raise ConfigError("cache.capacity", capacity, problem, "Lower it or scheduler.max_sequences.") from error
        self.lengths = [0] * num_slots
        """Committed tokens per slot."""

    @property
    def dtype(self) -> torch.dtype:
        return self.buffer.dtype

    @property
    def num_kv_heads(self) -> int:
        return self.buffer.shape[3]

    @property
    def device(self) -> torch.device:
        return self.buffer.device

    def stage(self, slot: int, count: int) -> Stage:
        """Room for `count` rows behind the committed tokens, for all layers at once."""
        assert count <= self.max_staged, f"{count} rows staged, room for {self.max_staged}"
        start = self.lengths[slot]
        seen = self.buffer[slot, ..., : start + count, :]
        return Stage(seen[..., start:, :].unbind(0), seen[:, 0].mT.unbind(0), seen[:, 1].unbind(0))

    def commit(self, slot: int, staged: Sequence[int]) -> None:
        """Make the staged rows with these indices (ascending) the next tokens of the sequence."""
        start = self.lengths[slot]
        self._check_room(slot, len(staged))
        assert all(a < b for a, b in zip(staged, staged[1:], strict=False)), "staged rows out of order"
        in_place = next((i for i, row in enumerate(staged) if row != i), len(staged))
        moved = staged[in_place:]
        if moved:
            self.buffer[slot, ..., start + in_place : start + len(staged), :] = self.read_staged(slot, moved)
        self.lengths[slot] += len(staged)

    def read_staged(self, slot: int, staged: Sequence[int]) -> torch.Tensor:
        """A copy [num_layers, 2, num_kv_heads, n, head_dim] of n staged rows, for another replica to `append`."""
        start = self.lengths[slot]
        assert all(0 <= row < self.max_staged for row in staged)
        index = torch.tensor([start + row for row in staged], dtype=torch.long, device=self.device)
        return self.buffer[slot].index_select(3, index)

    def empty_block(self, count: int) -> torch.Tensor:
        """Room for `count` tokens as `read_staged` gives them, to receive another replica's in."""
        _, num_layers, _, num_kv_heads, _, head_dim = self.buffer.shape
        return self.buffer.new_empty(num_layers, 2, num_kv_heads, count, head_dim)

    def append(self, slot: int, block: torch.Tensor) -> None:
        """Add tokens given as `read_staged` gives them to the end of the sequence."""
        start, count = self.lengths[slot], block.shape[3]
        self._check_room(slot, count)
        self.buffer[slot, ..., start : start + count, :] = block
        self.lengths[slot] += count

    def reset(self, slot: int) -> None:
        """Empty the slot for another sequence."""
        self.lengths[slot] = 0

    def _check_room(self, slot: int, count: int) -> None:
        assert self.lengths[slot] + count <= self.capacity, f"slot {slot}: {count} more tokens exceed its capacity"
