"""What a token sees in training: the same that `runtime.retention` shows it when it is decoded.

Shapes: B samples, T tokens of a sample. A token at q sees one at k if

    (keeps[k] or q - k < window) and k <= q and both are of the same document,

where `keeps` says what the policy never drops, decided by the same `Retention` that decides when a model is served.
Positions count from the beginning of a document, as they do in a cache.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from runtime.config import CacheConfig
from runtime.retention import Bools, Ints, Sliding, layer_groups
from runtime.training.config import StridedConfig

Keeps = Callable[[Ints, Ints], Bools]
"""(positions, token ids) -> whether the policy keeps the token when the window leaves it; arrays of one shape."""


@dataclass(frozen=True)
class Rule:
    """What layers that keep the same tokens see."""

    layers: tuple[int, ...]
    window: int | None
    """The newest tokens, the current one included; None: all."""
    keeps: Keeps


def rules(cache: CacheConfig, strided: StridedConfig | None, num_layers: int, length: int) -> tuple[Rule, ...]:
    """One per distinct window of the layers; `cache` has its separators as ids. `length`: T."""
    if strided is not None:
        stride, num_initial = strided.stride, strided.num_initial
        return (
            Rule(
                tuple(range(num_layers)),
                strided.num_neighbors,
                lambda positions, _: (positions < num_initial) | (positions % stride == 0),
            ),
        )
    found = []
    for group in layer_groups(cache, num_layers, length):
        retention = group.new()
        assert isinstance(retention, Sliding), "policies that compact are refused by TrainingConfig"
        found.append(Rule(group.layers, retention.window, _kept_by(retention)))
    return tuple(found)


def _kept_by(retention: Sliding) -> Keeps:
    def keeps(positions: Ints, tokens: Ints) -> Bools:
        flat = (array.ravel().astype(np.int64) for array in (positions, tokens))
        return retention.may_anchor(*flat).reshape(positions.shape)

    return keeps


@dataclass(frozen=True)
class Marks:
    """What the masks of one batch are made from."""

    keeps: tuple[torch.Tensor, ...]
    """[B, T] bool per rule."""
    documents: torch.Tensor
    """[B, T] int: tokens with equal numbers are of the same document."""
    windows: tuple[int | None, ...]
    """Per rule."""
    rule_of: dict[int, int]
    """The rule of each layer."""

    def sees(self, rule: int, sample: torch.Tensor, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        """Whether tokens at `query` see those at `key`; index tensors that broadcast, as transformers' mask functions
        have them."""
        seen = (key <= query) & (self.documents[sample, query] == self.documents[sample, key])
        window = self.windows[rule]
        return seen if window is None else seen & (self.keeps[rule][sample, key] | (query - key < window))


def mark(policy: tuple[Rule, ...], tokens: Ints, positions: Ints, documents: Ints, device: torch.device) -> Marks:
    """The marks of samples [B, T]."""
    return Marks(
        keeps=tuple(torch.from_numpy(rule.keeps(positions, tokens)).to(device) for rule in policy),
        documents=torch.from_numpy(documents).to(device),
        windows=tuple(rule.window for rule in policy),
        rule_of={layer: index for index, rule in enumerate(policy) for layer in rule.layers},
    )


def attended_share(policy: tuple[Rule, ...], tokens: Ints, positions: Ints) -> float:
    """The share of their past that tokens of one document see, both counts summed, mean over layers."""
    everything = 0
    layers = sum(len(rule.layers) for rule in policy)
    seen = 0.0
    for query in range(len(tokens)):
        everything += query + 1
        for rule in policy:
            window = query + 1 if rule.window is None else min(rule.window, query + 1)
            behind = slice(0, query + 1 - window)
            seen += (
                (window + np.count_nonzero(rule.keeps(positions[behind], tokens[behind]))) * len(rule.layers) / layers
            )
    return seen / everything
