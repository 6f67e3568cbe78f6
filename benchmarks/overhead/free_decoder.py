"""A decoder that costs nothing: its tokens are made up by a fixed rule, so that what a step still takes is ours.

Every token has a few followers, likeliest first, the same ones each time; which of them comes is drawn by the position.
So guesses come true about as often as with a trained model, whatever the rows, the mesh and the step's length.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from runtime.config import Config
from runtime.mesh.mesh import Mesh
from runtime.model.attention import RowBatch
from runtime.model.kv_cache import CacheMaker, KVCache
from runtime.model.rotary import Rotary
from runtime.model.sampler import Logprobs, Sampled, TokenChooser
from runtime.model.shard import HeadShard
from runtime.model.spec import ModelSpec
from runtime.retention import LayerGroup
from runtime.step import TOP_BITS, Int32

NUM_WORDS = 1024
"""Token ids that occur."""
NUM_FOLLOWERS = 8
SHARES = (0.62, 0.16, 0.08, 0.05, 0.04, 0.02, 0.02, 0.01)
"""How often each follower of a token comes."""
PERIOD = 1 << 14
"""Positions after which the draws repeat."""


class FreeDecoder(CacheMaker, TokenChooser):
    """The surface of runtime.model.decoder.Decoder; `seconds` is what its own calls have taken."""

    def __init__(self, spec: ModelSpec, mesh: Mesh) -> None:
        self.spec, self.mesh, self.dtype = spec, mesh, torch.float32
        self.heads = HeadShard.of(spec.num_heads, spec.num_kv_heads, mesh.shard, mesh.tp)
        self.rotary = Rotary(spec.rope, mesh.device)
        self.vocab_range = 0, spec.vocab_size
        self.seconds = 0.0
        random = np.random.default_rng(0)
        followers = random.integers(0, NUM_WORDS, (spec.vocab_size, NUM_FOLLOWERS))
        self._next = followers.astype(np.int32)
        steps = np.round(-16 * np.log(SHARES)).astype(np.int32)
        self._packed = self._next << TOP_BITS | steps
        self._draws = random.choice(NUM_FOLLOWERS, PERIOD, p=SHARES)

    def make_caches(self, groups: Sequence[LayerGroup], num_slots: int, max_staged: int) -> tuple[KVCache, ...]:
        """Caches whose accounts are real, and whose keys and values are next to nothing: moving them is a decoder's."""
        kinds = 1, 2, max_staged, self.rotary, self.dtype, self.mesh.device
        return tuple(KVCache(LayerGroup((0,), group.new), num_slots, *kinds) for group in groups)

    def forward(self, batch: RowBatch, caches: Sequence[KVCache]) -> RowBatch:
        """Nothing: keys and values stay what they are."""
        return batch

    def choose(
        self,
        batch: RowBatch,
        wanted: NDArray[np.int64],
        top_k: int,
        sampled: Sampled | None = None,
        logprobs: Logprobs | None = None,
    ) -> Int32:
        """As TokenChooser.choose, made up; it has no log-probabilities. [R, 1 + top_k]"""
        started = time.perf_counter()
        tokens, positions, _ = batch.columns.numpy()[:, wanted]
        found = np.empty((len(wanted), 1 + top_k), np.int32)
        found[:, 0] = self._next[tokens, self._draws[positions % PERIOD]]
        found[:, 1:] = self._packed[tokens, :top_k]
        self.seconds += time.perf_counter() - started
        return found


def free_decoder(config: Config, spec: ModelSpec, mesh: Mesh) -> FreeDecoder:
    """A runtime.workers.worker.DecoderMaker."""
    return FreeDecoder(spec, mesh)
