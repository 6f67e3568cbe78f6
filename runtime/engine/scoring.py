"""Log-probabilities of a given text under a cache policy, in one process: what benchmarks of quality rest on."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from runtime.config import CacheConfig, Config
from runtime.errors import InvalidRequestError
from runtime.mesh.device import pick_device
from runtime.mesh.mesh import Mesh
from runtime.model.attention import RowBatch
from runtime.model.directory import for_model, load_spec, resolve_model
from runtime.model.loader import load_decoder
from runtime.retention import Ledger, layer_groups, with_separator_ids
from runtime.tokenizer import Tokenizer

HEAD_ROWS = 64
"""Rows whose logits are in memory at a time."""


@dataclass(frozen=True)
class Score:
    """How likely the tokens of a text were to the model, and what the cache kept of it."""

    log_probs: NDArray[np.float64]
    """[n - 1] of token i + 1, given tokens 0 .. i as far as the policy keeps them."""
    first_choices: NDArray[np.int64]
    """[n - 1] the token that the model would have put in place of token i + 1."""
    kept_last: float
    kept_sum: float
    """Kept KV, as in runtime.request.Usage."""
    seconds: float


class Scorer:
    """Reads texts through a cache policy, in chunks; the result is that of token-by-token decoding."""

    def __init__(self, config: Config, chunk: int = 512, weights_of: Scorer | None = None) -> None:
        """`chunk`: most tokens at a time; `weights_of`: another scorer of the same model, whose weights to share.

        Raises ConfigError where the configuration cannot be run.
        """
        self.config, self.chunk = config, chunk = for_model(config), chunk
        self.directory = resolve_model(config.model.path)
        if weights_of is None:
            self.spec = load_spec(self.directory)
            self.tokenizer = Tokenizer(self.directory)
            mesh = Mesh(device=pick_device(config, 0))
            self.decoder = load_decoder(
                self.directory, self.spec, mesh, getattr(torch, config.model.dtype), config.model.kernels
            )
        else:
            self.spec, self.tokenizer, self.decoder = weights_of.spec, weights_of.tokenizer, weights_of.decoder
        self.spec.check_cache(config.cache)
        cache = with_separator_ids(config.cache, self.tokenizer)
        self.capacity = cache.slot_capacity(self.spec.max_positions)
        self.groups = layer_groups(cache, self.spec.num_layers, self.spec.max_positions)
        self.caches = self.decoder.make_caches(self.groups, num_slots=1, max_staged=chunk)
        self.reset()

    def with_policy(self, cache: CacheConfig) -> Scorer:
        """A scorer for another policy that shares the weights."""
        return Scorer(self.config.model_copy(update={"cache": cache}), self.chunk, weights_of=self)

    def reset(self) -> None:
        """Forget the text."""
        self.ledger = Ledger(self.groups, None)
        for cache in self.caches:
            cache.reset(0)

    @torch.inference_mode()
    def score(self, token_ids: Sequence[int], on_progress: Callable[[int], object] | None = None) -> Score:
        """Read a text from its start. `on_progress` is told how many tokens have been read so far.

        Raises InvalidRequestError if the policy has no room for it.
        """
        started = time.perf_counter()
        self.reset()
        self._check_room(token_ids)
        ledger = self.ledger
        ids = np.asarray(token_ids, np.int64)
        log_probs, first_choices = [np.empty(0)], [np.empty(0, np.int64)]
        while ledger.length < len(ids):
            start = ledger.length
            stop = min(start + self.chunk, ledger.horizon, len(ids))
            hidden = self._read(ids[start:stop])
            targets = torch.from_numpy(ids[start + 1 : stop + 1])
            for rows, wanted in zip(hidden[: len(targets)].split(HEAD_ROWS), targets.split(HEAD_ROWS), strict=True):
                logits = self.decoder.logits(rows)
                chosen = logits.gather(1, wanted.to(logits.device)[:, None])[:, 0]
                log_probs.append((chosen - logits.logsumexp(1)).double().cpu().numpy())
                first_choices.append(logits.argmax(1).cpu().numpy())
            if on_progress is not None:
                on_progress(stop)
        return Score(
            log_probs=np.concatenate(log_probs),
            first_choices=np.concatenate(first_choices),
            kept_last=ledger.kept_last,
            kept_sum=ledger.kept_sum,
            seconds=time.perf_counter() - started,
        )

    def _check_room(self, token_ids: Sequence[int]) -> None:
        cache, capacity = self.config.cache, self.capacity
        full_at = len(token_ids)
        if cache.bounded:
            full_at = Ledger(self.groups, capacity).full_at(token_ids)
        elif cache.evict == "turn":
            full_at = capacity - 1
        if full_at < len(token_ids) - 1:
            problem = f"the text does not fit into a cache of {capacity}"
            remedy = "Shorten it, enlarge the cache, or have cache.policy sink or sep evict per token."
            raise InvalidRequestError("token_ids", f"{len(token_ids)} tokens", problem, remedy)

    def _read(self, ids: NDArray[np.int64]) -> torch.Tensor:
        """Put the next tokens of the text into the cache, none beyond the policy's horizon; their hidden states."""
        rows = np.arange(len(ids))
        batch = RowBatch.build(
            tokens=ids,
            positions=self.ledger.length + rows,
            parents=rows - 1,
            slots=np.zeros_like(rows),
            rope_lengths=np.ones_like(rows),
            device=self.decoder.mesh.device,
        )
        hidden = self.decoder.forward(batch, self.caches)
        for cache in self.caches:
            cache.commit(0, rows.tolist(), ids.tolist())
        self.ledger.commit(ids.tolist())
        return hidden
