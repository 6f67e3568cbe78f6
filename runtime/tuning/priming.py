"""What the model says behind each single token: computed once per model, kept on disk, and what `recycle` begins with.

A table that learns from text alone knows nothing behind a token that has not come yet, and so proposes nothing there.
The model's own bigrams do (Stewart et al., 2024, "The N-Grammys", arXiv 2411.03786). Each token stands behind the
same opening of an answer: behind nothing at all, it would be the first token, of which models make a sink.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from runtime.config import Config
from runtime.core import SequenceRows
from runtime.disk import cache_root, kept, locked
from runtime.model.directory import resolve_model
from runtime.model.spec import ModelSpec
from runtime.progress import doing
from runtime.step import Choose, Int32
from runtime.tuning.probe import probe
from runtime.workers.executor import Executor

FORMAT = 1
SHIPPED = Path(__file__).with_name("embedded_bigrams.npz")
BUDGET_S = 15.0
"""Tokens are taken in the order of their ids, which in most vocabularies is by frequency, until this time is spent."""


def primed(executor: Executor, config: Config, spec: ModelSpec, opening: Sequence[int], top_k: int) -> Int32:
    """The likeliest tokens, packed, behind each token of the vocabulary, or its first part. [V, top_k]

    Those of the embedded model come with the program. No sequence may be running: slot 0 is written over. Several
    processes may call this at once: one computes.
    """
    if config.model.path is None and (top := shipped()).shape == (spec.vocab_size, top_k):
        return top
    opening = opening[-config.scheduler.max_rows // 2 :]
    place = _place(config, spec, opening, top_k)
    with locked(place.with_suffix(".lock")):
        try:
            return np.load(place)
        except (OSError, ValueError):
            pass
        with doing(f"asking the model what follows each token (once; at most {BUDGET_S:.0f} seconds)"):
            top = ask(executor, config, spec, opening, top_k)
        with kept(place) as scratch:
            np.save(scratch, top)
    return top


def shipped() -> Int32:
    """Those of the embedded model. `python -m benchmarks.bigrams --write` makes the file."""
    with np.load(SHIPPED) as file:
        return file["top"]


def ship(top: Int32) -> None:
    """Write what `shipped` reads."""
    np.savez_compressed(SHIPPED, top=top)


def ask(executor: Executor, config: Config, spec: ModelSpec, opening: Sequence[int], top_k: int) -> Int32:
    """Ask the model, for some BUDGET_S. [V or fewer, top_k]"""
    num_opening, began = len(opening), time.perf_counter()
    at_once = config.scheduler.max_rows - num_opening
    found: list[Int32] = []
    for first in range(0, spec.vocab_size, at_once):
        rows = SequenceRows(0)
        rows.add_chain(opening, reaches_end=False)
        for token in range(first, min(first + at_once, spec.vocab_size)):
            rows.add(token, num_opening - 1, Choose.ARGMAX)
        plan = probe(rows, num_opening + 1, config.parallel.lp, top_k)
        plan.resets = np.zeros(1, np.int32)
        found.append(executor.execute(plan).top[num_opening:])
        if time.perf_counter() - began > BUDGET_S:
            break
    return np.concatenate(found)


def _place(config: Config, spec: ModelSpec, opening: Sequence[int], top_k: int) -> Path:
    files = sorted(path for path in resolve_model(config.model.path).iterdir() if path.is_file())
    state = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    key = (FORMAT, config.model.path, state, repr(spec), tuple(opening), top_k)
    return primed_folder() / f"{hashlib.sha256(repr(key).encode()).hexdigest()[:16]}.npy"


def primed_folder() -> Path:
    """Where the tables are kept."""
    return cache_root() / "bigrams"
