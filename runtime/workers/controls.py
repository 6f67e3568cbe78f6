"""What a rank knows of each slot beside its cache: how often the text has which token, and what is added to logits.

Everything here follows the plans, committed tokens and admissions alone, so it is the same on every rank.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from runtime.core import History, Share
from runtime.model.sampler import Logprobs, Parameters, Ragged, Sampled
from runtime.step import Bias, Choose, Int32, Row, Seq, StepPlan

_NOTHING = np.empty(0, np.int32), np.empty(0, np.int32)
_NO_BIAS = np.empty(0, np.int32), np.empty(0, np.float32)


class Controls:
    """The state of all slots."""

    def __init__(self) -> None:
        self._histories: dict[int, History] = {}
        self._biases: dict[int, _Biases] = {}

    def reset(self, slot: int) -> None:
        """Forget the slot's sequence."""
        self._histories.pop(slot, None)
        self._biases.pop(slot, None)

    def begin_as(self, slot: int, source: int, length: int) -> None:
        """The slot's new sequence has the first `length` tokens of the one in `source`, which may be itself."""
        history = self._history(source).first(length)
        self.reset(slot)
        self._histories[slot] = history

    def state(self, slot: int) -> tuple[list[int], list[list[int]]]:
        """What is known of the slot, for another replica to `restore`: its text's history, and its biases' lines."""
        biases = self._biases.get(slot)
        return self._history(slot).state().tolist(), [] if biases is None else biases.lines.tolist()

    def restore(self, slot: int, state: tuple[list[int], list[list[int]]]) -> None:
        """Know of the slot what another replica does."""
        history, lines = state
        self.reset(slot)
        self._histories[slot] = History.restored(history)
        if lines:
            self._biases[slot] = _Biases(np.array(lines, np.int32))

    def commit(self, slot: int, tokens: list[int]) -> None:
        """The next tokens of the slot's sequence."""
        self._history(slot).commit(tokens)

    def begin_turns(self, plan: StepPlan) -> None:
        """Take in what the plan says of the turns that begin with it."""
        for line in plan.sequences[plan.sequences[:, Seq.NUM_COMING] > 0]:
            slot = int(line[Seq.SLOT])
            self._history(slot).begin(int(line[Seq.OUTPUT_START]))
            self._biases.pop(slot, None)
            if len(lines := plan.biases[plan.biases[:, Bias.SLOT] == slot]):
                self._biases[slot] = _Biases(lines)

    def sampled(self, plan: StepPlan, share: Share) -> Sampled | None:
        """Which of the share's wanted rows choose by more than their largest logit, and what decides."""
        if not len(index := share.sampled):
            return None
        places = share.local[share.wanted[index]]
        rows, sequences = plan.rows[places], plan.sequences[share.sequence_of[index]]
        parameters = Parameters(sequences)
        counted = parameters.is_counted
        counts = biases = mask_of = None
        slots = rows[:, Row.SLOT].tolist()
        if counted.any():
            counts = Ragged.of(
                [
                    self._history(slot).at(plan.rows, place) if asked else _NOTHING
                    for slot, place, asked in zip(slots, places.tolist(), counted.tolist(), strict=True)
                ]
            )
        if self._biases:
            positions = (rows[:, Row.POSITION] + 1).tolist()
            found = [
                self._biases[slot].at(position) if slot in self._biases else _NO_BIAS
                for slot, position in zip(slots, positions, strict=True)
            ]
            biases = Ragged.of(found)
        if len(plan.masked):
            mask_of = _looked_up(plan.masked, places)
        return Sampled(index, rows, sequences, counts, biases, plan.masks if mask_of is not None else None, mask_of)

    def logprobs(self, plan: StepPlan, share: Share) -> Logprobs | None:
        """The log-probabilities that the share's wanted rows are to give."""
        if plan.num_logprobs is None:
            return None
        places = share.local[share.wanted]
        behind = np.minimum(places + 1, len(plan.rows) - 1)
        follows = (plan.rows[behind, Row.PARENT] == places) & (behind > places)
        next_tokens = plan.sequences[share.sequence_of, Seq.NEXT_TOKEN]
        targets = np.where(follows, plan.rows[behind, Row.TOKEN], next_tokens)
        scores = plan.rows[places, Row.CHOOSE] == Choose.SCORE
        return Logprobs(plan.num_logprobs, np.where(scores, targets, -1).astype(np.int64))

    def _history(self, slot: int) -> History:
        if slot not in self._histories:
            self._histories[slot] = History()
        return self._histories[slot]


class _Biases:
    """What a turn adds to logits: some for ever, some only before a position."""

    def __init__(self, lines: Int32) -> None:
        """`lines` [n, len(Bias)]; of a token that has two while both last, the lower counts: bars are -inf."""
        self.lines = lines
        values = np.ascontiguousarray(lines[:, Bias.VALUE]).view(np.float32)
        order = np.argsort(values, kind="stable")
        self._tokens, self._values, self._until = lines[order, Bias.TOKEN], values[order], lines[order, Bias.UNTIL]
        self._kept: dict[tuple[bool, ...], tuple[Int32, NDArray[np.float32]]] = {}
        self._ends = np.unique(self._until)

    def at(self, position: int) -> tuple[Int32, NDArray[np.float32]]:
        """Tokens and what is added to them where the token at this position is chosen."""
        key = tuple((self._ends > position).tolist())
        if key not in self._kept:
            lasts = self._until > position
            tokens, first = np.unique(self._tokens[lasts], return_index=True)
            self._kept[key] = tokens, self._values[lasts][first]
        return self._kept[key]


def _looked_up(masked: Int32, places: NDArray[np.int64]) -> NDArray[np.int64]:
    """The mask of each row of the plan, -1: none."""
    at = np.minimum(np.searchsorted(masked[:, 0], places), len(masked) - 1)
    return np.where(masked[at, 0] == places, masked[at, 1], -1).astype(np.int64)
