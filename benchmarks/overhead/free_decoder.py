"""A decoder that costs nothing: its tokens are made up by a fixed rule, so that what a step still takes is ours.

Every token has a few followers, likeliest first, the same ones each time; which of them comes is drawn by the position.
So guesses come true about as often as with a trained model, whatever the rows, the mesh and the step's length.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np
import torch

from runtime.config import Config
from runtime.mesh.mesh import Mesh
from runtime.model.attention import RowBatch
from runtime.model.kv_cache import CacheMaker, KVCache
from runtime.model.rotary import Rotary
from runtime.model.shard import HeadShard
from runtime.model.spec import ModelSpec
from runtime.step import TOP_BITS

NUM_WORDS = 1024
"""Token ids that occur."""
NUM_FOLLOWERS = 8
SHARES = (0.62, 0.16, 0.08, 0.05, 0.04, 0.02, 0.02, 0.01)
"""How often each follower of a token comes."""
PERIOD = 1 << 14
"""Positions after which the draws repeat."""


class FreeDecoder(CacheMaker):
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
        self._hidden = torch.zeros(0, 1)

    def forward(self, batch: RowBatch, caches: Sequence[KVCache]) -> torch.Tensor:
        """Nothing: keys and values stay what they are. [T, 1]"""
        started = time.perf_counter()
        self._batch = batch
        if len(self._hidden) < batch.num_rows:
            self._hidden = torch.zeros(batch.num_rows, 1)
        self.seconds += time.perf_counter() - started
        return self._hidden[: batch.num_rows]


def free_decoder(config: Config, spec: ModelSpec, mesh: Mesh) -> FreeDecoder:
    """In the place of runtime.workers.worker.make_decoder."""
    return FreeDecoder(spec, mesh)
