"""KVCache: the keys and values of every sequence slot, for a group of layers on one tensor-parallel rank.

A slot holds the tokens that its policy has kept (runtime/retention.py), and behind them the rows that the
current step staged. Whether a staged row becomes part of the sequence is known only after verification:
`commit` moves the accepted rows up and drops what the policy no longer keeps, and the next step writes
over the rest.
"""

from __future__ import annotations

import errno
import itertools
import math
import mmap
import platform
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass

import numpy as np
import torch

from runtime import core
from runtime.errors import ConfigError
from runtime.machine import memory_bytes
from runtime.mesh.device import upload
from runtime.mesh.mesh import Mesh
from runtime.model.rotary import Rotary
from runtime.model.shard import HeadShard
from runtime.model.spec import ModelSpec
from runtime.retention import Compaction, LayerGroup


@dataclass(frozen=True)
class Stage:
    """Where one step's t rows of a sequence go, and the n + t tokens stored then: views, one per layer."""

    rows: tuple[torch.Tensor, ...]
    """[2, num_kv_heads, t, head_dim] each: keys and values, to be written."""
    keys: tuple[torch.Tensor, ...]
    """[num_kv_heads, head_dim, n + t] each: transposed, as the scores want them."""
    values: tuple[torch.Tensor, ...]
    """[num_kv_heads, n + t, head_dim] each."""

    def write(self, layer: int, keys_values: torch.Tensor) -> None:
        """Stage the rows' keys and values [2, num_kv_heads, t, head_dim] of a layer."""
        self.rows[layer].copy_(keys_values)


@dataclass(frozen=True)
class FixedStage(Stage):
    """The same over a fixed number of columns, in which the rows may stand anywhere; `rows` are all columns."""

    places: torch.Tensor
    """[t] int64, on the device: the column of each row, read anew whenever rows are written."""

    def write(self, layer: int, keys_values: torch.Tensor) -> None:
        self.rows[layer].index_copy_(2, self.places, keys_values)


class KVCache:
    """One buffer [num_slots, num_layers, 2, num_kv_heads, max_stored + max_staged, head_dim].

    Tokens stand in the order of their positions, without gaps, their keys rotated at their own positions,
    or, where retention moves anchors to other slots, at those; such keys are kept as they were stored,
    too, so that turning them again and again adds up no rounding. On the CPU pages get memory only when
    they are first written, so a large capacity costs nothing until sequences are that long.
    """

    def __init__(
        self,
        group: LayerGroup,
        num_slots: int,
        num_kv_heads: int,
        head_dim: int,
        max_staged: int,
        rotary: Rotary,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        """`max_staged`: most rows of one sequence in one step.

        Raises ConfigError if the machine cannot give that much memory.
        """
        self.layers = group.layers
        self.max_staged = max_staged
        self.finite = False
        """Whether no row of the buffer ever reads as NaN or infinity, those never written included (keep_finite)."""
        self.rotary = rotary
        self.retained = [group.new() for _ in range(num_slots)]
        """Per slot, which tokens of the sequence stand in it."""
        num_rows = self.retained[0].max_stored + max_staged
        shape = (num_slots, len(group.layers), 2, num_kv_heads, num_rows, head_dim)
        try:
            self.buffer = _memory(shape, dtype, device)
            turned = (num_slots, len(group.layers), num_kv_heads, self.retained[0].max_turned, head_dim)
            self.unturned = torch.empty(turned, dtype=dtype, device=device)
        except (RuntimeError, OSError) as error:
            size = math.prod(shape) * dtype.itemsize / 2**30
            problem = f"{num_slots} slots of that length need {size:.1f} GiB on {device}, which cannot be had"
            remedy = "Lower it or scheduler.max_sequences."
            raise ConfigError("cache.capacity", self.retained[0].max_stored, problem, remedy) from error
        row_bytes = head_dim * dtype.itemsize
        self._address, self._slot_bytes = self.buffer.data_ptr(), self.buffer.stride(0) * dtype.itemsize
        self._blocks = 2 * len(group.layers) * num_kv_heads, num_rows * row_bytes, row_bytes
        """Rows of a slot stand in so many blocks, of so many bytes, a row of each having so many."""

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
        """Room for `count` rows behind the stored tokens, for all layers at once."""
        assert count <= self.max_staged, f"{count} rows staged, room for {self.max_staged}"
        start = self.retained[slot].num_stored
        seen = self.buffer[slot, ..., : start + count, :]
        return Stage(seen[..., start:, :].unbind(0), seen[:, 0].mT.unbind(0), seen[:, 1].unbind(0))

    def fixed_stage(self, slot: int, num_columns: int, places: torch.Tensor) -> FixedStage:
        """The slot's first `num_columns` columns, whatever stands there; rows go where `places` [t] says."""
        assert num_columns <= self.buffer.shape[4], f"{num_columns} columns of {self.buffer.shape[4]}"
        columns = self.buffer[slot, ..., :num_columns, :]
        return FixedStage(columns.unbind(0), columns[:, 0].mT.unbind(0), columns[:, 1].unbind(0), places)

    def keep_finite(self) -> None:
        """Fill the memory with zeros, now and slot by slot when sequences end.

        For readers of `fixed_stage`: columns that no row sees have weight 0 there, but 0 * NaN is NaN. It gives every
        page of the buffer memory.
        """
        self.finite = True
        self.buffer.zero_()

    def commit(self, slot: int, staged: Sequence[int], tokens: Sequence[int]) -> None:
        """Make the staged rows with these indices (ascending) and token ids the next tokens of the sequence."""
        self._pull(slot, self.retained[slot].num_stored, staged)
        self._apply(slot, self.retained[slot].commit(tokens))

    def read_staged(self, slot: int, staged: Sequence[int]) -> torch.Tensor:
        """A copy [num_layers, 2, num_kv_heads, n, head_dim] of n staged rows, for another replica to `append`."""
        assert all(0 <= row < self.max_staged for row in staged)
        start = self.retained[slot].num_stored
        return self._read(slot, [start + row for row in staged])

    def empty_block(self, count: int) -> torch.Tensor:
        """Room for `count` tokens as `read_staged` gives them, to receive another replica's in."""
        _, num_layers, _, num_kv_heads, _, head_dim = self.buffer.shape
        return self.buffer.new_empty(num_layers, 2, num_kv_heads, count, head_dim)

    def append(self, slot: int, block: torch.Tensor, tokens: Sequence[int]) -> None:
        """Make tokens given as `read_staged` gives them the next ones of the sequence."""
        start, count = self.retained[slot].num_stored, block.shape[3]
        self.buffer[slot, ..., start : start + count, :] = block
        self._apply(slot, self.retained[slot].commit(tokens))

    def begin_turn(self, slot: int, num_coming: int) -> None:
        """Make room for a turn of so many tokens, where the policy evicts per turn."""
        self._apply(slot, self.retained[slot].begin_turn(num_coming))

    def reset(self, slot: int) -> None:
        """Empty the slot for another sequence."""
        self.retained[slot].reset()
        if self.finite:
            self.buffer[slot].zero_()  # an overflow in one sequence is not to reach the next

    def begin_as(self, slot: int, source: int, length: int) -> None:
        """Begin another sequence with the first `length` tokens of the one in `source`, which may be the slot itself.

        Of slots that keep every token."""
        assert length <= self.retained[source].num_stored, f"{length} tokens to reuse of fewer"
        if source != slot:
            self.reset(slot)
            self.buffer[slot, ..., :length, :] = self.buffer[source, ..., :length, :]
        self.retained[slot].reset()
        self.retained[slot].commit([0] * length)  # which they are makes no difference where all are kept

    def state(self, slot: int) -> list[int]:
        """Which tokens stand in the slot, for another replica to `restore`; what they are is in `contents`."""
        return self.retained[slot].state().tolist()

    def restore(self, slot: int, state: Sequence[int]) -> None:
        """Make room for another replica's tokens, which are still to be given by `refill`."""
        self.reset(slot)
        self.retained[slot].restore(state)

    def contents(self, slot: int) -> list[torch.Tensor]:
        """All that the slot's tokens have in memory."""
        retained = self.retained[slot]
        stored = self.buffer[slot, ..., : retained.num_stored, :]
        return [stored, self.unturned[slot, ..., : min(retained.num_slot_anchors, retained.max_turned), :]]

    def refill(self, slot: int, contents: Sequence[torch.Tensor]) -> None:
        """Write what `contents` of the same state are."""
        for own, other in zip(self.contents(slot), contents, strict=True):
            own.copy_(other)

    def clean(self, slot: int) -> None:
        """Forget the rows that the slot has staged, after those of a step that were NaN or infinite."""
        if self.finite:
            self.buffer[slot, ..., self.retained[slot].num_stored :, :].zero_()

    def _apply(self, slot: int, compaction: Compaction | None) -> None:
        """Close the gaps that dropped tokens leave, and turn the anchors' keys to their new positions."""
        assert self.retained[slot].num_stored <= self.retained[slot].max_stored, f"slot {slot} exceeds its capacity"
        if compaction is None:
            return
        kept, before, turns = compaction.kept.tolist(), compaction.num_turned_before, compaction.turns
        unturned = self.unturned[slot, ..., : len(turns), :]
        if len(turns):
            earlier = sum(row < before for row in kept[: len(turns)])
            fresh = self._read(slot, kept[earlier : len(turns)])[:, 0]
            rows = upload(np.asarray(kept[:earlier], np.int64), self.device)
            unturned.copy_(torch.cat([self.unturned[slot].index_select(2, rows), fresh], dim=2))
        self._pull(slot, 0, kept)
        if len(turns):
            self.buffer[slot, :, 0, :, : len(turns)] = self.rotary.turn(unturned, turns)

    def _pull(self, slot: int, start: int, rows: Sequence[int]) -> None:
        """Row start + i becomes what start + rows[i] was; `rows` are ascending."""
        if self.device.type == "cpu":
            core.pull_rows(self._address + slot * self._slot_bytes, *self._blocks, start, rows)
            return
        in_place = next((i for i, row in enumerate(rows) if row != i), len(rows))
        assert all(a < b for a, b in itertools.pairwise(rows)), "rows out of order"
        if moved := [start + row for row in rows[in_place:]]:
            self.buffer[slot, ..., start + in_place : start + len(rows), :] = self._read(slot, moved)

    def _read(self, slot: int, rows: Sequence[int]) -> torch.Tensor:
        index = upload(np.asarray(rows, np.int64), self.device)
        return self.buffer[slot].index_select(3, index)


def _memory(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """A buffer; on the CPU one of addresses only, whose pages get memory one by one when they are first written, which
    the system is not asked to set aside before. Raises OSError or RuntimeError where it cannot be had, or one slot
    alone exceeds the machine's memory."""
    if device.type != "cpu":
        return torch.empty(tuple(shape), dtype=dtype, device=device)
    size = math.prod(shape) * dtype.itemsize
    if size // shape[0] > memory_bytes():
        raise OSError(errno.ENOMEM, "more than the machine has")
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _not_set_aside()
    pages = mmap.mmap(-1, max(size, 1), flags=flags)
    if hasattr(mmap, "MADV_NOHUGEPAGE"):  # the first token of a slot would take megabytes in every layer and head
        with suppress(OSError):
            pages.madvise(mmap.MADV_NOHUGEPAGE)
    return torch.frombuffer(pages, dtype=dtype, count=math.prod(shape)).reshape(tuple(shape))


def _not_set_aside() -> int:
    """mmap's flag for memory that the system need not have when it is asked for; Python names it from 3.13 on."""
    on_linux = sys.platform == "linux" and platform.machine() in ("x86_64", "aarch64")
    return int(getattr(mmap, "MAP_NORESERVE", 0x4000 if on_linux else 0))


class CacheMaker:
    """What decoders of all kernels have in common: caches for their share of the heads."""

    spec: ModelSpec
    mesh: Mesh
    dtype: torch.dtype
    heads: HeadShard
    rotary: Rotary
    local_rotary: Rotary | None = None

    def rotary_of(self, layer: int) -> Rotary:
        """How a layer's heads are rotated."""
        is_local = self.local_rotary is not None and self.spec.sliding_windows[layer] is not None
        return self.local_rotary if is_local else self.rotary  # type: ignore[return-value]

    @property
    def num_kv_heads(self) -> int:
        """K, which this rank's KV caches are made for."""
        return self.heads.num_kv_heads

    def make_caches(self, groups: Sequence[LayerGroup], num_slots: int, max_staged: int) -> tuple[KVCache, ...]:
        """Empty caches, one per group of layers that keep the same tokens and rotate alike. Raises ConfigError without
        memory for them.

        `max_staged`: most rows of one sequence in one step.
        """
        sizes, place = (self.num_kv_heads, self.spec.head_dim, max_staged), (self.dtype, self.mesh.device)
        caches = []
        for group in groups:
            by_rotary: dict[Rotary, list[int]] = {}
            for layer in group.layers:
                by_rotary.setdefault(self.rotary_of(layer), []).append(layer)
            for rotary, layers in by_rotary.items():
                caches.append(KVCache(LayerGroup(tuple(layers), group.new), num_slots, *sizes, rotary, *place))
        return tuple(caches)
