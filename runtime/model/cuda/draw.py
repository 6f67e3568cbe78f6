"""Drawing tokens on the device: what runtime/model/sampler.py makes of logits, parameters, seed and position, with no
look at the host.

`draw` adds the noise and finds the largest sum in one pass over the logits, in two stages: blocks of the vocabulary,
then rows. `least_kept` finds where top-k and top-p cut, by bisection over the bits of a float32: 32 passes over a row,
which stays in the GPU's second-level cache meanwhile.
"""

from __future__ import annotations

import torch

from runtime.model.cuda.arrays import ChoiceArrays
from runtime.model.cuda.jit import jit, power_of_two, tl
from runtime.model.sampler import gumbel
from runtime.model.sampler import least_kept as least_kept_of_row

BLOCK = 1024
"""Logits per program of the first stage."""
LEAST_BLOCK = 4096


def draw(
    logits: torch.Tensor, least: torch.Tensor | None, choices: ChoiceArrays, start: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The largest logit / temperature + noise of each row, float64 [R], and where it stands, int32 [R].

    Rows of temperature 0 take the largest logit. Of equals the first counts; NaN where a logit is NaN.

    Args:
        logits: this shard's slice of the vocabulary, float32 [R, V_local].
        least: float32 [R]: smaller logits are left out; None: none are.
        start: the id of the slice's first token.
    """
    num_rows, size = logits.shape
    num_blocks = -(-size // BLOCK)
    values = torch.empty(num_rows, num_blocks, dtype=torch.float64, device=logits.device)
    places = torch.empty(num_rows, num_blocks, dtype=torch.int32, device=logits.device)
    best, where = values.new_empty(num_rows), places.new_empty(num_rows)
    _draw[(num_rows, num_blocks)](
        logits,
        logits if least is None else least,
        choices.temperatures,
        choices.seeds_low,
        choices.seeds_high,
        choices.positions,
        values,
        places,
        start,
        size,
        num_blocks,
        BLOCK=BLOCK,
        HAS_LEAST=least is not None,
        num_warps=4,
    )
    _pick[(num_rows,)](values, places, best, where, num_blocks, ALL_BLOCKS=power_of_two(num_blocks), num_warps=4)
    return best, where


def least_kept(logits: torch.Tensor, choices: ChoiceArrays) -> torch.Tensor:
    """The smallest logit that top-k, then top-p, leave in each row; -inf where neither is asked for. float32 [R]

    `logits` float32 [R, V], of the whole vocabulary; -inf may fill it up.
    """
    num_rows, size = logits.shape
    least = logits.new_empty(num_rows)
    _least_kept[(num_rows,)](
        logits,
        choices.temperatures,
        choices.top_ks,
        choices.top_ps,
        least,
        size,
        BLOCK=min(LEAST_BLOCK, power_of_two(size)),
        num_warps=8,
    )
    return least


@jit
def _mix(x: tl.tensor) -> tl.tensor:
    """SplitMix64's finaliser."""
    x = x + 0x9E3779B97F4A7C15
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB
    return x ^ (x >> 31)


@jit
def _draw(
    logits: tl.tensor,
    least: tl.tensor,
    temperatures: tl.tensor,
    seeds_low: tl.tensor,
    seeds_high: tl.tensor,
    positions: tl.tensor,
    values: tl.tensor,
    places: tl.tensor,
    start: tl.tensor,
    size: tl.tensor,
    num_blocks: tl.tensor,
    BLOCK: tl.constexpr,
    HAS_LEAST: tl.constexpr,
) -> None:
    row, block = tl.program_id(0), tl.program_id(1)
    column = block * BLOCK + tl.arange(0, BLOCK)
    there = column < size
    x = tl.load(logits + row.to(tl.int64) * size + column, mask=there, other=float("-inf"))
    scores = x.to(tl.float64)
    temperature = tl.load(temperatures + row).to(tl.float32, bitcast=True)
    if temperature > 0:
        low = tl.load(seeds_low + row).to(tl.uint32, bitcast=True).to(tl.uint64)
        high = tl.load(seeds_high + row).to(tl.uint32, bitcast=True).to(tl.uint64)
        seed = low | (high << 31)
        key = _mix(_mix(seed) + tl.load(positions + row).to(tl.uint64))
        ids = (start + column).to(tl.uint64)
        bits = _mix(key + ids * 0x9E3779B97F4A7C15) >> 11
        uniform = (bits.to(tl.float64) + 0.5) * 1.1102230246251565e-16
        scores = scores / temperature.to(tl.float64) - tl.log(-tl.log(uniform))
        if HAS_LEAST:
            scores = tl.where(x < tl.load(least + row), float("-inf"), scores)
    scores = tl.where(there, scores, float("-inf"))
    is_nan = tl.max((x != x).to(tl.int32), 0) > 0
    best = tl.max(scores, 0)
    place = tl.min(tl.where((scores == best) & there, column, 2147483647), 0)
    tl.store(values + row * num_blocks + block, tl.where(is_nan, float("nan"), best))
    tl.store(places + row * num_blocks + block, place)


@jit
def _pick(
    values: tl.tensor,
    places: tl.tensor,
    best: tl.tensor,
    where: tl.tensor,
    num_blocks: tl.tensor,
    ALL_BLOCKS: tl.constexpr,
) -> None:
    row = tl.program_id(0)
    block = tl.arange(0, ALL_BLOCKS)
    there = block < num_blocks
    x = tl.load(values + row * num_blocks + block, mask=there, other=float("-inf"))
    is_nan = tl.max((x != x).to(tl.int32), 0) > 0
    largest = tl.max(tl.where(x != x, float("-inf"), x), 0)
    place = tl.load(places + row * num_blocks + block, mask=there, other=2147483647)
    first = tl.min(tl.where(there & (x == largest), place, 2147483647), 0)
    tl.store(best + row, tl.where(is_nan, float("nan"), largest))
    tl.store(where + row, tl.where(first == 2147483647, 0, first))


@jit
def _ordered(x: tl.tensor) -> tl.tensor:
    """int64 that are in the order of these float32."""
    bits = (x + 0.0).to(tl.int32, bitcast=True)  # -0 becomes 0
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits).to(tl.int64)


@jit
def _count(logits: tl.tensor, size: tl.tensor, bound: tl.tensor, BLOCK: tl.constexpr) -> tl.tensor:
    """How many logits are at least `bound`, as _ordered has them."""
    total = tl.zeros([BLOCK], tl.int32)
    for first in range(0, size, BLOCK):
        column = first + tl.arange(0, BLOCK)
        x = tl.load(logits + column, mask=column < size, other=float("-inf"))
        total += ((column < size) & (_ordered(x) >= bound)).to(tl.int32)
    return tl.sum(total, 0)


@jit
def _mass(
    logits: tl.tensor,
    size: tl.tensor,
    bound: tl.tensor,
    largest: tl.tensor,
    temperature: tl.tensor,
    BLOCK: tl.constexpr,
) -> tl.tensor:
    """Their weights together, that of the largest being 1. float64"""
    total = tl.zeros([BLOCK], tl.float64)
    for first in range(0, size, BLOCK):
        column = first + tl.arange(0, BLOCK)
        x = tl.load(logits + column, mask=column < size, other=float("-inf"))
        weight = tl.exp((x - largest).to(tl.float64) / temperature)
        total += tl.where((column < size) & (_ordered(x) >= bound), weight, 0.0)
    return tl.sum(total, 0)


@jit
def _least_kept(
    logits: tl.tensor,
    temperatures: tl.tensor,
    top_ks: tl.tensor,
    top_ps: tl.tensor,
    least: tl.tensor,
    size: tl.tensor,
    BLOCK: tl.constexpr,
) -> None:
    row = tl.program_id(0)
    here = logits + row.to(tl.int64) * size
    top_k = tl.load(top_ks + row)
    top_p = tl.load(top_ps + row).to(tl.float32, bitcast=True)
    temperature = tl.load(temperatures + row).to(tl.float32, bitcast=True).to(tl.float64)
    lowest = tl.full([], -2147483648, tl.int64)
    highest = tl.full([], 2147483647, tl.int64)
    kept = lowest
    if (temperature > 0) & (top_k > 0) & (top_k < size):
        above = highest  # too few logits are at least this
        while above - kept > 1:
            middle = kept + (above - kept) // 2
            if _count(here, size, middle, BLOCK) >= top_k:
                kept = middle
            else:
                above = middle
    if (temperature > 0) & (top_p < 1):
        largest = tl.full([], float("-inf"), tl.float32)
        for first in range(0, size, BLOCK):
            column = first + tl.arange(0, BLOCK)
            x = tl.load(here + column, mask=column < size, other=float("-inf"))
            largest = tl.maximum(largest, tl.max(x, 0))
        total = _mass(here, size, kept, largest, temperature, BLOCK)
        if kept > lowest:  # of those equal to the last one, as many as top-k leaves
            more = _mass(here, size, kept + 1, largest, temperature, BLOCK)
            num_more = _count(here, size, kept + 1, BLOCK)
            num_equal = _count(here, size, kept, BLOCK) - num_more
            total = more + (total - more) / num_equal * (top_k - num_more)
        above = highest  # these have too little weight
        while above - kept > 1:
            middle = kept + (above - kept) // 2
            if _mass(here, size, middle, largest, temperature, BLOCK) >= top_p.to(tl.float64) * total:
                kept = middle
            else:
                above = middle
    bits = kept.to(tl.int32)
    bits = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    tl.store(least + row, tl.where(kept == lowest, float("-inf"), bits.to(tl.float32, bitcast=True)))


def draw_eager(
    logits: torch.Tensor, least: torch.Tensor | None, choices: ChoiceArrays, start: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """`draw` in torch."""
    count, size = logits.shape
    temperature = choices.temperatures[:count].view(torch.float32).double()[:, None]
    seeds = choices.seeds_low[:count].long() | choices.seeds_high[:count].long().bitwise_and(0xFFFFFFFF) << 31
    noise = gumbel(seeds.numpy(), choices.positions[:count].long().numpy(), (start, start + size), logits.device)
    scores = logits / temperature + noise
    if least is not None:
        scores = scores.masked_fill(logits < least[:, None], -torch.inf)
    best, where = torch.where(temperature > 0, scores, logits.double()).max(dim=-1)
    return best, where.int()


def least_kept_eager(logits: torch.Tensor, choices: ChoiceArrays) -> torch.Tensor:
    """`least_kept` in torch."""
    least = torch.full((len(logits),), -torch.inf, dtype=logits.dtype)
    for row, line in enumerate(logits):
        temperature = float(choices.temperatures[row : row + 1].view(torch.float32))
        top_k, top_p = int(choices.top_ks[row]), float(choices.top_ps[row : row + 1].view(torch.float32))
        if temperature > 0 and (top_k > 0 or top_p < 1):
            least[row] = least_kept_of_row(line, temperature, top_k, top_p).to(logits.dtype)
    return least
