"""One layer's attention over paged caches, beside what it must give: float64, from a text, a policy and distances."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pytest
import torch

from runtime import Config
from runtime.model.attention import RowBatch
from runtime.model.cuda import jit
from runtime.model.cuda.arrays import CacheArrays
from runtime.model.cuda.attention import Parts, Tiling, attend, attend_eager
from runtime.model.cuda.heads import rotate_and_store, rotate_and_store_eager
from runtime.model.cuda.moves import move, move_eager
from runtime.model.cuda.paged_cache import PagedKVCache
from runtime.model.cuda.step_buffer import StepBuffer
from runtime.model.rotary import Rotary
from runtime.model.spec import RopeSpec
from runtime.retention import layer_groups
from tests.oracles import seen, some_text

needs_interpreter = pytest.mark.skipif(
    not jit.is_interpreted(), reason="Triton's interpreter is needed: pip install triton, and no CUDA device"
)

CPU = torch.device("cpu")

if jit.is_interpreted():  # most of the interpreter's time goes into these two
    from triton.runtime import interpreter

    interpreter.interpreter_builder.options = interpreter.InterpreterOptions(sanitize_overflow=False)
    _call = interpreter.InterpretedFunction.__call__

    def _call_inside(function: Any, *args: Any, **kwargs: Any) -> Any:
        """Our own functions, which kernels call, find the language replaced already."""
        if function.fn.__module__.startswith("runtime."):
            return function.rewrite()(*args, **kwargs)
        return _call(function, *args, **kwargs)

    interpreter.InterpretedFunction.__call__ = _call_inside


class Layer:
    """Sequences with random heads at every token, and steps over them by kernels or in torch."""

    def __init__(
        self,
        policy: Mapping[str, Any],
        kernels: bool,
        num_kv: int = 2,
        group: int = 2,
        head_dim: int = 8,
        window: int | None = None,
        num_slots: int = 3,
        num_rows: int = 32,
        num_pages: int | None = None,
        seed: int = 0,
    ) -> None:
        self.policy, self.window, self.kernels = policy, window, kernels
        self.num_kv, self.group, self.head_dim = num_kv, group, head_dim
        self.dtype = torch.float32 if kernels else torch.float64
        rope = RopeSpec(tuple(1e4 ** (-i / head_dim) for i in range(0, head_dim, 2)))
        self.frequencies = torch.tensor(rope.inv_freq, dtype=torch.float64)
        self.rotary = Rotary(rope, CPU)
        self.generator = torch.Generator().manual_seed(seed)
        capacity = {"capacity": 2048} if policy["policy"] in ("full",) or "num_neighbors" in policy else {}
        (groups,) = layer_groups(Config.from_dict({"cache": {**policy, **capacity}}).cache, 1, 2048)
        self.cache = PagedKVCache(
            groups, num_slots, num_kv, head_dim, num_rows, self.rotary, self.dtype, CPU, num_pages=num_pages
        )
        self.tiling = Tiling(block=16, num_parts=4)  # fewer parts than a GPU needs: the interpreter is slow
        self.step_buffer = StepBuffer(num_rows, [self.cache], window, self.tiling.rows_per_tile(group))
        self.texts: list[list[int]] = [[] for _ in range(num_slots)]
        self.heads: list[torch.Tensor] = [self.random(0) for _ in range(num_slots)]
        """Per slot, [n, H + 2K, d] of every token, float64, not rotated."""

    def random(self, count: int) -> torch.Tensor:
        """Heads that float32 holds exactly."""
        heads = torch.randn(count, self.num_kv * (self.group + 2), self.head_dim, generator=self.generator)
        return heads.double()

    def room(self, slot: int) -> int:
        return self.cache.retained[slot].horizon - len(self.texts[slot])

    def append(self, tokens: Sequence[int], slot: int = 0, heads: torch.Tensor | None = None) -> None:
        """Tokens enter the cache as those of another replica do."""
        tokens = list(tokens)
        heads = self.random(len(tokens)) if heads is None else heads
        while tokens:
            count = min(len(tokens), self.room(slot))
            new, start = heads[:count], len(self.texts[slot])
            positions = torch.arange(start, start + count)
            _, keys, values = new.split([self.num_kv * self.group, self.num_kv, self.num_kv], dim=1)
            turns = self.rotary.turns(positions, torch.zeros_like(positions))[:, None]
            keys = torch.view_as_real(torch.view_as_complex(keys.unflatten(-1, (-1, 2)).contiguous()) * turns)
            block = torch.stack([keys.flatten(-2), values]).transpose(1, 2)[None].to(self.dtype)
            self.cache.append(slot, block, tokens[:count])
            self._extend(slot, tokens[:count], new)
            tokens, heads = tokens[count:], heads[count:]

    def _extend(self, slot: int, tokens: Sequence[int], heads: torch.Tensor) -> None:
        self.texts[slot] += tokens
        self.heads[slot] = torch.cat([self.heads[slot], heads])

    def step(
        self,
        tokens: Sequence[int],
        parents: Sequence[int],
        slots: Sequence[int] | None = None,
        heads: torch.Tensor | None = None,
        by_kernels: bool | None = None,
    ) -> torch.Tensor:
        """[t, H, d] what attention gives for rows behind what is stored."""
        slots = [0] * len(tokens) if slots is None else slots
        self.rows = heads = self.random(len(tokens)) if heads is None else heads
        self.tokens, self.parents, self.slots = list(tokens), list(parents), list(slots)
        positions: list[int] = []
        for parent, slot in zip(parents, slots, strict=True):
            positions.append(len(self.texts[slot]) if parent < 0 else positions[parent] + 1)
        arrays = (np.array(column) for column in (tokens, positions, parents, slots, [0] * len(tokens)))
        batch = RowBatch.build(*arrays, device=CPU)
        buffer, cache = self.step_buffer, self.cache
        buffer.load(batch, [cache])
        shape = buffer.num_rows
        qkv = torch.zeros(shape, self.num_kv * (self.group + 2) * self.head_dim, dtype=self.dtype)
        qkv[: len(tokens)] = heads.flatten(1).to(self.dtype)
        by_kernels = self.kernels if by_kernels is None else by_kernels
        queries = torch.full((shape, self.num_kv * self.group, self.head_dim), torch.nan, dtype=self.dtype)
        out = queries.clone()
        (cached,) = buffer.cached
        slot_queries = queries.clone() if cache.has_slots else None
        parts = Parts.empty(shape, queries.shape[1], self.head_dim, self.tiling.num_parts, CPU)
        for scratch in (parts.mixed, parts.sums):
            scratch.fill_(torch.nan)
        keys, values = cache.buffer[0]
        (move if by_kernels else move_eager)(cache.buffer, buffer.moves[0], buffer.rows.lists)
        (rotate_and_store if by_kernels else rotate_and_store_eager)(
            qkv,
            self.turns(buffer.rows.positions),
            self.turns(cached.slots) if cache.has_slots else None,
            None,
            cached,
            keys,
            values,
            queries,
            slot_queries,
        )
        (attend if by_kernels else attend_eager)(
            queries,
            slot_queries,
            keys,
            values,
            buffer.rows,
            cached,
            None if cache.has_slots else self.window,
            cache.has_anchors,
            self.tiling,
            parts,
            out,
        )
        assert (out[len(tokens) :] == 0).all()
        return out[: len(tokens)]

    @property
    def arrays(self) -> CacheArrays:
        return self.step_buffer.cached[0]

    def turns(self, positions: torch.Tensor) -> torch.Tensor:
        turns = torch.view_as_real(self.rotary.turns(positions.long(), torch.zeros(len(positions))))
        return turns if self.dtype == torch.float64 else turns.float()

    def commit(self, rows: Sequence[int], slot: int = 0) -> None:
        """Accept rows of the last step, a path."""
        start = self.slots.index(slot)
        tokens = [self.tokens[row] for row in rows]
        self.cache.commit(slot, [row - start for row in rows], tokens)
        self._extend(slot, tokens, self.rows[list(rows)])

    def path(self, row: int) -> list[int]:
        """The rows from the root to this one."""
        path: list[int] = []
        while row >= 0:
            path.append(row)
            row = self.parents[row]
        return path[::-1]

    def expected(self) -> torch.Tensor:
        """[t, H, d] for the last step."""
        inner = set(self.parents)
        found: dict[int, torch.Tensor] = {}
        for leaf in (row for row in range(len(self.tokens)) if row not in inner):
            path, slot = self.path(leaf), self.slots[leaf]
            text = self.texts[slot] + [self.tokens[row] for row in path]
            heads = torch.cat([self.heads[slot], self.rows[path]])
            views = seen(self.policy, text)
            for place, row in enumerate(path):
                if row not in found:
                    found[row] = self._attention(heads, len(self.texts[slot]) + place, views)
        return torch.stack([found[row] for row in range(len(self.tokens))])

    def _attention(self, heads: torch.Tensor, own: int, views: Any) -> torch.Tensor:
        view = views[own]
        if self.window is not None and not self.cache.has_slots:
            view = {key: distance for key, distance in view.items() if key > own - self.window}
        keys_seen, distances = list(view), torch.tensor(list(view.values()), dtype=torch.float64)
        queries, keys, values = heads.split([self.num_kv * self.group, self.num_kv, self.num_kv], dim=1)
        query, key = (
            torch.view_as_complex(part.unflatten(-1, (-1, 2)).contiguous())
            for part in (queries[own].unflatten(0, (self.num_kv, -1)), keys[keys_seen])
        )
        angles = distances[:, None] * self.frequencies
        turns = torch.polar(torch.ones_like(angles), angles)
        scores = torch.einsum("kgf,nkf,nf->kgn", query, key.conj(), turns).real * self.head_dim**-0.5
        return torch.einsum("kgn,nkd->kgd", scores.softmax(-1), values[keys_seen]).flatten(0, 1)


def random_tree(count: int, seed: int, chain: int = 1, roots: bool = True) -> list[int]:
    """Parents: a chain first, then rows anywhere below."""
    rng = np.random.default_rng(seed)
    rest = [int(rng.integers(-1 if roots else 0, row)) for row in range(chain, count)]
    return [*range(-1, min(chain, count) - 1), *rest]


def difference(one: torch.Tensor, other: torch.Tensor) -> float:
    assert one.shape == other.shape
    return (one.double() - other.double()).abs().max().item()


def text_of(length: int, seed: int) -> list[int]:
    return some_text(length, seed=seed)
