"""Tables of what the model gave after a token the last time (Token Recycling, Luo et al., 2024, arXiv 2408.08696).

The paper's table is keyed by one token. Here there is one for the last token, one for the last two and one for the
last three: a longer context says more, a shorter one is known more often.
"""

from __future__ import annotations

from collections.abc import Sequence

from runtime.step import TOP_BITS

MAX_ORDER = 3
"""Most tokens of context that a table is keyed by."""

MAX_CONTEXTS = 1 << 16
"""Contexts kept per table, some 100 MiB for the three when full; the one not updated for longest goes first."""


CLASSES = 16
"""Of log-probability, each half a nat wide; the last is open."""

Likeliest = tuple[tuple[int, int], ...]
"""(token, class of its probability), likeliest first."""


def unpacked(packed: Sequence[int]) -> Likeliest:
    """A row's likeliest tokens as the workers pack them (runtime.step)."""
    return tuple([(word >> TOP_BITS, _CLASS_OF[word & _MASK]) for word in packed])


_MASK = (1 << TOP_BITS) - 1
_CLASS_OF = [min(sixteenths >> 3, CLASSES - 1) for sixteenths in range(1 << TOP_BITS)]


class RecycleTable:
    """The model's likeliest next tokens by the last one, two and three tokens."""

    def __init__(self, max_contexts: int = MAX_CONTEXTS) -> None:
        self.max_contexts = max_contexts
        self._tables: list[dict[tuple[int, ...], tuple[int, ...] | Likeliest]] = [{} for _ in range(MAX_ORDER)]
        """Words are unpacked when they are looked up, and kept so: most never are. Tuples, since the garbage collector
        need not look into those again and again."""

    def update(self, tail: tuple[int, ...], top: Sequence[int]) -> None:
        """The model's likeliest tokens, packed, after a text that ends in `tail` (MAX_ORDER tokens, or fewer at its
        start)."""
        words = tuple(top)
        for order, table in enumerate(self._tables[: len(tail)], 1):
            context = tail[-order:]
            table.pop(context, None)  # to the young end
            table[context] = words
            if len(table) > self.max_contexts:
                del table[next(iter(table))]

    def lookup(self, tail: Sequence[int]) -> list[tuple[int, Likeliest]]:
        """(order, likeliest tokens) of the two longest contexts known, longest first."""
        found = []
        for order in range(min(MAX_ORDER, len(tail)), 0, -1):
            table, context = self._tables[order - 1], tuple(tail[-order:])
            top = table.get(context)
            if top is not None:
                if isinstance(top[0], int):
                    top = table[context] = unpacked(top)
                found.append((order, top))
                if len(found) == 2:
                    break
        return found

    def __len__(self) -> int:
        return sum(len(table) for table in self._tables)
