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
    """What one source says of the next token at one node."""

    absent: int
    """The feature of all tokens that are not proposed here."""
    first: int
    """The feature that offsets below count from."""
    proposals: Sequence[tuple[int, int]]
    """(token, offset of the feature that describes this proposal), each token once."""


class Guesses(NamedTuple):
    """What may follow a node."""

    columns: Sequence[Column]
    ranked: list[tuple[float, int]]
    """(minus the logit of the acceptance probability, token), likeliest first; ties go to the lower id."""


def probability(minus_logit: float) -> float:
    return 1 / (1 + math.exp(minus_logit))


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
    """Turns the sources' columns into guesses for one sequence, and learns from what the model chose."""

    def __init__(self, acceptance: Acceptance) -> None:
        self.acceptance = acceptance
        self.bias = 0.0
        """What this text adds to every logit: how much harder or easier to guess it is than others."""

    def judge(self, columns: Sequence[Column]) -> Guesses:
        """All tokens proposed, with how likely each is."""
        weights = self.acceptance.weights
        base = BIAS + self.bias
        for absent, _, _ in columns:
            base += weights[absent]
        logits: dict[int, float] = {}
        for absent, first, proposals in columns:
            missing = weights[absent]
            for token, offset in proposals:
                logits[token] = logits.get(token, base) + weights[first + offset] - missing
        ranked = [(-logit, token) for token, logit in logits.items()]
        ranked.sort()
        return Guesses(columns, ranked)

    def without(self, guesses: Guesses, token: int, features: range) -> float:
        """The token's probability if the source with these features had not proposed it."""
        weights = self.acceptance.weights
        minus_logit = next(minus_logit for minus_logit, other in guesses.ranked if other == token)
        for column in guesses.columns:
            if column.absent in features:
                offset = dict(column.proposals).get(token)
                if offset is not None:
                    minus_logit += weights[column.first + offset] - weights[column.absent]
        return probability(minus_logit)

    def learn(self, guesses: Guesses, chosen: int) -> None:
        """The model chose `chosen` where these were the guesses."""
        error = 0.0
        columns = [(column.absent, column.first, dict(column.proposals)) for column in guesses.columns]
        for minus_logit, token in guesses.ranked:
            gradient = probability(minus_logit) - (token == chosen)
            error += gradient
            for absent, first, offsets in columns:
                offset = offsets.get(token)
                self.acceptance.learn(absent if offset is None else first + offset, gradient)
        self.bias -= TEXT_RATE * error
