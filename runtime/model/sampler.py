"""Choosing tokens from logits, deterministically.

The token after position t is a function of (logits, sampling parameters, seed, t, the text up to t) alone: plain
temperature sampling is argmax of logits / temperature + Gumbel noise, the noise a hash of (seed, t,
token id). It has the softmax distribution exactly, does not depend on what else the step held, and
is the same on every rank, so candidates can be verified by equality. Penalties count the text that ends in the
row: the sequence's, and the row's ancestors in the step. `draw_on_torch` says all of it.

A row whose largest logit is NaN or infinite has no such token: NOT_A_NUMBER stands in its place. The
division is in float64, where no float32 divided by a temperature overflows, so such a score comes of
such a logit alone. -inf for some of the tokens is no fault.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
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
class Ragged:
    """Lists of tokens and numbers, one per row, one behind the other."""

    starts: NDArray[np.int64]
    """[R + 1] where each row's begin; the last is their end."""
    tokens: Int32
    values: NDArray[Any]

    @classmethod
    def of(cls, lists: Sequence[tuple[Int32, NDArray[Any]]]) -> Ragged:
        starts = np.zeros(len(lists) + 1, np.int64)
        np.cumsum([len(tokens) for tokens, _ in lists], out=starts[1:])
        tokens, values = (np.concatenate(parts) for parts in zip(*lists, strict=True))
        return cls(starts, np.ascontiguousarray(tokens), np.ascontiguousarray(values))

    def part(self, start: int, stop: int) -> Ragged:
        """Of rows [start, stop)."""
        first, last = self.starts[start], self.starts[stop]
        return Ragged(self.starts[start : stop + 1] - first, self.tokens[first:last], self.values[first:last])

    @property
    def rows(self) -> NDArray[np.int64]:
        """The row of each token."""
        return np.repeat(np.arange(len(self.starts) - 1), np.diff(self.starts))


@dataclass(frozen=True)
class Sampled:
    """Those of R rows that choose by more than their largest logit: S of them, and what decides."""

    index: NDArray[np.int64]
    """[S] among the R, ascending."""
    rows: Int32
    """[S, len(Row)] their lines of the plan."""
    sequences: Int32
    """[S, len(Seq)] their sequences' lines."""
    counts: Ragged | None = None
    """Of each row's text, its own token included: each token, and how often the answer has it; 0: the prompt alone has
    it. None, or none for a row: nobody asks."""
    biases: Ragged | None = None
    """What is added to tokens' logits, float32; -inf bars a token."""
    masks: Int32 | None = None
    """[M, words] of the plan: which tokens may be chosen."""
    mask_of: NDArray[np.int64] | None = None
    """[S] the row's mask, -1: none; where there are masks."""

    def part(self, start: int, stop: int) -> Sampled | None:
        """Of the rows [start, stop) of the R."""
        first, last = np.searchsorted(self.index, (start, stop)).tolist()
        if first == last:
            return None
        return Sampled(
            self.index[first:last] - start,
            self.rows[first:last],
            self.sequences[first:last],
            self.counts and self.counts.part(first, last),
            self.biases and self.biases.part(first, last),
            self.masks,
            None if self.mask_of is None else self.mask_of[first:last],
        )


@dataclass(frozen=True)
class Logprobs:
    """Log-probabilities that R rows are to give."""

    count: int
    """Of so many of the likeliest tokens, besides one of their own."""
    targets: NDArray[np.int64]
    """[R] which that is; -1: the one they choose."""


class Parameters:
    """What the lines [S, len(Seq)] of a plan say of sampling, as numbers [S]."""

    def __init__(self, sequences: Int32) -> None:
        def real(column: Seq) -> NDArray[np.float32]:
            return np.ascontiguousarray(sequences[:, column]).view(np.float32)

        self.temperature = real(Seq.TEMPERATURE).astype(np.float64)
        self.by_chance = self.temperature >= GREEDY_BELOW
        self.top_k, self.top_p, self.min_p = sequences[:, Seq.TOP_K], real(Seq.TOP_P), real(Seq.MIN_P)
        self.repetition, self.presence = real(Seq.REPETITION), real(Seq.PRESENCE)
        self.frequency = real(Seq.FREQUENCY)
        low, high = sequences[:, Seq.SEED_LOW], np.ascontiguousarray(sequences[:, Seq.SEED_HIGH])
        self.seed = low.astype(np.int64) | high.view(np.uint32).astype(np.int64) << 31

    @property
    def is_counted(self) -> NDArray[np.bool_]:
        """Whether tokens of the text are penalised."""
        repeats = (self.repetition != 0) & (self.repetition != 1)
        return repeats | (self.presence != 0) | (self.frequency != 0)

    @property
    def is_filtered(self) -> NDArray[np.bool_]:
        """Whether some tokens are left out for being unlikely."""
        return self.by_chance & ((self.top_k > 0) | (self.top_p < 1) | (self.min_p > 0))


Draw = Callable[[torch.Tensor, Sampled, Mesh, tuple[int, int]], tuple[torch.Tensor, torch.Tensor]]

CHUNK = 64
"""Rows of logits that are in memory at a time where all of them are wanted."""


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
        self,
        batch: Any,
        caches: Any,
        wanted: NDArray[np.int64],
        top_k: int,
        sampled: Sampled | None = None,
        logprobs: Logprobs | None = None,
    ) -> Int32:
        """`forward`, then `choose`. [R, StepPlan.result_width]"""
        hidden = self.forward(batch, caches)
        if not len(wanted):
            return np.zeros((0, 1 + top_k + (0 if logprobs is None else 1 + 2 * logprobs.count)), np.int32)
        return self.choose(hidden, wanted, top_k, sampled, logprobs)

    def search(self, hidden: torch.Tensor, k: int, keep_all: bool) -> Logits:
        """Logits of rows [R, D], to be searched for the k largest. `keep_all`: the others are wanted, too."""
        raise NotImplementedError

    def draw(
        self, logits: torch.Tensor, sampled: Sampled, mesh: Mesh, vocab_range: tuple[int, int]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """What draw_on_torch gives; kernels may do it instead."""
        return draw_on_torch(logits, sampled, mesh, vocab_range)

    @torch.inference_mode()
    def choose(
        self,
        hidden: torch.Tensor,
        wanted: NDArray[np.int64],
        top_k: int,
        sampled: Sampled | None = None,
        logprobs: Logprobs | None = None,
    ) -> Int32:
        """Per wanted row [R] of what `forward` returned, the token it chooses and, packed, the `top_k` likeliest ones,
        which mean nothing where the token is NOT_A_NUMBER; and the log-probabilities asked for. The same on every TP
        rank. [R, StepPlan.result_width]"""
        rows = hidden[upload(wanted, hidden.device)]
        if len(rows) <= CHUNK or sampled is None and logprobs is None:
            return self._choose(rows, top_k, sampled, logprobs)
        parts = [(start, min(start + CHUNK, len(rows))) for start in range(0, len(rows), CHUNK)]
        return np.concatenate(
            [
                self._choose(
                    rows[start:stop],
                    top_k,
                    sampled and sampled.part(start, stop),
                    logprobs and Logprobs(logprobs.count, logprobs.targets[start:stop]),
                )
                for start, stop in parts
            ]
        )

    def _choose(self, rows: torch.Tensor, top_k: int, sampled: Sampled | None, logprobs: Logprobs | None) -> Int32:
        keep_all = sampled is not None or logprobs is not None
        logits = self.search(rows, max(top_k, 1), keep_all)
        told = [] if logprobs is None else [Distribution(logits.values, logprobs.count, self.mesh, self.vocab_range)]
        found = [choose_tokens(logits, sampled, self.mesh, self.vocab_range, self.draw)[:, None]]
        if top_k:
            found.append(top_tokens(logits, top_k, self.mesh, self.vocab_range))
        results = torch.cat(found, dim=1).int().cpu().numpy()
        for distribution in told:
            assert logprobs is not None
            targets = np.where(logprobs.targets >= 0, logprobs.targets, results[:, 0])
            results = np.concatenate([results, distribution.words(targets)], axis=1)
        return results


class Distribution:
    """Rows' log-probabilities before anything else touches them: natural logarithms, float32."""

    def __init__(self, logits: torch.Tensor, count: int, mesh: Mesh, vocab_range: tuple[int, int]) -> None:
        """`count`: likeliest tokens to tell. `logits` [R, V_local] are looked at now, and again by `words`."""
        self._mesh, self._range, self._logits = mesh, vocab_range, logits
        values, places = logits.topk(min(count, logits.shape[1]))
        missing = count - values.shape[1]
        self._top = torch.nn.functional.pad(values, (0, missing), value=-torch.inf)
        self._ids = torch.nn.functional.pad(places, (0, missing)) + vocab_range[0]
        self._whole = logits.logsumexp(1)

    def words(self, targets: NDArray[np.int64]) -> Int32:
        """Per row, the log-probability of its target, and ids and log-probabilities of the likeliest. Those that are no
        float32 are as good. [R, 1 + 2 count]"""
        start, stop = self._range
        places = upload(targets.astype(np.int64) - start, self._logits.device)
        inside = (places >= 0) & (places < stop - start)
        own = self._logits.gather(1, places.where(inside, 0)[:, None])[:, 0].masked_fill(~inside, -torch.inf)
        top, ids, whole = self._top, self._ids, self._whole
        if self._mesh.tp > 1:
            count = top.shape[1]
            parts = torch.cat([top.double(), ids.double(), whole[:, None].double(), own[:, None].double()], dim=1)
            shards = [shard.split([count, count, 1, 1], 1) for shard in self._mesh.all_gather(parts)]
            tops, every, wholes, owns = (torch.stack(part) for part in zip(*shards, strict=True))
            top, best = tops.transpose(0, 1).flatten(1).topk(count)
            ids = every.transpose(0, 1).flatten(1).gather(1, best).long()
            whole, own = wholes.squeeze(2).logsumexp(0), owns.squeeze(2).amax(0)
        found = np.empty((len(targets), 1 + 2 * top.shape[1]), np.int32)
        found[:, 0] = (own - whole).float().cpu().numpy().view(np.int32)
        found[:, 1::2] = ids.int().cpu().numpy()
        found[:, 2::2] = (top - whole[:, None]).float().cpu().numpy().view(np.int32)
        return found


def choose_tokens(
    logits: Logits, sampled: Sampled | None, mesh: Mesh, vocab_range: tuple[int, int], draw: Draw | None = None
) -> torch.Tensor:
    """The token each row chooses, or NOT_A_NUMBER, the same on every TP rank. [R] int64

    Args:
        logits: this shard's slice of the vocabulary, of R rows.
        sampled: those that do not simply take the largest.
        vocab_range: the ids the slice covers, [start, stop).
        draw: what chooses for those; by default draw_on_torch.
    """
    chosen = best_of_shards(*logits.best(), mesh, vocab_range)
    if sampled is None:
        return chosen
    best = (draw or draw_on_torch)(logits.values, sampled, mesh, vocab_range)
    index = upload(sampled.index, chosen.device)
    chosen[index] = best_of_shards(*best, mesh, vocab_range).masked_fill(chosen[index] == NOT_A_NUMBER, NOT_A_NUMBER)
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


def draw_on_torch(
    logits: torch.Tensor, sampled: Sampled, mesh: Mesh, vocab_range: tuple[int, int]
) -> tuple[torch.Tensor, torch.Tensor]:
    """The best score of each sampled row over this shard's slice of the vocabulary, and where it stands. [S], [S]

    This is the one place that says how a token is chosen, in vLLM's order: what a mask or a bar forbids is -inf, biases
    are added, penalties taken (repetition, frequency, presence), then, unless the row is greedy, come temperature,
    min-p, top-k of what it leaves, top-p of what that leaves, and noise. Kernels do the same.

    Args:
        logits: [R, V_local], of R rows.
        vocab_range: the ids the slice covers, [start, stop).
    """
    parameters = Parameters(sampled.sequences)
    adjusted = adjust(logits[upload(sampled.index, logits.device)], sampled, parameters, vocab_range)
    scores = adjusted.double()
    by_chance = np.flatnonzero(parameters.by_chance)
    if not len(by_chance):
        return scores.max(dim=1)
    temperature = upload(np.where(parameters.by_chance, parameters.temperature, 1.0), logits.device)[:, None]
    scores /= temperature
    filtered = np.flatnonzero(parameters.is_filtered)
    if len(filtered):
        index = upload(filtered, logits.device)
        whole = gather_vocabulary(adjusted[index], mesh)
        least = adjusted.new_full((len(adjusted),), -torch.inf, dtype=torch.float64)
        least[index] = torch.stack(
            [
                least_kept(
                    row,
                    parameters.temperature[line],
                    int(parameters.top_k[line]),
                    float(parameters.top_p[line]),
                    float(parameters.min_p[line]),
                )
                for row, line in zip(whole, filtered, strict=True)
            ]
        )
        scores = scores.masked_fill(adjusted.double() < least[:, None], -torch.inf)
    keys = np.stack([parameters.seed, sampled.rows[:, Row.POSITION].astype(np.int64) + 1], axis=1)[by_chance]
    distinct, which = np.unique(keys, axis=0, return_inverse=True)
    noise = gumbel(distinct[:, 0], distinct[:, 1], vocab_range, logits.device)
    scores[upload(by_chance, logits.device)] += noise[upload(which.reshape(-1), logits.device)]
    return scores.max(dim=1)


def adjust(
    logits: torch.Tensor, sampled: Sampled, parameters: Parameters, vocab_range: tuple[int, int]
) -> torch.Tensor:
    """Rows' logits [S, V_local], in place, behind mask, biases and penalties."""
    start, stop = vocab_range
    device = logits.device

    def local(ragged: Ragged) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[Any]]:
        """(row, place, value) of the tokens that are this shard's."""
        mine = (ragged.tokens >= start) & (ragged.tokens < stop)
        return ragged.rows[mine], ragged.tokens[mine].astype(np.int64) - start, ragged.values[mine]

    if sampled.masks is not None and sampled.mask_of is not None:
        rows = np.flatnonzero(sampled.mask_of >= 0)
        bits = np.unpackbits(sampled.masks[sampled.mask_of[rows]].view(np.uint8), axis=1, bitorder="little")
        index = upload(rows, device)
        logits[index] = logits[index].masked_fill(~upload(bits[:, start:stop].astype(bool), device), -torch.inf)
    if sampled.biases is not None:
        rows, places, values = local(sampled.biases)
        at = upload(rows, device), upload(places, device)
        logits[at] += upload(values, device).to(logits.dtype)
    if sampled.counts is not None:
        rows, places, counts = local(sampled.counts)
        at = upload(rows, device), upload(places, device)
        repetition, presence, frequency = (
            upload(penalty[rows], device).to(logits.dtype)
            for penalty in (parameters.repetition, parameters.presence, parameters.frequency)
        )
        repetition = repetition.masked_fill(repetition == 0, 1)
        times = upload(counts, device).to(logits.dtype)
        found = logits[at]
        found = torch.where(found > 0, found / repetition, found * repetition)
        found -= frequency * times
        found -= torch.where(times > 0, presence, torch.zeros_like(presence))
        logits[at] = found
    return logits


def gather_vocabulary(logits: torch.Tensor, mesh: Mesh) -> torch.Tensor:
    """Every shard's slice of the logits side by side; the order of ids does not matter here. [R, >= V]"""
    if mesh.tp == 1:
        return logits
    width = torch.tensor([logits.shape[1]], device=logits.device)
    widest = max(int(other) for other in mesh.all_gather(width))
    padded = torch.nn.functional.pad(logits, (0, widest - logits.shape[1]), value=-torch.inf)
    return torch.cat(mesh.all_gather(padded), dim=1)


def least_kept(
    logits: torch.Tensor, temperature: float, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0
) -> torch.Tensor:
    """The smallest logit of a row [V] that stays under min-p, then top-k of what that leaves, then top-p of what is
    left then; equal logits stay together. float64"""
    scaled = logits.double() / temperature
    if min_p > 0:
        floor = scaled.max() + math.log(min_p)
        scaled = scaled[scaled >= floor]
    count = min(top_k or len(scaled), len(scaled))
    ordered = scaled.topk(min(count, PREFIX)).values
    if len(ordered) < count and (top_k or top_p >= 1 or _mass(ordered, scaled).sum() < top_p):
        ordered = scaled.topk(count).values
    last = len(ordered) - 1
    if top_p < 1:
        reached = _mass(ordered, ordered if top_k else scaled).cumsum(0)
        last = min(int((reached < top_p).sum()), last)
    # As a logit again: the division keeps the order, so the smallest logit not below is that of the last one kept.
    kept = logits.double()
    return kept[kept / temperature >= ordered[last]].min()


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
