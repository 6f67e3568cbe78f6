"""How S grows with the work of a step: a line over log2(FLOPs), and the lookahead paper's formula."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class LineFit:
    """S = intercept + slope * log2(FLOPs per step), least squares."""

    slope: float
    """Tokens per step that a doubling of the FLOPs adds."""
    intercept: float
    r_squared: float
    """nan where all S are the same, or where two points leave nothing to explain."""
    num_points: int

    def at(self, flops: float) -> float:
        return self.intercept + self.slope * float(np.log2(flops))


def fit_line(flops: Sequence[float], tokens_per_step: Sequence[float]) -> LineFit | None:
    """None for fewer than two different amounts of FLOPs."""
    if len(set(flops)) < 2:
        return None
    xs, ys = np.log2(flops), np.asarray(tokens_per_step, float)
    slope, intercept = np.polyfit(xs, ys, 1)
    spread = float(((ys - ys.mean()) ** 2).sum())
    residual = float(((ys - intercept - slope * xs) ** 2).sum())
    r_squared = 1 - residual / spread if spread and len(ys) > 2 else float("nan")
    return LineFit(float(slope), float(intercept), r_squared, len(ys))


def expected_tokens(alpha: float, num_candidates: Sequence[float] | np.ndarray, length: int) -> np.ndarray:
    """E(#tokens) of a step that verifies b candidates of `length` tokens, each token accepted with probability alpha.

    (gamma + 1) - sum over i = 1..gamma of (1 - alpha^i)^b; section 4.1 of Fu et al. 2024, arXiv 2402.02057.
    """
    depths = np.arange(1, length + 1)
    misses = (1 - alpha**depths)[None, :] ** np.asarray(num_candidates, float)[:, None]
    return length + 1 - misses.sum(1)


@dataclass(frozen=True)
class AcceptanceFit:
    """S = (f - 1 + E) / f: one good speculation in f steps (section 4.2 of the same paper)."""

    alpha: float
    """Acceptance rate of a token."""
    f: float
    """Steps per good speculation, at least 1."""
    length: int
    """gamma: tokens of a candidate."""
    rms_error: float
    """Of S."""
    max_error: float

    def at(self, num_candidates: float) -> float:
        return float((self.f - 1 + expected_tokens(self.alpha, [num_candidates], self.length)[0]) / self.f)


def fit_acceptance(
    num_candidates: Sequence[float], tokens_per_step: Sequence[float], length: int, resolution: int = 999
) -> AcceptanceFit | None:
    """alpha by a grid, f in closed form for each: S - 1 = (E - 1) / f is linear in 1 / f.

    None for fewer than two different numbers of candidates: two parameters want two points.
    """
    if len(set(num_candidates)) < 2:
        return None
    gains = np.asarray(tokens_per_step, float) - 1
    best: AcceptanceFit | None = None
    for alpha in np.arange(1, resolution + 1) / (resolution + 1):
        wanted = expected_tokens(float(alpha), num_candidates, length) - 1
        share = float(np.clip((wanted * gains).sum() / (wanted * wanted).sum(), 1e-6, 1.0))
        errors = np.abs(share * wanted - gains)
        error = float(np.sqrt((errors**2).mean()))
        if best is None or error < best.rms_error:
            best = AcceptanceFit(float(alpha), 1 / share, length, error, float(errors.max()))
    return best
