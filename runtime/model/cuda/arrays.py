"""What a step's kernels read, beside weights and caches: int32 arrays, made on the host and copied at once.

Positions and places. A sequence's token at position p stands in its page p // PAGE at offset p % PAGE, whether it is
stored or staged in this step; a page is PAGE consecutive *places* of the cache, and a table says which. Of several rows
of a tree that have the same position only the first can stand there. The others, and their descendants, are
*diverged*: they stand in the scratch places, row r of the step at place r.

What a row sees, in the order in which it adds it up:
    dense     positions [lowest, dense_stop) of its sequence, in chunks of CHUNK that start at multiples of CHUNK
    anchors   tokens that its policy keeps outside the window, numbers [anchors_from, anchors_to) of their list, which
              has pages of its own
    tail      positions [dense_stop, position]: until `diverged` in the sequence's pages, then in scratch places

`dense_stop` is the last multiple of CHUNK that is at least DEPTH before the row. So as long as a row diverges no
earlier, the three parts, and the order of additions in each, depend on its position alone, and not on which of its
ancestors are stored and which staged.

Shape legend: T rows the arrays have room for (num_rows of them are used), P entries of all lists together.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

PAGE = 256
"""Tokens per page."""
CHUNK = 64
"""Tokens that are looked at together; divides PAGE."""
DEPTH = 64
"""A tree may be so deep before its rows' order of additions depends on what is staged."""

ANCHOR_BIT = 1 << 30
"""In a path's entry: the row may be an anchor, so it is seen outside the window, too."""


@dataclass(frozen=True)
class RowArrays:
    """What all layers have in common. int32, on the device."""

    counts: torch.Tensor
    """[2] num_rows, num_tiles."""
    tokens: torch.Tensor
    """[T]"""
    positions: torch.Tensor
    """[T]"""
    rope_lengths: torch.Tensor
    """[T] tokens of the prompt, which dynamic RoPE scales by."""
    dense_stop: torch.Tensor
    """[T]"""
    diverged: torch.Tensor
    """[T] the first position of the row's path that stands in a scratch place; position + 1: none does."""
    path_start: torch.Tensor
    """[T] index in `lists` of the scratch places of positions `diverged` .. position."""
    tiles: torch.Tensor
    """[2, T] rows first .. stop-1 of one sequence, whose dense part and anchors are computed together."""
    lists: torch.Tensor
    """[P] all tables, then the paths."""


@dataclass(frozen=True)
class CacheArrays:
    """What the layers of a group have in common, which keep the same tokens. int32, on the device."""

    places: torch.Tensor
    """[T] where the row's keys and values go; -1 for rows that fill up the shape."""
    anchor_places: torch.Tensor
    """[T] where they go, too, because the row may be an anchor; -1: nowhere."""
    tables: torch.Tensor
    """[T] index in `lists` of the row's sequence's page 0, were it there; only pages that are looked at are there."""
    anchor_tables: torch.Tensor
    """[T] the same for the pages of its anchors."""
    lowest: torch.Tensor
    """[T] the first position that the row sees without being an anchor."""
    anchors_from: torch.Tensor
    """[T] the first anchor it sees in layers with a sliding window of the model's own; elsewhere that is number 0."""
    anchors_to: torch.Tensor
    """[T]"""
    slots: torch.Tensor
    """[T] the row's place in the cache as its policy counts, from which the anchors' distances are measured."""


@dataclass(frozen=True)
class ChoiceArrays:
    """The rows that choose a token, and how they do. int32, on the device, [T] each, of which the first R are used."""

    rows: torch.Tensor
    """Which rows of the step they are; those that fill up a shape are row 0, and choose greedily."""
    temperatures: torch.Tensor
    """float32 bits; 0: the row takes the likeliest token."""
    top_ks: torch.Tensor
    """0: all."""
    top_ps: torch.Tensor
    """float32 bits"""
    seeds_low: torch.Tensor
    """The seed's low 31 bits."""
    seeds_high: torch.Tensor
    """Its high 32 bits."""
    positions: torch.Tensor
    """Of the token that is chosen, which the noise depends on."""
