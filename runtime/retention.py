"""Which tokens of its past a sequence keeps, sees, and where it sees them: decided from token ids alone.

Every rank decides for itself, and so does the coordinator, which needs to know how far a step may reach.
All come to the same result, since they are given the same tokens. No tensor is touched here.

Stored tokens stand in the order of their positions. Those that a policy keeps for ever, or for longer
than their neighbours, are its *anchors*: attention sinks and separators. There are two kinds of policy:

- `Sliding` (full, sink, fundamental sep): a token sees the anchors and a window that moves with it. What
  no later token can see is dropped now and then.
- `Compacting` (streaming sep; eviction per turn): a token sees all that is stored. At certain lengths
  the recent run is compacted: a few of its tokens become anchors, most of the others are dropped.

With positions `original` a key's distance is that in the text. With `slot` it is that in the cache, which
for the recent run comes to the same, so only the anchors' distances differ: see runtime/model/attention.py.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from runtime.config import CacheConfig

if TYPE_CHECKING:
    from runtime.tokenizer import Tokenizer

Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]

UNBOUNDED = 2**62


@dataclass(frozen=True)
class Compaction:
    """How the stored tokens change: some are dropped, and the anchors' keys may move to other positions."""

    kept: Ints
    """Indices into the tokens stored before, ascending."""
    turns: Ints
    """[a] for the first a of those kept, the anchors: by how many positions their keys, as they were when they were
    stored, are to be turned. Empty where keys stay as they are."""
    num_turned_before: int = 0
    """How many of the tokens stored before, the first ones, an earlier compaction has turned."""


class Retention(ABC):
    """What is stored of one sequence in a group of layers."""

    max_stored: int
    """Most tokens that stay stored between two steps."""
    max_turned: int = 0
    """Most of them whose keys get turned."""

    def __init__(self, slot: bool, separators: Collection[int], num_initial: int) -> None:
        """`slot`: positions are those in the cache."""
        self.slot = slot
        self.num_initial = num_initial
        self.separators = np.array(sorted(separators), np.int64)
        self.reset()

    def reset(self) -> None:
        """Forget the sequence."""
        self.length = 0
        """Tokens the sequence has had."""
        self.positions = np.empty(0, np.int64)
        """[n] positions in the text of the tokens stored, ascending."""
        self.anchored = np.empty(0, np.bool_)
        """[n] whether the policy keeps the token when the window leaves it: initial tokens and separators."""

    @property
    def num_stored(self) -> int:
        return len(self.positions)

    def may_anchor(self, positions: Ints, tokens: Ints) -> Bools:
        """[t] whether tokens at these positions are initial ones or separators."""
        return (positions < self.num_initial) | np.isin(tokens, self.separators)

    def commit(self, tokens: Sequence[int] | Ints) -> Compaction | None:
        """Store the next tokens of the sequence; returns what that changes about those stored."""
        ids = np.asarray(tokens, np.int64)
        positions = np.arange(self.length, self.length + len(ids))
        self.positions = np.concatenate([self.positions, positions])
        self.anchored = np.concatenate([self.anchored, self.may_anchor(positions, ids)])
        self.length += len(ids)
        return self._compact_after(len(ids))

    def begin_turn(self, num_coming: int) -> Compaction | None:
        """Make room for the prompt and the answer of a turn, `num_coming` tokens, where the policy evicts per turn."""
        return None

    @property
    @abstractmethod
    def horizon(self) -> int:
        """The first position that a row of the next step must not have: the tokens before are to be stored first."""

    @property
    @abstractmethod
    def num_slot_anchors(self) -> int:
        """Stored tokens, the first ones, whose distance to a row counts from the row's slot, not from its position."""

    @abstractmethod
    def slots(self, positions: Ints) -> Ints:
        """[t] the places in the cache of rows at these positions."""

    @abstractmethod
    def sees(self, queries: Ints, keys: Ints, anchored: Bools) -> Bools | None:
        """[t, k] whether rows at positions `queries` [t] see tokens before them at `keys` [k]; None: they see all."""

    @abstractmethod
    def num_seen(self, tokens: Sequence[int] | Ints) -> Ints:
        """[t] how many tokens each of these next ones of the sequence sees, itself included."""

    @abstractmethod
    def _compact_after(self, num_new: int) -> Compaction | None:
        """What is to change now that the last `num_new` tokens have been stored."""

    def _keep(self, kept: Ints, turns: Ints, num_turned_before: int = 0) -> Compaction:
        self.positions, self.anchored = self.positions[kept], self.anchored[kept]
        return Compaction(kept, turns, num_turned_before)


class Sliding(Retention):
    """Anchors and a window of recent tokens (full: all of them). StreamingLLM section 3.2, SepLLM section 3.1."""

    def __init__(
        self, window: int | None, max_kept: int, slot: bool, separators: Collection[int] = (), num_initial: int = 0
    ) -> None:
        """`window` counts the current token, None is everything; `max_kept` bounds anchors and window together.

        Tokens that have left the window are dropped whenever the length is a multiple of `interval`, about an eighth
        of the window, so that what is stored depends on the length alone, and not on how many tokens a step brought.
        """
        assert not (slot and separators), "with separators as anchors, slots are for Compacting"
        super().__init__(slot, separators, num_initial)
        self.window = window
        # A power of two, so that equal chunks of a text find equally many tokens stored: kernels are made per shape.
        self.interval = UNBOUNDED if window is None else max(16, 1 << (window // 8 - 1).bit_length())
        self.max_stored = max_kept if window is None else max_kept + self.interval

    @property
    def horizon(self) -> int:
        if self.slot and self.window is not None and self.length < self.num_initial:
            return self.num_initial + self.window  # until then slots are positions, for staged sinks, too
        return UNBOUNDED

    @property
    def num_slot_anchors(self) -> int:
        return min(self.num_initial, self.num_stored) if self.slot else 0

    def slots(self, positions: Ints) -> Ints:
        assert self.window is not None
        return np.minimum(positions, self.num_initial + self.window - 1)

    def sees(self, queries: Ints, keys: Ints, anchored: Bools) -> Bools | None:
        if self.window is None or len(keys) == 0:
            return None
        oldest = queries - self.window  # the newest position that each row does not see
        hidden = keys <= oldest.max()
        if not (hidden & ~anchored).any():
            return None
        return anchored | (keys > oldest[:, None])

    def num_seen(self, tokens: Sequence[int] | Ints) -> Ints:
        ids = np.asarray(tokens, np.int64)
        positions = np.arange(self.length, self.length + len(ids))
        if self.window is None:
            return positions + 1
        anchors = np.concatenate([self.positions[self.anchored], positions[self.may_anchor(positions, ids)]])
        return np.minimum(positions + 1, self.window) + np.searchsorted(anchors, positions - self.window, side="right")

    def _compact_after(self, num_new: int) -> Compaction | None:
        boundary = self.length - self.length % self.interval
        if self.window is None or boundary <= self.length - num_new:
            return None
        alive = self.anchored | (self.positions > boundary - self.window)
        return None if alive.all() else self._keep(np.flatnonzero(alive), np.empty(0, np.int64))


class Compacting(Retention):
    """Initial tokens, the newest separators, and a recent run that is compacted when it is time.

    SepLLM section 3.3, and, with eviction per turn, StreamingLLM's demo. The layout is [initial tokens |
    separators | recent run]: the recent run is the paper's past and local windows.
    """

    def __init__(
        self,
        size: int,
        local: int | None,
        slot: bool,
        separators: Collection[int] = (),
        num_initial: int = 0,
        max_separators: int = 0,
        compact_after_attention: bool = False,
        per_turn: bool = False,
    ) -> None:
        """`size` is c, the most tokens stored; `local` is w, how many of the newest stay after a compaction. None,
        for eviction per turn: as many as leave room for the turn."""
        super().__init__(slot, separators, num_initial)
        self.size, self.local, self.max_separators = size, local, max_separators
        self.per_turn = per_turn
        self.limit = size + compact_after_attention
        self.max_stored = self.limit
        self.max_turned = num_initial + max_separators if slot else 0

    def reset(self) -> None:
        super().reset()
        self.num_anchors = 0
        """Initial tokens and separators before the recent run; none until the first compaction."""

    @property
    def horizon(self) -> int:
        return UNBOUNDED if self.per_turn else self.length + self.limit - self.num_stored

    @property
    def num_slot_anchors(self) -> int:
        return self.num_anchors if self.slot else 0

    def slots(self, positions: Ints) -> Ints:
        return positions - (self.length - self.num_stored)

    def sees(self, queries: Ints, keys: Ints, anchored: Bools) -> Bools | None:
        return None

    def num_seen(self, tokens: Sequence[int] | Ints) -> Ints:
        return self.num_stored + 1 + np.arange(len(tokens))

    def begin_turn(self, num_coming: int) -> Compaction | None:
        if not self.per_turn or self.num_stored + num_coming <= self.size:
            return None
        return self._compact(*self._compacted(num_coming))

    def _compact_after(self, num_new: int) -> Compaction | None:
        assert self.num_stored <= self.max_stored, f"{self.num_stored} tokens stored, room for {self.max_stored}"
        if self.per_turn or self.num_stored < self.limit:
            return None
        return self._compact(*self._compacted(0))

    def _compacted(self, num_coming: int) -> tuple[Ints, int]:
        """Indices of the stored tokens that a compaction keeps, and how many of them are anchors."""
        count = self.num_stored
        num_initial = min(self.num_initial, count)
        local = self.local if self.local is not None else max(self.size - num_initial - num_coming, 0)
        start = max(count - local, num_initial)
        separators = num_initial + np.flatnonzero(self.anchored[num_initial:start])
        separators = separators[max(len(separators) - self.max_separators, 0) :]
        kept = np.concatenate([np.arange(num_initial), separators, np.arange(start, count)])
        return kept, num_initial + len(separators)

    def _compact(self, kept: Ints, num_anchors: int) -> Compaction:
        before = self.num_slot_anchors
        turns = np.arange(num_anchors) - self.positions[kept[:num_anchors]]
        self.num_anchors = num_anchors
        return self._keep(kept, turns[: self.num_slot_anchors], before)


@dataclass(frozen=True)
class LayerGroup:
    """Layers that keep the same tokens."""

    layers: tuple[int, ...]
    new: Callable[[], Retention]


def layer_groups(cache: CacheConfig, num_layers: int, max_positions: int) -> tuple[LayerGroup, ...]:
    """The groups of a model's layers under this policy, its separators given as ids.

    `max_positions`: the model's trained length, tokens, which bounds a slot where the policy does not.
    """
    capacity = cache.slot_capacity(max_positions)

    def full() -> Retention:
        return Sliding(None, capacity, slot=False)

    def policy() -> Retention:
        slot = cache.positions == "slot"
        separators = _ids(cache.separators)
        match cache.policy, cache.evict:
            case "sink", "token":
                assert cache.window is not None and cache.num_sinks is not None
                return Sliding(cache.window, capacity, slot, num_initial=cache.num_sinks)
            case "sink", "turn":
                assert cache.num_sinks is not None
                return Compacting(capacity, None, slot, num_initial=cache.num_sinks, per_turn=True)
            case "sep", None:
                assert cache.num_neighbors is not None and cache.num_initial is not None
                return Sliding(cache.num_neighbors, capacity, False, separators, cache.num_initial)
            case "sep", evict:
                assert cache.local is not None and cache.num_initial is not None and cache.max_separators is not None
                return Compacting(
                    capacity,
                    cache.local,
                    slot,
                    separators,
                    cache.num_initial,
                    cache.max_separators,
                    compact_after_attention=cache.compact_at == "after",
                    per_turn=evict == "turn",
                )
        return full()

    full_layers = {layer % num_layers for layer in cache.full_layers or ()}
    others = tuple(layer for layer in range(num_layers) if layer not in full_layers)
    groups = (LayerGroup(others, policy), LayerGroup(tuple(sorted(full_layers)), full))
    return tuple(group for group in groups if group.layers)


def with_separator_ids(cache: CacheConfig, tokenizer: Tokenizer) -> CacheConfig:
    """`cache` with its separators as token ids, so that workers need no tokenizer. Raises ConfigError."""
    if cache.separators is None:
        return cache
    ids = tokenizer.separator_ids(cache.separators, bool(cache.merged_separators))
    return cache.model_copy(update={"separators": ids, "merged_separators": False})


def _ids(separators: object) -> tuple[int, ...]:
    ids = separators or ()
    assert isinstance(ids, tuple) and all(isinstance(token, int) for token in ids), "separators not resolved to ids"
    return ids


class Ledger:
    """The coordinator's account of what one sequence keeps, over all groups of layers."""

    def __init__(self, groups: Sequence[LayerGroup], capacity: int | None) -> None:
        """`capacity`: most tokens that one may see where the policy is bounded, else None."""
        self._retained = [(group.new(), len(group.layers)) for group in groups]
        self._num_layers = sum(count for _, count in self._retained)
        self._capacity = capacity
        self._seen_last = self._seen_sum = 0.0

    @property
    def length(self) -> int:
        return self._retained[0][0].length

    @property
    def horizon(self) -> int:
        """The first position that a row of the next step must not have."""
        return min(retained.horizon for retained, _ in self._retained)

    @property
    def kept_last(self) -> float:
        """Tokens that the newest token saw over all tokens up to it, mean over layers."""
        return self._seen_last / self.length if self.length else 1.0

    @property
    def kept_sum(self) -> float:
        """The same, both counts summed over all tokens so far."""
        return 2 * self._seen_sum / (self.length * (self.length + 1)) if self.length else 1.0

    def full_at(self, tokens: Sequence[int]) -> int:
        """Index of the one of these next tokens that fills the slot of a bounded policy; len(tokens) if none does."""
        if self._capacity is None or not tokens:
            return len(tokens)
        most = np.maximum.reduce([retained.num_seen(tokens) for retained, _ in self._retained])
        return int(np.searchsorted(most, self._capacity))

    def begin_turn(self, num_coming: int) -> None:
        for retained, _ in self._retained:
            retained.begin_turn(num_coming)

    def commit(self, tokens: Sequence[int]) -> None:
        """The next tokens have entered the cache."""
        if not tokens:
            return
        seen = np.zeros(len(tokens))
        for retained, count in self._retained:
            seen += retained.num_seen(tokens) * (count / self._num_layers)
        self._seen_last = float(seen[-1])
        self._seen_sum += float(seen.sum())
        for retained, _ in self._retained:
            retained.commit(tokens)
