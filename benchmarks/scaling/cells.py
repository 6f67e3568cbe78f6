"""What the scaling experiment consists of: meshes, methods and row budgets; and the file in which finished answers lie.

The unit of work, and of resuming, is one answer: one prompt under one cell. Its key is a hash of everything that
its figures depend on, the code left out, so a grown grid or prompt list runs only what is new.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import typer

from benchmarks.costs import splits
from runtime.config import LookaheadConfig

NGRAM_SIZE = 5
"""N of every cell, the paper's for a 7B model."""
SOURCE_SETS = ("jacobi", "suffix", "recycle", "suffix+recycle", "suffix+recycle+jacobi")
OFF = "off"
MIN_BUDGET = 8
"""Fewest rows that hold a window of one column with its filling, and a candidate."""


@dataclass(frozen=True, order=True)
class Cell:
    """One method on one mesh."""

    lp: int
    tp: int
    sources: str
    """Names joined by +, or "off"."""
    budget: int = 1
    """Rows of the whole mesh in a step, the current token included; 1 where lookahead is off."""

    @property
    def num_workers(self) -> int:
        return self.lp * self.tp

    @property
    def method(self) -> str:
        return self.sources if self.sources == OFF else f"{self.sources} {self.budget}"

    def lookahead(self, base: LookaheadConfig) -> LookaheadConfig:
        """Fixed settings: no planner, and nothing kept from other requests, so that S depends on this cell alone."""
        fixed: dict[str, Any] = {"planner": False, "share": False}
        if self.sources == OFF:
            return base.merged({**fixed, "enabled": False, "row_budget": None})
        names = self.sources.split("+")
        tails = NGRAM_SIZE - 1
        # The paper's W = G: alone, window and verification branch take half the rows each. In company, where a row is
        # worth more in the tree, the window takes a quarter.
        window = max(1, self.budget // (tails * (2 if names == ["jacobi"] else 4)))
        candidates = max(1, self.budget // (tails * (2 if names == ["jacobi"] else 1)))
        settings = {
            "enabled": True,
            "sources": names,
            "window_size": window,
            "ngram_size": NGRAM_SIZE,
            "guess_set_size": min(candidates, 256),
            "row_budget": self.budget,
        }
        return base.merged({**fixed, **settings}, "lookahead.")

    @property
    def num_candidates(self) -> float:
        """b of the paper's formula: n-gram tails of N-1 tokens that the rows hold, outside the window."""
        tails = NGRAM_SIZE - 1
        return max(1.0, self.budget / tails / (2 if self.sources == "jacobi" else 1))


def grid(
    workers: Iterable[int], budgets: Sequence[int], source_sets: Sequence[str], num_heads: int
) -> dict[tuple[int, int], list[Cell]]:
    """The cells of each mesh (lp, tp). Lookahead off runs where there is one replica: alone, and tensor-parallel.

    The 1x1 mesh is always there: it says what the tokens are, and what S is.
    """
    cells: dict[tuple[int, int], list[Cell]] = {}
    for count in sorted({1, *workers}):
        for lp, tp in splits(count, num_heads):
            plain = [Cell(lp, tp, OFF)] if lp == 1 else []
            cells[lp, tp] = plain + [Cell(lp, tp, sources, budget) for sources in source_sets for budget in budgets]
    return cells


def parse_numbers(text: str, option: str, least: int = 1) -> list[int]:
    """Comma-separated whole numbers of at least `least`. Raises BadParameter."""
    try:
        numbers = [int(part) for part in text.split(",")]
    except ValueError:
        raise typer.BadParameter(f"{text}: write numbers with commas between them.", param_hint=option) from None
    if min(numbers) < least:
        raise typer.BadParameter(f"{min(numbers)}: the least is {least}.", param_hint=option)
    return sorted(set(numbers))


def parse_sources(text: str) -> list[str]:
    """Comma-separated sets, their names joined by +. Raises BadParameter."""
    known = {name for names in SOURCE_SETS for name in names.split("+")}
    sets = [part.strip() for part in text.split(",")]
    for names in sets:
        if unknown := set(names.split("+")) - known:
            problem = f"{', '.join(sorted(unknown))}: unknown; known are {', '.join(sorted(known))}."
            raise typer.BadParameter(problem, param_hint="--sources")
    return sets


def key_of(settings: dict[str, Any]) -> str:
    """A short hash of JSON-like settings, whatever their order."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]


class Store:
    """Finished answers, one JSON line each, by key."""

    def __init__(self, file: Path, resume: bool) -> None:
        """Without `resume`, what is there is moved aside (to FILE.old) and not used."""
        self.file = file
        self.records: dict[str, dict[str, Any]] = {}
        file.parent.mkdir(parents=True, exist_ok=True)
        if not file.exists():
            return
        if not resume:
            file.replace(file.with_name(file.name + ".old"))
            return
        for line in file.read_text().splitlines():
            try:
                record = json.loads(line)
            except json.JSONDecodeError:
                continue  # the last line of a run that was killed
            self.records[record["key"]] = record

    def missing(self, keys: Collection[str]) -> list[str]:
        return [key for key in keys if key not in self.records]

    def add(self, record: dict[str, Any]) -> None:
        """Keep a record, on disk before this returns."""
        self.records[record["key"]] = record
        with self.file.open("a") as file:
            file.write(json.dumps(record) + "\n")
