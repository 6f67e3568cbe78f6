"""The caches' memory as the scheduler sees it: a sequence is admitted only where what it may ever need can be had, so
that no step runs out of it."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

import torch

from runtime.config import Config
from runtime.machine import memory_bytes
from runtime.mesh.device import pick_device
from runtime.model.cuda.paged_cache import pages_of_slot
from runtime.model.shard import HeadShard
from runtime.model.spec import ModelSpec
from runtime.request import Request
from runtime.retention import LayerGroup

HOST_SHARE = 0.5
"""Of a machine's memory, what the slots beyond the first few may have of it."""
ALWAYS = 8
"""Slots that are given away however little memory there is."""


def num_tokens_of(request: Request) -> int | None:
    """Most that a sequence may put into its slot; None: a conversation may fill it. Other requests end where prompt and
    answer do, but for guesses, of which the window's may stand behind the last token."""
    if request.session_id is not None:
        return None
    guesses = request.lookahead.window_size + request.lookahead.ngram_size
    return len(request.prompt_ids) + request.sampling.max_new_tokens + guesses


class PageMemory:
    """What the pages of each group of layers are promised to. Where slots have memory of their own, all fits."""

    def __init__(self, num_pages: Sequence[int] | None, groups: Sequence[LayerGroup], max_rows: int) -> None:
        """`num_pages`: per group, on the worker that has fewest; None: slots have memory of their own. `max_rows`: most
        rows of a step."""
        self.is_shared = num_pages is not None
        self._free = list(num_pages or ())
        self._kinds = [group.new() for group in groups] if self.is_shared else []
        self._max_rows = max_rows
        self._promised: dict[int, list[int]] = {}
        """By slot."""

    def among(self, free: Sequence[int], request: Request) -> deque[int]:
        """Those of the free slots in which a new sequence that begins with this request can have what it needs."""
        fits = all(need <= left for need, left in zip(self._needs(request), self._free, strict=True))
        return deque(free if fits else ())

    def promise(self, slot: int, request: Request) -> None:
        """The sequence comes into `slot`."""
        needs = self._promised[slot] = self._needs(request)
        self._free = [free - need for free, need in zip(self._free, needs, strict=True)]

    def give_back(self, slot: int) -> None:
        """The slot's sequence has ended."""
        needs = self._promised.pop(slot)
        self._free = [free + need for free, need in zip(self._free, needs, strict=True)]

    def _needs(self, request: Request) -> list[int]:
        """Pages per group."""
        return [pages_of_slot(kind, self._max_rows, num_tokens_of(request)) for kind in self._kinds]


class HostMemory(PageMemory):
    """A CPU's: a slot has the pages that its longest sequence has written to, for good. The first slots are always
    given away; the others while all together stay within a share of the machine's memory."""

    def __init__(
        self, config: Config, spec: ModelSpec, groups: Sequence[LayerGroup], budget: int | None = None
    ) -> None:
        """`budget`: bytes; HOST_SHARE of the machine's by default. Workers count as if all were on this machine."""
        super().__init__(None, groups, config.scheduler.max_rows)
        tp = config.parallel.tp
        heads = sum(HeadShard.of(spec.num_heads, spec.num_kv_heads, rank, tp).num_kv_heads for rank in range(tp))
        layer_bytes = 2 * heads * spec.head_dim * getattr(torch, config.model.dtype).itemsize * config.parallel.lp
        self._sizes = [(len(group.layers) * layer_bytes, group.new().max_stored) for group in groups]
        self._budget = int(HOST_SHARE * memory_bytes()) if budget is None else budget
        self._written: dict[int, int] = {}
        """By slot, the bytes that it may have."""

    def among(self, free: Sequence[int], request: Request) -> deque[int]:
        need, left = self._bytes(request), self._budget - sum(self._written.values())
        return deque(slot for slot in free if slot < ALWAYS or need - self._written.get(slot, 0) <= left)

    def promise(self, slot: int, request: Request) -> None:
        self._written[slot] = max(self._bytes(request), self._written.get(slot, 0))

    def give_back(self, slot: int) -> None:
        pass

    def _bytes(self, request: Request) -> int:
        tokens = num_tokens_of(request)
        stored = (most if tokens is None else min(tokens, most) for _, most in self._sizes)
        return sum(size * (count + self._max_rows) for (size, _), count in zip(self._sizes, stored, strict=True))


def memory_of(
    config: Config, spec: ModelSpec, groups: Sequence[LayerGroup], num_pages: Sequence[int] | None
) -> PageMemory:
    """As the workers' caches have it; `num_pages` as of PageMemory."""
    if num_pages is None and pick_device(config, 0).type == "cpu":
        return HostMemory(config, spec, groups)
    return PageMemory(num_pages, groups, config.scheduler.max_rows)
