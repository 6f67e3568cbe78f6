"""What rows choose by more than their largest logit, natively: the rule is that of sampler.draw_on_torch."""

from __future__ import annotations

import ctypes

import numpy as np
import torch
from numpy.typing import NDArray

from runtime.mesh.mesh import Mesh
from runtime.model.sampler import Parameters, Ragged, Sampled, gather_vocabulary
from runtime.step import Row

DRAW = np.dtype(
    [
        *((name, np.uint64) for name in ("logits", "mask", "counted", "counts", "biased", "biases")),
        *((name, np.int64) for name in ("num_counted", "num_biased", "seed", "position", "top_k")),
        *((name, np.float64) for name in ("temperature", "top_p", "min_p")),
        *((name, np.float64) for name in ("repetition", "presence", "frequency", "least")),
    ]
)
"""struct Draw of drawing.h."""


def draw(
    kernels: ctypes.CDLL,
    logits: torch.Tensor,
    sampled: Sampled,
    mesh: Mesh,
    vocab_range: tuple[int, int],
    num_threads: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """What draw_on_torch gives. `logits` float32, [R, V_local]."""
    parameters = Parameters(sampled.sequences)
    lines = _lines(logits, sampled, parameters)
    first, count, num_rows = vocab_range[0], logits.shape[1], len(lines)
    filtered = np.flatnonzero(parameters.is_filtered)
    lines["least"] = -np.inf
    if len(filtered) and mesh.tp == 1:
        lines["least"][filtered] = np.nan  # found where the tokens are
    elif len(filtered):
        some = np.ascontiguousarray(lines[filtered])
        adjusted = torch.empty(len(some), count)
        kernels.outrider_adjust(some.ctypes.data, len(some), first, count, adjusted.data_ptr())
        whole = gather_vocabulary(adjusted, mesh)
        least = np.empty(len(some))
        kernels.outrider_least(some.ctypes.data, len(some), whole.data_ptr(), whole.shape[1], least.ctypes.data)
        lines["least"][filtered] = least
    values, places = torch.empty(num_rows, dtype=torch.float64), torch.empty(num_rows, dtype=torch.int64)
    given = lines.ctypes.data, num_rows, first, count
    kernels.outrider_draw(*given, values.data_ptr(), places.data_ptr(), min(num_threads, num_rows))
    return values, places


def _lines(logits: torch.Tensor, sampled: Sampled, parameters: Parameters) -> NDArray[np.void]:
    """One per sampled row. What they point to lives as long as `logits` and `sampled`."""
    lines = np.zeros(len(sampled.index), DRAW)
    assert logits.dtype == torch.float32 and logits.stride(1) == 1
    lines["logits"] = logits.data_ptr() + sampled.index * (logits.stride(0) * logits.itemsize)
    lines["temperature"] = np.where(parameters.by_chance, parameters.temperature, 0.0)
    for name in ("seed", "top_k", "top_p", "min_p", "repetition", "presence", "frequency"):
        lines[name] = getattr(parameters, name)
    lines["position"] = sampled.rows[:, Row.POSITION].astype(np.int64) + 1
    _point(lines, sampled.counts, "counted", "counts", "num_counted")
    _point(lines, sampled.biases, "biased", "biases", "num_biased")
    if sampled.masks is not None and sampled.mask_of is not None:
        masks, mask_of = sampled.masks, sampled.mask_of
        lines["mask"] = np.where(mask_of >= 0, masks.ctypes.data + mask_of * masks.strides[0], 0)
    return lines


def _point(lines: NDArray[np.void], lists: Ragged | None, tokens: str, values: str, count: str) -> None:
    if lists is not None:
        starts = lists.starts[:-1]
        lines[tokens] = lists.tokens.ctypes.data + starts * lists.tokens.itemsize
        lines[values] = lists.values.ctypes.data + starts * lists.values.itemsize
        lines[count] = np.diff(lists.starts)
