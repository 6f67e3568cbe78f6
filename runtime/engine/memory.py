"""The workers' page memory as the scheduler sees it: a sequence is admitted only where the pages it may ever need are
free, so that no step runs out of them."""

from __future__ import annotations

from collections.abc import Sequence

from runtime.model.cuda.paged_cache import pages_of_slot
from runtime.request import Request
from runtime.retention import LayerGroup


class PageMemory:
    """What the pages of each group of layers are promised to. Where slots have memory of their own, all fits."""

    def __init__(self, num_pages: Sequence[int] | None, groups: Sequence[LayerGroup], max_rows: int) -> None:
        """`num_pages`: per group, on the worker that has fewest; None: slots have memory of their own. `max_rows`: most
        rows of a step."""
        self.is_shared = num_pages is not None
        self._free = list(num_pages or ())
        self._kinds = [group.new() for group in groups] if self.is_shared else []
        self._max_rows = max_rows
        self._promised: dict[int, list[int]] = {}
        """By slot."""

    def fits(self, request: Request) -> bool:
        """Whether a new sequence that begins with this request can have its pages."""
        return all(need <= free for need, free in zip(self._needs(request), self._free, strict=True))

    def promise(self, slot: int, request: Request) -> None:
        """The sequence comes into `slot`."""
        needs = self._promised[slot] = self._needs(request)
        self._free = [free - need for free, need in zip(self._free, needs, strict=True)]

    def give_back(self, slot: int) -> None:
        """The slot's sequence has ended."""
        needs = self._promised.pop(slot)
        self._free = [free + need for free, need in zip(self._free, needs, strict=True)]

    def _needs(self, request: Request) -> list[int]:
        """Pages per group. A conversation may fill its slot; other requests end where prompt and answer do, but for
        guesses, of which the window's may stand behind the last token."""
        num_tokens = None
        if request.session_id is None:
            num_tokens = len(request.prompt_ids) + request.sampling.max_new_tokens
            num_tokens += request.lookahead.window_size + request.lookahead.ngram_size
        return [pages_of_slot(kind, self._max_rows, num_tokens) for kind in self._kinds]
