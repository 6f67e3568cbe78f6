"""Learned acceptance: how likely a proposed token is the one the model will choose, given who proposes it and how.

Every proposal carries one feature per column (a source has one column or several), the column's `absent` feature
where that source does not propose the token. The probability is a logistic function of the features' weights, the
strongest in full and the others in part, so that sources that agree strengthen each other. Weights start from priors
and are learned online, from every node whose next token has become known, whether or not its proposals fitted into the
step.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

LEARNING_RATE = 0.3
"""Of AdaGrad (Duchi et al., 2011): first steps are about this large, in logits, and shrink as evidence comes in."""

PRIOR_EVIDENCE = 1.0
"""Squared gradients that a prior counts for."""

BIAS = -4.0
"""Logit of a token that nobody proposes; priors of features are given as what they add to it."""

AGREEMENT = 0.4
"""How much the weights of all proposals but the strongest count. Sources look at the same text, so they are not
independent: with 1, chains on which all agree are believed to be accepted far longer than they are."""

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
            base += AGREEMENT * weights[absent]
        logits: dict[int, float] = {}
        strongest: dict[int, float] = {}
        for absent, first, proposals in columns:
            missing = weights[absent]
            for token, offset in proposals:
                weight = weights[first + offset]
                logits[token] = logits.get(token, base) + AGREEMENT * (weight - missing)
                if weight > strongest.get(token, -math.inf):
                    strongest[token] = weight
        ranked = [(-logit - (1 - AGREEMENT) * strongest[token], token) for token, logit in logits.items()]
        ranked.sort()
        return Guesses(columns, ranked)

    def without(self, guesses: Guesses, token: int, features: range) -> float:
        """The token's probability if the source with these features had not proposed it."""
        others = [c._replace(proposals=()) if c.absent in features else c for c in guesses.columns]
        ranked = self.judge(others).ranked
        return next((probability(minus_logit) for minus_logit, other in ranked if other == token), probability(-BIAS))

    def learn(self, guesses: Guesses, chosen: int) -> None:
        """The model chose `chosen` where these were the guesses."""
        weights, error = self.acceptance.weights, 0.0
        columns = [(column.absent, column.first, dict(column.proposals)) for column in guesses.columns]
        for minus_logit, token in guesses.ranked:
            gradient = probability(minus_logit) - (token == chosen)
            error += gradient
            proposed = [first + offsets[token] for _, first, offsets in columns if token in offsets]
            strongest = max(proposed, key=weights.__getitem__)
            for feature in proposed:
                self.acceptance.learn(feature, gradient * (1.0 if feature == strongest else AGREEMENT))
            for absent, _, offsets in columns:
                if token not in offsets:
                    self.acceptance.learn(absent, gradient * AGREEMENT)
        self.bias -= TEXT_RATE * error
