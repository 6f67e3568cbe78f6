"""Choosing tokens from logits, deterministically.

The token after position t is a function of (logits, sampling parameters, seed, t) alone: plain
temperature sampling is argmax of logits / temperature + Gumbel noise, the noise a hash of (seed, t,
token id). It has the softmax distribution exactly, does not depend on what else the step held, and
is the same on every rank, so candidates can be verified by equality.

A row whose largest logit is NaN or infinite has no such token: NOT_A_NUMBER stands in its place. The
division is in float64, where no float32 divided by a temperature overflows, so such a score comes of
such a logit alone. -inf for some of the tokens is no fault.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from runtime import core
from runtime.mesh.device import upload
from runtime.mesh.mesh import Mesh
from runtime.step import NOT_A_NUMBER, TOP_BITS, Int32, Row, Seq

PREFIX = 1024
"""Likeliest tokens looked at first for top-p; a full sort only where they do not reach it."""

GREEDY_BELOW = core.GREEDY_BELOW
"""Temperatures below are 0: they divide differences between logits that are no larger than those between two orders of
summation, and would draw lots among equal logits, of which greedy decoding takes the first."""

BLOCK = 128
"""Logits per block in the search for the likeliest tokens: the k likeliest stand in the k blocks with the largest."""


class Logits:
    """Rows of logits over this shard's slice of the vocabulary, float32 [R, V_local], and the search for the best."""

    def __init__(self, values: torch.Tensor) -> None:
        self.values = values

    @functools.cached_property
    def _blocks(self) -> torch.Tensor:
        """[R, blocks, BLOCK], -inf behind the last."""
        short = -self.values.shape[1] % BLOCK
        padded = torch.nn.functional.pad(self.values, (0, short), value=-torch.inf) if short else self.values
        return padded.unflatten(1, (-1, BLOCK))

    @functools.cached_property
    def _largest(self) -> torch.Tensor:
        """Of each block [R, blocks]."""
        return self._blocks.amax(2)

    def best(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The largest of each row and where it stands, [R] each: the first one of equals; NaN where one is NaN."""
        values, block = self._largest.max(dim=1)
        place = self._blocks[torch.arange(len(block), device=block.device), block].argmax(dim=1)
        return values, block * BLOCK + place

    def top(self, k: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Values [R, k] and places [R, k] of the largest, and the log-sum-exp [R] of them and of the largest of each
        block that none of them can stand in."""
        if self._largest.shape[1] <= k:
            values, places = self.values.topk(min(k, self.values.shape[1]))
            missing = k - values.shape[1]
            values = torch.nn.functional.pad(values, (0, missing), value=-torch.inf)
            return values, torch.nn.functional.pad(places, (0, missing)), values.logsumexp(1)
        found = self._largest.topk(k).indices
        values, places = self._blocks.gather(1, found[:, :, None].expand(-1, -1, BLOCK)).flatten(1).topk(k)
        places = found.gather(1, places // BLOCK) * BLOCK + places % BLOCK
        others = self._largest.scatter(1, found, -torch.inf)
        return values, places, torch.cat([values, others], dim=1).logsumexp(1)


@dataclass(frozen=True)
class Sampled:
    """Those of R rows that choose by chance, by the parameters of their sequences."""

    index: NDArray[np.int64]
    """[S] among the R."""
    rows: Int32
    """[S, len(Row)] their lines of the plan."""
    sequences: Int32
    """[S, len(Seq)] their sequences' lines."""


class TokenChooser:
    """What decoders have in common: the tokens that rows choose."""

    mesh: Mesh
    vocab_range: tuple[int, int]

    @property
    def batch_device(self) -> torch.device:
        """Where `forward` wants the columns of a batch."""
        return self.mesh.device

    def forward(self, batch: Any, caches: Any) -> Any:
        """Run a step's rows; what `choose` takes."""
        raise NotImplementedError

    def step(
        self, batch: Any, caches: Any, wanted: NDArray[np.int64], top_k: int, sampled: Sampled | None = None
    ) -> Int32:
        """`forward`, then `choose`. [R, 1 + top_k]"""
        hidden = self.forward(batch, caches)
        if not len(wanted):
            return np.zeros((0, 1 + top_k), np.int32)
        return self.choose(hidden, wanted, top_k, sampled)

    def search(self, hidden: torch.Tensor, k: int, keep_all: bool) -> Logits:
        """Logits of rows [R, D], to be searched for the k largest. `keep_all`: the others are wanted, too."""
        raise NotImplementedError

    @torch.inference_mode()
    def choose(
        self, hidden: torch.Tensor, wanted: NDArray[np.int64], top_k: int, sampled: Sampled | None = None
    ) -> Int32:
        """Per wanted row [R] of what `forward` returned, the token it chooses and, packed, the `top_k` likeliest ones,
        which mean nothing where the token is NOT_A_NUMBER. The same on every TP rank. [R, 1 + top_k]"""
        logits = self.search(hidden[upload(wanted, hidden.device)], max(top_k, 1), keep_all=sampled is not None)
        found = [choose_tokens(logits, sampled, self.mesh, self.vocab_range)[:, None]]
        if top_k:
            found.append(top_tokens(logits, top_k, self.mesh, self.vocab_range))
        return torch.cat(found, dim=1).int().cpu().numpy()


def choose_tokens(logits: Logits, sampled: Sampled | None, mesh: Mesh, vocab_range: tuple[int, int]) -> torch.Tensor:
    """The token each row chooses, or NOT_A_NUMBER, the same on every TP rank. [R] int64

    Args:
        logits: this shard's slice of the vocabulary, of R rows.
        sampled: those that do not simply take the largest.
        vocab_range: the ids the slice covers, [start, stop).
    """
    chosen = best_of_shards(*logits.best(), mesh, vocab_range)
    if sampled is None:
        return chosen
    index = upload(sampled.index, logits.values.device)
    scores = _scores(logits.values[index], sampled.rows, sampled.sequences, mesh, vocab_range)
    chosen[index] = best_of_shards(*scores.max(dim=-1), mesh, vocab_range)
    return chosen


def top_tokens(logits: Logits, k: int, mesh: Mesh, vocab_range: tuple[int, int]) -> torch.Tensor:
    """The k likeliest tokens of each row, likeliest first, packed as `id << TOP_BITS | sixteenths of a nat`. [R, k]

    What the tokens outside contribute to the softmax is taken from the largest logit of each block they stand in: a
    lower bound, and several times cheaper than all the exponentials. The likelihoods only rank guesses.
    Of a row without a token (`choose_tokens`) they mean nothing.
    """
    values, places, whole = logits.top(k)
    ids = places + vocab_range[0]
    if mesh.tp > 1:
        shards = mesh.all_gather(torch.cat([values.double(), ids.double(), whole[:, None].double()], dim=1))
        values, ids, wholes = (torch.stack(part) for part in zip(*(s.split([k, k, 1], 1) for s in shards), strict=True))
        values, best = values.transpose(0, 1).flatten(1).topk(k)
        ids = ids.transpose(0, 1).flatten(1).gather(1, best).long()
        whole = wholes.squeeze(2).logsumexp(0)
    steps = ((whole[:, None] - values) * 16).round().clamp(0, (1 << TOP_BITS) - 1)
    return ids << TOP_BITS | steps.long()


def best_of_shards(
    values: torch.Tensor, places: torch.Tensor, mesh: Mesh, vocab_range: tuple[int, int]
) -> torch.Tensor:
    """Ids of the largest over all shards, given those of this one; (value, id) pairs travel, not scores. [R]"""
    ids = places + vocab_range[0]
    if mesh.tp > 1:
        pairs = torch.stack([values.double(), ids.double()])  # a float64 holds every id exactly
        shards = torch.stack(mesh.all_gather(pairs))  # [tp, 2, R]
        values = shards[:, 0].amax(dim=0)
        ids = shards[:, 1].masked_fill(shards[:, 0] < values, torch.inf).amin(dim=0).long()  # ties: the lowest id
    return ids.masked_fill(values - values != 0, NOT_A_NUMBER)  # inf - inf is NaN, which is unlike everything


def _scores(
    logits: torch.Tensor, rows: Int32, sequences: Int32, mesh: Mesh, vocab_range: tuple[int, int]
) -> torch.Tensor:
    """logits / temperature + noise, with what top-k and top-p leave out at -inf. float64 [R, V_local]"""
    temperature = upload(sequences[:, Seq.TEMPERATURE].view(np.float32).astype(np.float64), logits.device)[:, None]
    scaled = logits / temperature
    top_k, top_p = sequences[:, Seq.TOP_K], sequences[:, Seq.TOP_P].view(np.float32)
    filtered = np.flatnonzero((top_k > 0) | (top_p < 1))
    if len(filtered):
        index = upload(filtered, logits.device)
        whole = _gather_vocabulary(logits[index], mesh) / temperature[index]
        least = scaled.new_full((len(scaled),), -torch.inf)
        least[index] = torch.stack(
            [
                least_kept(row, int(k), float(p))
                for row, k, p in zip(whole, top_k[filtered], top_p[filtered], strict=True)
            ]
        )
        scaled = scaled.masked_fill(scaled < least[:, None], -torch.inf)
    seeds = (
        sequences[:, Seq.SEED_LOW].astype(np.int64) | sequences[:, Seq.SEED_HIGH].view(np.uint32).astype(np.int64) << 31
    )
    keys = np.stack([seeds, rows[:, Row.POSITION].astype(np.int64) + 1], axis=1)
    distinct, which = np.unique(keys, axis=0, return_inverse=True)
    noise = gumbel(distinct[:, 0], distinct[:, 1], vocab_range, logits.device)
    return scaled + noise[upload(which.reshape(-1), logits.device)]


def _gather_vocabulary(logits: torch.Tensor, mesh: Mesh) -> torch.Tensor:
    """Every shard's slice of the logits side by side; the order of ids does not matter here. [R, >= V]"""
    if mesh.tp == 1:
        return logits
    width = torch.tensor([logits.shape[1]], device=logits.device)
    widest = max(int(other) for other in mesh.all_gather(width))
    padded = torch.nn.functional.pad(logits, (0, widest - logits.shape[1]), value=-torch.inf)
    return torch.cat(mesh.all_gather(padded), dim=1)


def least_kept(scaled: torch.Tensor, top_k: int, top_p: float) -> torch.Tensor:
    """The smallest logit that stays under top-k, then top-p of what top-k left; equal logits stay together."""
    count = min(top_k or len(scaled), len(scaled))
    ordered = scaled.topk(min(count, PREFIX)).values
    if top_p >= 1 and len(ordered) == count:
        return ordered[-1]
    if len(ordered) < count and (top_k or _mass(ordered, scaled).sum() < top_p):
        ordered = scaled.topk(count).values
    if top_p >= 1:
        return ordered[-1]
    total = ordered if top_k else scaled
    reached = _mass(ordered, total).cumsum(0)
    return ordered[min(int((reached < top_p).sum()), len(ordered) - 1)]


def _mass(part: torch.Tensor, total: torch.Tensor) -> torch.Tensor:
    """Probabilities of `part` under the softmax over `total`, float64 both."""
    return (part - total.logsumexp(0)).exp()


def gumbel(seeds: np.ndarray, positions: np.ndarray, ids: tuple[int, int], device: torch.device) -> torch.Tensor:
    """Standard Gumbel noise for ids [start, stop) at each (seed, position). float64 [U, stop - start]

    Counter-based: SplitMix64's finaliser over a mix of the three numbers, so any rank can compute any
    part of it.
    """
    rows = upload(seeds, device)[:, None]
    columns = upload(positions, device)[:, None]
    vocabulary = torch.arange(*ids, device=device)[None, :]
    key = _mix(_mix(rows) + columns)
    bits = _logical_shift(_mix(key + vocabulary * _GOLDEN), 11)  # 53 of them
    uniform = (bits.double() + 0.5) * 2.0**-53
    return -(-uniform.log()).log()


_GOLDEN = 0x9E3779B97F4A7C15 - (1 << 64)


def _logical_shift(x: torch.Tensor, count: int) -> torch.Tensor:
    return (x >> count) & ((1 << (64 - count)) - 1)


def _mix(x: torch.Tensor) -> torch.Tensor:
    """SplitMix64's finaliser on int64, whose products wrap around. (Steele, Lea and Flood, 2014)"""
    x = x + _GOLDEN
    x = (x ^ _logical_shift(x, 30)) * (0xBF58476D1CE4E5B9 - (1 << 64))
    x = (x ^ _logical_shift(x, 27)) * (0x94D049BB133111EB - (1 << 64))
    return x ^ _logical_shift(x, 31)
