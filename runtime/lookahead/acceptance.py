"""Learned acceptance: how likely a proposed token is the one the model will choose, given who proposes it and how.

Every proposal carries one feature per column (a source has one column or several), the column's `absent` feature
where that source does not propose the token. The probability is a logistic function of the sum of the features'
weights, so that sources that agree strengthen each other. Weights start from priors and are learned online, from
every node whose next token has become known, whether or not its proposals fitted into the step.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

LEARNING_RATE = 0.15
"""Of AdaGrad (Duchi et al., 2011): first steps are about this large, in logits, and shrink as evidence comes in."""

PRIOR_EVIDENCE = 1.0
"""Squared gradients that a prior counts for."""

BIAS = -4.0
"""Logit of a token that nobody proposes; priors of features are given as what they add to it."""

TEXT_RATE = 0.05
"""How fast the bias of one text follows its own record."""


def logit(probability: float) -> float:
    return math.log(probability / (1 - probability))


def prior(probability: float) -> float:
    """The weight of a feature whose proposals are accepted with this probability when no other source agrees."""
    return logit(min(max(probability, 1e-4), 1 - 1e-4)) - BIAS


class Column(NamedTuple):
    """What one source says of the next token at one node: tokens with the feature that describes each proposal."""

    absent: int
    """The feature of all tokens that are not proposed here."""
    proposals: Sequence[tuple[int, int]]
    """(token, feature)"""


class Candidate(NamedTuple):
    """A token that may come next, and why."""

    probability: float
    token: int
    features: tuple[int, ...]


class Acceptance:
    """Weights of all features; several sequences may learn the same ones."""

    def __init__(self, priors: Iterable[float]) -> None:
        self.weights = list(priors)
        self._evidence = [PRIOR_EVIDENCE] * len(self.weights)

    def learn(self, feature: int, gradient: float) -> None:
        """Move a weight against the gradient of the log-loss."""
        self._evidence[feature] += gradient * gradient
        self.weights[feature] -= LEARNING_RATE * gradient / math.sqrt(self._evidence[feature])


class Judge:
    """Turns the sources' columns into candidates for one sequence, and learns from what the model chose."""

    def __init__(self, acceptance: Acceptance) -> None:
        self.acceptance = acceptance
        self.bias = 0.0
        """What this text adds to every logit: how much harder or easier to guess it is than others."""

    def candidates(self, columns: Sequence[Column]) -> list[Candidate]:
        """All tokens proposed, likeliest first; ties go to the lower id."""
        weights = self.acceptance.weights
        absent = [column.absent for column in columns]
        base = BIAS + self.bias + sum([weights[feature] for feature in absent])
        found: dict[int, list[int]] = {}
        for index, column in enumerate(columns):
            for token, feature in column.proposals:
                features = found.get(token)
                if features is None:
                    features = found[token] = absent.copy()
                features[index] = feature
        rest = [weights[feature] for feature in absent]
        candidates = []
        for token, features in found.items():
            total = base
            for feature, missing in zip(features, rest, strict=True):
                total += weights[feature] - missing
            candidates.append(Candidate(1 / (1 + math.exp(-total)), token, tuple(features)))
        candidates.sort(key=_order)
        return candidates

    def without(self, candidate: Candidate, features: range) -> float:
        """The candidate's probability if the source with these features, the first of them `absent`, had not proposed
        it."""
        weights = self.acceptance.weights
        total = logit(min(max(candidate.probability, 1e-9), 1 - 1e-9))
        own = [feature for feature in candidate.features if feature in features]
        total -= sum(weights[feature] - weights[features.start] for feature in own)
        return 1 / (1 + math.exp(-total))

    def learn(self, candidates: Sequence[Candidate], chosen: int) -> None:
        """The model chose `chosen` where these were the candidates."""
        error = 0.0
        for candidate in candidates:
            gradient = candidate.probability - (candidate.token == chosen)
            error += gradient
            for feature in candidate.features:
                self.acceptance.learn(feature, gradient)
        self.bias -= TEXT_RATE * error


def _order(candidate: Candidate) -> tuple[float, int]:
    return -candidate.probability, candidate.token
