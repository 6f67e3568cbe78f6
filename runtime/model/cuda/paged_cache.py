"""PagedKVCache: the keys and values of all sequences of a group of layers, in pages that the sequences share.

A token at position p stands in its sequence's page p // PAGE at offset p % PAGE for as long as its policy may show it
to a later one as a member of the window. Pages that the window has left are given back. Tokens that a policy keeps
beyond the window, its anchors, are copied into pages of their own, in the order of their positions. Nothing else moves:
a row that the current step stages at a place where it is accepted stays there (arrays.py says which do).

Whatever decides what is kept is a Retention, the same one as on every rank.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray

from runtime.errors import ConfigError
from runtime.mesh.device import upload
from runtime.model.cuda.arrays import PAGE
from runtime.model.rotary import Rotary
from runtime.retention import Compacting, Compaction, LayerGroup, Retention, Sliding

Ints = NDArray[np.int64]


class OutOfPagesError(RuntimeError):
    """All pages are in use: fewer sequences, or shorter ones, fit the memory."""


@dataclass
class Staged:
    """Where the rows are that a sequence staged in its last step."""

    places: Ints
    """[t]; -1: another step has taken the row's place."""
    anchor_places: Ints
    """[t] where they stand a second time, as anchors; -1: nowhere."""


@dataclass
class Pages:
    """Consecutive pages of one sequence."""

    first: int = 0
    """The number of the first one that is there."""
    pages: list[int] = field(default_factory=list)

    def places(self, indices: Ints) -> Ints:
        """Of the tokens at these positions, or of the anchors with these numbers."""
        return np.asarray(self.pages, np.int64)[indices // PAGE - self.first] * PAGE + indices % PAGE


class PagedKVCache:
    """One buffer [layers, 2, K, places, d]: the scratch places first, then the pages. Same surface as KVCache."""

    def __init__(
        self,
        group: LayerGroup,
        num_slots: int,
        num_kv_heads: int,
        head_dim: int,
        max_staged: int,
        rotary: Rotary,
        dtype: torch.dtype,
        device: torch.device,
        num_pages: int | None = None,
    ) -> None:
        """`max_staged`: most rows of a step, all sequences together. `num_pages`: None: as many as slots can fill.

        Raises ConfigError if the machine cannot give that much memory.
        """
        self.layers = group.layers
        self.max_staged = max_staged
        self.rotary = rotary
        self.retained: list[Retention] = [group.new() for _ in range(num_slots)]
        """Per slot, which tokens of the sequence are kept."""
        self.runs = [Pages() for _ in range(num_slots)]
        self.anchors = [Pages() for _ in range(num_slots)]
        self.anchor_positions: list[Ints] = [np.empty(0, np.int64) for _ in range(num_slots)]
        """Per slot, of the anchors that have been copied to their pages, ascending."""
        self._staged: dict[int, Staged] = {}
        self._moves: list[Ints] = []
        self._returned: list[int] = []
        """Pages that are free as soon as the moves are done."""
        num_scratch = -(-max_staged // PAGE)
        self._num_scratch = num_scratch * PAGE
        if num_pages is None:
            num_pages = num_slots * pages_of_slot(self.retained[0], max_staged)
        self.num_pages = num_pages
        self._free = list(range(num_scratch + num_pages - 1, num_scratch - 1, -1))
        places = (num_scratch + num_pages) * PAGE
        try:
            self.buffer = torch.empty(len(group.layers), 2, num_kv_heads, places, head_dim, dtype=dtype, device=device)
            turned = (num_slots, len(group.layers), num_kv_heads, self.retained[0].max_turned, head_dim)
            self.unturned = torch.empty(turned, dtype=dtype, device=device)
        except RuntimeError as error:
            size = len(group.layers) * 2 * num_kv_heads * places * head_dim * dtype.itemsize / 2**30
            problem = f"{num_pages} pages of {PAGE} tokens need {size:.1f} GiB on {device}, which cannot be had"
            remedy = "Lower it or scheduler.max_sequences."
            raise ConfigError("cache.capacity", self.retained[0].max_stored, problem, remedy) from error

    @property
    def dtype(self) -> torch.dtype:
        return self.buffer.dtype

    @property
    def num_kv_heads(self) -> int:
        return self.buffer.shape[2]

    @property
    def device(self) -> torch.device:
        return self.buffer.device

    @property
    def num_free_pages(self) -> int:
        return len(self._free) + len(self._returned)

    @functools.cached_property
    def window(self) -> int | None:
        """Of a policy that slides: a row at p sees positions from p - window + 1 on, and anchors."""
        retained = self.retained[0]
        return retained.window if isinstance(retained, Sliding) else None

    @functools.cached_property
    def has_anchors(self) -> bool:
        """Whether a row may see tokens outside the window."""
        retained = self.retained[0]
        if isinstance(retained, Compacting):
            return retained.num_initial + retained.max_separators > 0
        return self.window is not None and (retained.num_initial > 0 or len(retained.separators) > 0)

    @functools.cached_property
    def has_slots(self) -> bool:
        """Whether anchors' distances are those of the cache."""
        return self.retained[0].slot

    def lowest(self, slot: int, positions: Ints) -> Ints:
        """[t] the first position that rows at these see without being an anchor."""
        if self.window is not None:
            return np.maximum(positions - self.window + 1, 0)
        retained = self.retained[slot]
        first = retained.length - retained.num_stored + retained.num_anchors if isinstance(retained, Compacting) else 0
        return np.full(len(positions), first)

    def stage(self, slot: int, tokens: Ints, positions: Ints, in_place: NDArray[np.bool_], first_row: int) -> Staged:
        """Where rows `first_row` ... of the next step go, with pages for them. Asserts that there are scratch places.

        `in_place` [t]: the row stands where its position is. Raises OutOfPagesError.
        """
        count = len(positions)
        assert first_row + count <= self.max_staged, f"row {first_row + count} of a step, room for {self.max_staged}"
        places = np.arange(first_row, first_row + count)
        rows = positions[in_place]
        self._grow(self.runs[slot], int(rows.max()) + 1)
        places[in_place] = self.runs[slot].places(rows)
        anchor_places = np.full(count, -1)
        if self.window is not None and self.has_anchors:
            chosen = in_place & self.retained[slot].may_anchor(positions, tokens)
            numbers = len(self.anchor_positions[slot]) + np.arange(chosen.sum())
            self._grow(self.anchors[slot], len(self.anchor_positions[slot]) + len(numbers))
            anchor_places[chosen] = self.anchors[slot].places(numbers)
        self._staged[slot] = Staged(places, anchor_places)
        return self._staged[slot]

    def begin_step(self) -> Ints:
        """Scratch places are for other rows now: what they held can no longer be accepted. As `take_moves`."""
        for staged in self._staged.values():
            staged.places[staged.places < self._num_scratch] = -1
        return self.take_moves()

    def take_moves(self) -> Ints:
        """[2, n] sources and destinations that the next step is to copy, before its rows are written."""
        moves = np.concatenate([np.empty((2, 0), np.int64), *self._moves], axis=1)
        self._moves.clear()
        self._free.extend(self._returned)
        self._returned.clear()
        return moves

    def commit(self, slot: int, staged: Sequence[int], tokens: Sequence[int]) -> None:
        """Make the staged rows with these indices (ascending) and token ids the next tokens of the sequence."""
        assert all(a < b for a, b in zip(staged, staged[1:], strict=False)), "staged rows out of order"
        if not len(staged):
            return
        rows, known = np.asarray(staged), self._staged[slot]
        places, anchor_places = self._destinations(slot, tokens)
        sources = known.places[rows]
        assert (sources >= 0).all(), "a diverged row of an earlier step: another step has taken its place"
        self._move(sources, places)
        is_anchor = (anchor_places >= 0) & (anchor_places != known.anchor_places[rows])
        self._move(sources[is_anchor], anchor_places[is_anchor])
        self._apply(slot, tokens)

    def read_staged(self, slot: int, staged: Sequence[int]) -> torch.Tensor:
        """A copy [layers, 2, K, n, d] of n staged rows, for another replica to `append`."""
        return self._read(self._staged[slot].places[np.asarray(staged, np.int64)])

    def empty_block(self, count: int) -> torch.Tensor:
        """Room for `count` tokens as `read_staged` gives them, to receive another replica's in."""
        num_layers, _, num_kv_heads, _, head_dim = self.buffer.shape
        return self.buffer.new_empty(num_layers, 2, num_kv_heads, count, head_dim)

    def append(self, slot: int, block: torch.Tensor, tokens: Sequence[int]) -> None:
        """Make tokens given as `read_staged` gives them the next ones of the sequence."""
        places, anchor_places = self._destinations(slot, tokens)
        self._write(places, block)
        is_anchor = np.flatnonzero(anchor_places >= 0)
        if len(is_anchor):
            self._write(anchor_places[is_anchor], block[..., upload(is_anchor, self.device), :])
        self._apply(slot, tokens)

    def begin_turn(self, slot: int, num_coming: int) -> None:
        """Make room for a turn of so many tokens, where the policy evicts per turn."""
        places, old = self._stored_places(slot), self.retained[slot]
        compaction = old.begin_turn(num_coming)
        if compaction is not None:
            self._compact(slot, compaction, places)

    def reset(self, slot: int) -> None:
        """Empty the slot for another sequence."""
        self.retained[slot].reset()
        self._staged.pop(slot, None)
        for pages in (self.runs[slot], self.anchors[slot]):
            self._returned.extend(reversed(pages.pages))
        self.runs[slot], self.anchors[slot] = Pages(), Pages()
        self.anchor_positions[slot] = np.empty(0, np.int64)

    def state(self, slot: int) -> list[int]:
        """Which tokens the slot has, and how many pages from which on; for another replica to `restore`."""
        self._move_now()
        runs, anchors, known = self.runs[slot], self.anchors[slot], self.anchor_positions[slot].tolist()
        pages = [runs.first, len(runs.pages), anchors.first, len(anchors.pages)]
        return [*pages, len(known), *known, *self.retained[slot].state().tolist()]

    def restore(self, slot: int, state: Sequence[int]) -> None:
        """Make room for another replica's tokens, which are still to be given by `refill`. Raises OutOfPagesError."""
        self.reset(slot)
        self._move_now()
        first, num_run, first_anchor, num_anchor, count, *rest = state
        self.anchor_positions[slot] = np.array(rest[:count], np.int64)
        self.retained[slot].restore(rest[count:])
        for pages, start, number in (
            (self.runs[slot], first, num_run),
            (self.anchors[slot], first_anchor, num_anchor),
        ):
            pages.first = start
            self._grow(pages, (start + number) * PAGE)

    def contents(self, slot: int) -> list[torch.Tensor]:
        """Copies of all that the slot's tokens have in memory."""
        count = self.retained[slot].num_slot_anchors if self.unturned.shape[-2] else 0
        return [self._read(self._all_places(slot)), self.unturned[slot, ..., :count, :].clone()]

    def refill(self, slot: int, contents: Sequence[torch.Tensor]) -> None:
        """Write what `contents` of the same state are."""
        pages, unturned = contents
        self._write(self._all_places(slot), pages)
        self.unturned[slot, ..., : unturned.shape[-2], :] = unturned

    def _all_places(self, slot: int) -> Ints:
        """Of the slot's pages."""
        pages = np.array([*self.runs[slot].pages, *self.anchors[slot].pages], np.int64)
        return (pages[:, None] * PAGE + np.arange(PAGE)).ravel()

    def clean(self, slot: int) -> None:
        """Forget the staged rows: nothing is to be done, since no place is read before it has been written anew."""

    def _destinations(self, slot: int, tokens: Sequence[int]) -> tuple[Ints, Ints]:
        """Places of the sequence's next tokens, and those as anchors (-1: none), which count as anchors from now on."""
        retained, run, anchors = self.retained[slot], self.runs[slot], self.anchors[slot]
        positions = np.arange(retained.length, retained.length + len(tokens))
        self._grow(run, retained.length + len(tokens))
        anchor_places = np.full(len(tokens), -1)
        if self.window is not None and self.has_anchors:
            chosen = retained.may_anchor(positions, np.asarray(tokens, np.int64))
            before = len(self.anchor_positions[slot])
            self.anchor_positions[slot] = np.concatenate([self.anchor_positions[slot], positions[chosen]])
            self._grow(anchors, len(self.anchor_positions[slot]))
            anchor_places[chosen] = anchors.places(np.arange(before, len(self.anchor_positions[slot])))
        return run.places(positions), anchor_places

    def _apply(self, slot: int, tokens: Sequence[int]) -> None:
        """The tokens' keys and values are on their way; drop what the policy no longer keeps."""
        retained = self.retained[slot]
        places = self._stored_places(slot, len(tokens))
        compaction = retained.commit(tokens)
        if self.window is not None:
            self._release(slot, retained.length - self.window + 1)
        elif compaction is not None:
            self._compact(slot, compaction, places)
        assert retained.num_stored <= retained.max_stored, f"slot {slot} exceeds its capacity"

    def _stored_places(self, slot: int, num_new: int = 0) -> Ints:
        """Of the stored tokens of a policy that compacts, and of the next ones."""
        retained = self.retained[slot]
        if not isinstance(retained, Compacting):
            return np.empty(0, np.int64)
        num_run = retained.num_stored - retained.num_anchors
        run = np.arange(retained.length - num_run, retained.length + num_new)
        return np.concatenate([self.anchors[slot].places(np.arange(retained.num_anchors)), self.runs[slot].places(run)])

    def _compact(self, slot: int, compaction: Compaction, places: Ints) -> None:
        """Copy what have become anchors to their pages, their keys turned, and give pages back. Seldom: not in a graph.

        `places` are those of the tokens stored before.
        """
        retained = self.retained[slot]
        assert isinstance(retained, Compacting)
        self._move_now()
        count, turns = retained.num_anchors, compaction.turns
        kept = compaction.kept[:count]
        block = self._read(places[kept])
        if len(turns):
            earlier = int((kept < compaction.num_turned_before).sum())
            unturned = self.unturned[slot, ..., :count, :]
            before = self.unturned[slot].index_select(2, upload(kept[:earlier], self.device))
            unturned.copy_(torch.cat([before, block[:, 0, :, earlier:]], dim=2))
            block[:, 0] = self.rotary.turn(unturned, turns)
        self._grow(self.anchors[slot], count)
        self._write(self.anchors[slot].places(np.arange(count)), block)
        self.anchor_positions[slot] = retained.positions[:count].copy()
        self._release(slot, int(retained.positions[count]) if count < retained.num_stored else retained.length)

    def _grow(self, pages: Pages, count: int) -> None:
        """Pages for the first `count` tokens."""
        while pages.first + len(pages.pages) < -(-count // PAGE):
            if not self._free:
                self._move_now()
            if not self._free:
                raise OutOfPagesError(f"all {self.num_pages} pages of {PAGE} tokens are in use")
            pages.pages.append(self._free.pop())

    def _release(self, slot: int, position: int) -> None:
        """No later row sees what stands before this position as a member of the window."""
        run = self.runs[slot]
        while run.first < position // PAGE and run.pages:
            self._returned.append(run.pages.pop(0))
            run.first += 1

    def _move(self, sources: Ints, destinations: Ints) -> None:
        moved = sources != destinations
        if moved.any():
            self._moves.append(np.stack([sources[moved], destinations[moved]]))

    def _move_now(self) -> None:
        sources, destinations = self.take_moves()
        if len(sources):
            self._write(destinations, self._read(sources))

    def _read(self, places: Ints) -> torch.Tensor:
        return self.buffer.index_select(3, upload(np.ascontiguousarray(places), self.device))

    def _write(self, places: Ints, block: torch.Tensor) -> None:
        self.buffer.index_copy_(3, upload(np.ascontiguousarray(places), self.device), block)


def pages_of_slot(retained: Retention, max_staged: int, num_tokens: int | None = None) -> int:
    """Most pages that a sequence can hold: those of its tokens, of the rows it stages, and of its anchors.

    `num_tokens`: no row stands behind so many; None: it may fill the slot.
    """
    count = -(-(retained.max_stored + max_staged) // PAGE) + 1
    num_anchors = 0
    if isinstance(retained, Compacting):
        num_anchors = -(-(retained.num_initial + retained.max_separators) // PAGE)
    elif isinstance(retained, Sliding) and retained.window is not None:
        num_anchors = count
    if num_tokens is None:
        return count + num_anchors
    most = -(-num_tokens // PAGE)
    return min(count, most) + min(num_anchors, most)
