"""Which tokens of its past a sequence keeps, sees, and where it sees them: decided from token ids alone.

Every rank decides for itself, and so does the coordinator, which needs to know how far a step may reach.
All come to the same result, since they are given the same tokens. The classes are C++ (core/retention.h).

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

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from runtime import core
from runtime.config import CacheConfig
from runtime.core import Compacting, Compaction, Retention, Sliding

if TYPE_CHECKING:
    from runtime.tokenizer import Tokenizer

Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]

__all__ = [
    "Compacting",
    "Compaction",
    "LayerGroup",
    "Ledger",
    "Retention",
    "Sliding",
    "layer_groups",
    "with_separator_ids",
]


@dataclass(frozen=True)
class LayerGroup:
    """Layers that keep the same tokens."""

    layers: tuple[int, ...]
    new: Callable[[], Retention]
    per_turn: bool = False
    """What they keep depends on where turns began."""


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
    groups = (LayerGroup(others, policy, cache.evict == "turn"), LayerGroup(tuple(sorted(full_layers)), full))
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


class Ledger(core.Ledger):
    """The coordinator's account of what one sequence keeps, over all groups of layers."""

    def __init__(self, groups: Sequence[LayerGroup], capacity: int | None) -> None:
        """`capacity`: most tokens that one may see where the policy is bounded, else None."""
        super().__init__([(group.new(), len(group.layers)) for group in groups], capacity)
        self.per_turn = any(group.per_turn for group in groups)
        """What is kept depends on where turns began."""
