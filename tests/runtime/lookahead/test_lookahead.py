"""Windows, pools, trees and partitions, without a model: a deterministic toy language stands in for one."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest

from runtime import core
from runtime.config import LookaheadConfig, SamplingParams
from runtime.core import (
    BIAS,
    RUN,
    TAIL,
    Acceptance,
    Bigrams,
    CandidateTree,
    Judge,
    NgramPool,
    RecycleTable,
    SequenceRows,
    Source,
    partition,
)
from runtime.lookahead.knowledge import Knowledge
from runtime.lookahead.sequence import Sequence
from runtime.lookahead.sources import SOURCES, SuffixSource, first_features, priors
from runtime.lookahead.window import PATIENCE, Window, WindowChooser
from runtime.request import Request
from runtime.retention import LayerGroup, Ledger, Sliding
from runtime.step import TOP_BITS, Choose


def ancestors(rows: SequenceRows, row: int) -> list[int]:
    """Tokens from the first row of the forest down to `row`."""
    tokens, parents = rows.tokens, rows.parents
    path = []
    while row >= 0:
        path.append(tokens[row])
        row = parents[row]
    return path[::-1]


def toy_model(context: list[int]) -> int:
    """A next token that depends on the last three, with repeats enough for candidates to be accepted."""
    return (3 * context[-1] + 5 * context[-2] + context[-3]) % 7


def choose_all(rows: SequenceRows, cached: list[int]) -> list[int]:
    return [
        toy_model([0, 0, *cached, *ancestors(rows, row)]) if choose != Choose.NOTHING else -1
        for row, choose in enumerate(rows.choose)
    ]


def likeliest(context: list[int]) -> list[int]:
    """What a worker would pack: the next token surely, and two that it is not."""
    token = toy_model(context)
    return [token << TOP_BITS, (token + 1) % 7 << TOP_BITS | 60, (token + 2) % 7 << TOP_BITS | 90]


def decode(
    lookahead: LookaheadConfig,
    prompt: list[int],
    count: int,
    max_chain: int = 4,
    room: int = 1000,
    knowledge: Knowledge | None = None,
):
    """The tokens a Sequence emits under the toy model, and its steps."""
    sampling = SamplingParams(max_new_tokens=count)
    ledger = Ledger([LayerGroup((0,), lambda: Sliding(None, 1000, slot=False))], capacity=1000)
    sequence = Sequence(Request("r", tuple(prompt), sampling, lookahead), 0, ledger, (), knowledge or Knowledge())
    output: list[int] = []
    while len(output) < count:
        cached = sequence.text[: sequence.num_cached]
        step = sequence.plan(max_chain, room)
        rows = step.rows
        if step.tree is not None:
            step.tree.fill(room - (len(rows) - step.num_chain))
        assert len(rows) <= max_chain + room
        assert all(
            rows.positions[i] == (rows.positions[p] if p >= 0 else len(cached) - 1) + 1
            for i, p in enumerate(rows.parents)
        )
        top = [likeliest([0, 0, *cached, *ancestors(rows, row)]) for row in range(len(rows))]
        output += sequence.accept(np.array(choose_all(rows, cached), np.int32), np.array(top, np.int32), 0.0)[0]
    return output[:count], sequence.usage.num_steps


@pytest.mark.parametrize(
    "sources", [("jacobi",), ("suffix",), ("recycle",), ("jacobi", "suffix", "recycle")], ids="-".join
)
@pytest.mark.parametrize("shape", [(1, 2, 1), (3, 2, 4), (1, 6, 2), (5, 3, 5), (15, 5, 15)], ids=str)
def test_lookahead_emits_what_one_at_a_time_emits(sources, shape):
    window_size, ngram_size, guess_set_size = shape
    config = LookaheadConfig(
        window_size=window_size, ngram_size=ngram_size, guess_set_size=guess_set_size, sources=sources, planner=False
    )
    prompt = [1, 2, 3, 4, 5, 6, 0, 1, 3]
    plain, plain_steps = decode(LookaheadConfig(enabled=False), prompt, 200)
    tokens, steps = decode(config, prompt, 200)
    assert plain_steps == 200
    assert tokens == plain
    assert steps < plain_steps


def test_a_row_budget_bounds_the_rows_and_keeps_the_tokens():
    config = LookaheadConfig(sources=("suffix", "recycle"), planner=False)
    prompt = [1, 2, 3, 4, 5, 6, 0, 1, 3]
    for room in (0, 1, 3):
        assert decode(config, prompt, 100, room=room)[0] == decode(LookaheadConfig(enabled=False), prompt, 100)[0]


def test_window_attends_to_row_zero_and_its_own_column():
    """Cell (r, c) sees row 0 columns 0..c and rows 1..r of its column, at position p + c + r."""
    window = Window(3, 4, prompt=[10, 11, 12])
    window.levels = [[0, 101, 102], [110, 111, 112], [120, 121, 122]]
    rows = SequenceRows(first_position=50)
    rows.add_chain([7], reaches_end=True)
    window.lay_out(rows)
    seen = {tuple(ancestors(rows, row)): (rows.positions[row], rows.choose[row]) for row in range(len(rows))}
    for r in range(3):
        for c in range(3):
            column = [7, 101, 102][: c + 1] + [110 + c, 120 + c][:r]
            position, choose = seen.pop(tuple(column))
            assert position == 50 + c + r
            assert choose == (Choose.SAMPLE if r == c == 0 else Choose.ARGMAX if r == 2 else Choose.NOTHING)
    assert not seen


def test_window_fills_row_by_row_then_yields_w_ngrams_of_length_n():
    window_size, ngram_size = 4, 5
    window = Window(window_size, ngram_size, prompt=[1, 2, 3])
    text = [5]
    for step in range(ngram_size + 3):
        rows = SequenceRows(first_position=len(text) - 1)
        rows.add_chain(text[-1:], reaches_end=True)
        assert window.is_full == (step >= ngram_size - 2)
        window.lay_out(rows)
        assert len(rows) == window.num_rows
        chosen = [1000 * (step + 1) + row for row in range(len(rows))]
        above = [list(level) for level in window.levels]
        guesses = [chosen[row] for row in window._last_row]
        ngrams = window.advance(text[-1], chosen)
        if step < ngram_size - 2:
            assert ngrams == []
            assert window.levels[-1] == guesses[1:]  # a cell keeps its position: the text moved on by one
        else:
            columns = [[text[-1] if r == c == 0 else above[r][c] for r in range(ngram_size - 1)] for c in range(4)]
            assert ngrams == [(*column, guess) for column, guess in zip(columns, guesses, strict=True)]
            assert window.levels == [*above[1:], guesses]
        text.append(chosen[0])


def test_pool_keeps_the_g_most_recent_ngrams_of_a_first_token():
    pool = NgramPool(ngram_size=3, guess_set_size=2)
    for ngram in [(1, 2, 3), (1, 4, 5), (1, 2, 3), (1, 6, 7), (2, 2, 2)]:
        pool.add(ngram)
    assert pool.tails(1) == [[6, 7], [2, 3]]  # (4, 5) was used least recently
    assert pool.tails(9) == []
    pool.add_text([8, 9, 8, 9])
    assert pool.tails(8) == [[9, 8]] and pool.tails(9) == [[8, 9]]


def tokens_of(source: Source, text: list[int]) -> list[int]:
    """What a source proposes behind a text, in its own order."""
    return [token for _, proposals in source.propose(text[-TAIL:], 0) for token, _ in proposals]


def test_suffix_prefers_long_then_recent_matches():
    text = [1, 2, 3, 7, 9, 2, 3, 8, 1, 2, 3]
    source = SuffixSource(LookaheadConfig(sources=("suffix",)), text, 0, RecycleTable())
    source.observe(text, is_prompt=True)
    assert tokens_of(source, text) == [7, 8, 1] or tokens_of(source, text) == [7, 8]  # [1, 2, 3], then [2, 3]
    text += [7]
    source.observe(text[-1:], is_prompt=False)
    assert tokens_of(source, text)[0] == 9
    source.forget(text[-2:])
    assert tokens_of(source, text) == []


def judged(judge: Judge, *columns) -> dict[int, float]:
    """Tokens with their probabilities, likeliest first."""
    return dict(judge.judge(columns))


def test_a_longer_match_is_trusted_more_and_a_source_that_agrees_adds_to_it():
    judge = Judge(Acceptance(priors()))
    first = first_features()["suffix"]
    best = SuffixSource.PRIORS.index(max(SuffixSource.PRIORS))
    weak, strong = (judged(judge, (first, [(5, first + offset)]))[5] for offset in (1, best))
    assert 0 < weak < strong < 1
    recycle = first_features()["recycle"]
    both = judged(judge, (first, [(5, first + 1)]), (recycle, [(5, recycle + 1), (6, recycle + 4)]))
    assert list(both) == [5, 6] and both[5] > weak


def test_equally_likely_tokens_come_in_the_order_of_their_ids():
    judge = Judge(Acceptance(priors()))
    assert list(judged(judge, (0, [(9, 1), (4, 1), (7, 1)]))) == [4, 7, 9]


def test_what_a_source_adds_can_be_taken_away():
    judge = Judge(Acceptance(priors()))
    starts = first_features()
    jacobi, suffix = (starts["jacobi"], [(5, starts["jacobi"] + 1)]), (starts["suffix"], [])
    sources = {name: SOURCES[name](LookaheadConfig(), [1], starts[name], RecycleTable()) for name in SOURCES}
    assert judge.without([jacobi, suffix], 5, sources["jacobi"]) == 0
    untouched = judged(judge, jacobi, suffix)[5]
    assert judge.without([jacobi, suffix], 5, sources["recycle"]) == pytest.approx(untouched)


def test_acceptance_is_learned_from_what_was_proposed_whether_it_fitted_or_not():
    judge = Judge(Acceptance(priors()))
    first = first_features()["suffix"]
    column = (first, [(5, first + 1), (6, first + 2)])
    before = judged(judge, column)
    for _ in range(200):
        judge.learn([column], 5)
    after = judged(judge, column)
    assert after[5] > 0.8 > before[5] and after[6] < 0.1
    for turn in range(400):  # now it is right half of the time
        judge.learn([column], 5 if turn % 2 else 9)
    assert 0.3 < judged(judge, column)[5] < 0.7


def test_a_text_that_is_hard_to_guess_lowers_its_own_probabilities_only():
    shared = Acceptance([0.0] + [2.0] * 400)
    hard, other = Judge(shared), Judge(shared)
    shared.evidence = [1e9] * len(shared.weights)  # nothing more is learned in common
    column = (0, [(5, 1)])
    for _ in range(100):
        hard.learn([column], 9)
    assert judged(hard, column)[5] < 0.1 < judged(other, column)[5]


def test_tokens_that_the_text_has_had_are_learned_apart():
    judge = Judge(Acceptance(priors()))
    judge.observe([5, 5, 5, 7])
    first = first_features()["suffix"]
    column = (first, [(5, first + 1), (6, first + 1)])
    assert judged(judge, column)[5] == judged(judge, column)[6]
    for _ in range(50):
        judge.learn([column], 5)
    assert judged(judge, column)[5] > 2 * judged(judge, column)[6]
    others = (first, [(8, first + 1), (9, first + 1)])
    judge.forget([9, 9, 9])  # what came often before is likelier now, whichever token it is
    assert judged(judge, others)[9] > 2 * judged(judge, others)[8]


def packed(token: int, kind: int) -> int:
    """A likely token as the workers give it: its class counts half nats, what is packed sixteenths of one."""
    return token << TOP_BITS | kind << 3


def test_recycle_knows_the_longest_contexts_and_forgets_the_oldest():
    table = RecycleTable(max_contexts=3)
    table.update((1, 2, 3), [packed(10, 0)])
    table.update((9, 2, 3), [packed(11, 0)])
    assert table.lookup((1, 2, 3)) == [(3, [(10, 0)]), (2, [(11, 0)])]
    assert table.lookup((7, 7, 3)) == [(1, [(11, 0)])]
    assert table.lookup((3,)) == [(1, [(11, 0)])] and table.lookup((4, 5, 6)) == []
    for token in range(4, 8):
        table.update((token,), [packed(token, 0)])
    assert table.lookup((3,)) == [] and len(table) <= 9


def test_recycle_falls_back_to_what_the_model_says_behind_a_single_token():
    bigrams = Bigrams(np.array([[packed(5, 1), packed(6, 2)], [packed(7, 0), packed(8, 3)]], np.int32))
    table = RecycleTable(bigrams)
    assert table.lookup((3, 1)) == [(0, [(7, 0), (8, 3)])] and table.lookup((2,)) == []
    table.update((1,), [packed(9, 0)])
    assert table.lookup((3, 1)) == [(1, [(9, 0)]), (0, [(7, 0), (8, 3)])]
    table.update((3, 1), [packed(4, 0)])
    assert [order for order, _ in table.lookup((3, 1))] == [2, 1]


class Planned(Source):
    """A source in Python that proposes what it is told to, each as likely as it is told."""

    def __init__(self, proposals: dict[tuple[int, ...], list[tuple[float, int]]]) -> None:
        """(probability, token) behind each path of guesses"""
        self.PRIORS, self._proposals = [0.0], {}
        for path, guesses in proposals.items():
            none_of_them = 1 - sum(likely for likely, _ in guesses)
            self._proposals[path] = [(token, len(self.PRIORS) + i) for i, (_, token) in enumerate(guesses)]
            self.PRIORS += [math.log(likely / none_of_them) - BIAS for likely, _ in guesses]
        super().__init__(0, len(self.PRIORS))

    def propose(self, tail: tuple[int, ...], depth: int) -> list[tuple[int, list[tuple[int, int]]]]:
        return [(0, self._proposals.get(tail[len(tail) - depth :], []))]


def plant(proposals: dict[tuple[int, ...], list[tuple[float, int]]], max_depth: int = 99) -> CandidateTree:
    """A tree below token 5 whose candidates behind each path of guesses are given as (probability, token)."""
    source = Planned(proposals)
    rows = SequenceRows(first_position=0)
    rows.add_chain([5], reaches_end=True)
    return CandidateTree(rows, (5,), max_depth, [source], Judge(Acceptance(source.PRIORS)))


FOREST = {(): [(0.6, 1), (0.3, 4)], (1,): [(0.9, 2), (0.05, 3)], (1, 2): [(0.5, 9)], (4,): [(0.5, 7)]}


def test_tree_grows_likeliest_path_first_and_walks_the_longest():
    tree = plant(FOREST)
    tree.fill(5)
    assert tree.rows.tokens == [5, 1, 2, 4, 9, 7]  # 0.6, 0.54, 0.3, 0.27, 0.15, but for RUN
    assert tree.rows.parents == [-1, 0, 1, 0, 2, 3]
    assert tree.margin == pytest.approx(0.15 * RUN)
    assert tree.walk(np.array([1, 2, 9, 0, 6, 0])) == ([1, 2, 4], [1, 2, 9, 6])
    assert tree.walk(np.array([8, 0, 0, 0, 0, 0])) == ([], [8])


def test_tree_keeps_within_its_room_depth_and_what_it_is_cut_to():
    tree = plant(FOREST, max_depth=1)
    tree.fill(99)
    assert tree.rows.tokens == [5, 1, 4]
    tree = plant(FOREST)
    tree.fill(99)
    assert len(tree.rows) == 7
    tree.truncate(2)
    assert tree.rows.tokens == [5, 1, 2] and tree.walk(np.array([1, 2, 9])) == ([1, 2], [1, 2, 9])
    assert tree.next_probability == 0


def test_candidates_that_are_never_accepted_are_trusted_less():
    shared = Acceptance([])
    trees = []
    for _ in range(60):
        source = Planned(FOREST)
        acceptance = shared if trees else Acceptance(source.PRIORS)
        shared, acceptance.evidence = acceptance, [1e9] * len(acceptance.weights)  # weights stay as they are
        rows = SequenceRows(first_position=0)
        rows.add_chain([5], reaches_end=True)
        trees.append(CandidateTree(rows, (5,), 99, [source], Judge(acceptance)))
        before = trees[-1].next_probability
        trees[-1].fill(2)
        trees[-1].learn(np.array([8] * 3))
    assert trees[0].next_probability == pytest.approx(0.3, rel=0.2)
    assert before < 0.2  # of 0.6


def test_planner_takes_what_pays_by_the_cost_of_rows():
    free = np.ones(200)
    tree = plant(FOREST)
    expected = 1 + 0.6 + 0.54 * RUN + 0.3 + 0.27 * RUN**2 + 0.15 * RUN + 0.03 * RUN
    assert core.grow([(tree, 99)], 1, free) == pytest.approx(expected)
    assert tree.num_candidates == 6
    dear = 0.48 + 0.52 * np.arange(200)  # a row costs half of what the first did
    tree = plant(FOREST)
    assert core.grow([(tree, 99)], 1, dear) == pytest.approx(1.6) and tree.num_candidates == 1
    tree = plant({(): [(0.5, 1)]})
    core.grow([(tree, 99)], 1, dear)
    assert tree.num_candidates == 0 and tree.margin == 1  # plain decoding


def test_planner_looks_past_a_step_in_the_cost_curve_to_where_rows_are_cheap_again():
    stairs = np.array([1.0, 1.0, *[1.5] * 98])
    tree = plant({(): [(0.2, token) for token in range(4)]})
    core.grow([(tree, 99)], 1, stairs)
    assert tree.num_candidates == 4  # 1.2 / 1.5 < 1, but 1.8 / 1.5 > 1


def test_planner_divides_rows_among_sequences_by_worth():
    good, bad = plant(FOREST), plant({(): [(0.1, 1), (0.09, 2)]})
    seconds = np.concatenate([np.ones(6), np.full(200, 100.0)])
    core.grow([(good, 99), (bad, 99)], 2, seconds)
    assert (good.num_candidates, bad.num_candidates) == (3, 0)
    tight = plant(FOREST)
    core.grow([(tight, 1)], 1, np.ones(50))
    assert tight.num_candidates == 1


def test_a_window_is_tried_where_rows_are_nearly_free_and_dropped_where_it_gives_nothing():
    windows = WindowChooser()
    for _ in range(PATIENCE):
        windows.observe(0.0, margin=0.05)
    assert windows.size == (0, 0)
    for _ in range(PATIENCE):
        windows.observe(0.0, margin=0.0001)
    assert windows.size != (0, 0)
    for _ in range(40 * PATIENCE):
        windows.observe(0.0, margin=0.002)
    assert windows.size == (0, 0)
    for _ in range(PATIENCE):
        windows.observe(0.0, margin=0.0001)
    size = windows.size
    for _ in range(20 * PATIENCE):
        windows.observe(3.0, margin=0.004)
    assert windows.size != (0, 0) and size != (0, 0)


@pytest.mark.parametrize("share", [True, False], ids=["shared", "own"])
def test_what_one_text_taught_helps_the_next_if_it_is_shared(share):
    config = LookaheadConfig(sources=("recycle",), planner=False, row_budget=8, share=share)
    knowledge = Knowledge()
    prompt = [1, 2, 3, 4, 5, 6, 0, 1, 3]
    first, cold = decode(config, prompt, 60, knowledge=knowledge)
    second, warm = decode(config, prompt, 60, knowledge=knowledge)
    assert first == second
    assert (warm < cold) == share
    assert (len(knowledge.table) > 0) == share


@pytest.mark.parametrize("num_replicas", [1, 2, 3, 8])
def test_partition_is_closed_under_ancestors_and_balanced(num_replicas):
    generator = random.Random(num_replicas)
    for _ in range(50):
        size = generator.randint(1, 120)
        parents = [generator.randint(max(-1, i - 9), i - 1) for i in range(size)]
        owner, replicas = partition(np.array(parents), num_replicas)
        for row, parent in enumerate(parents):
            assert replicas[row] and replicas[row] >> num_replicas == 0
            assert replicas[row] >> owner[row] & 1
            if parent >= 0:
                assert replicas[parent] & replicas[row] == replicas[row]


def test_partition_of_the_papers_window_halves_it():
    """Columns go in runs; each replica repeats only the row-0 cells that its columns attend to."""
    rows = SequenceRows(first_position=0)
    rows.add_chain([5], reaches_end=True)
    window = Window(15, 5, prompt=[1])
    window.levels = [[1] * 15 for _ in range(4)]
    window.lay_out(rows)
    _, replicas = partition(np.array(rows.parents), 2)
    sizes = [sum(mask >> r & 1 for mask in replicas) for r in range(2)]
    assert max(sizes) <= 36  # 60 rows, 15 of them in row 0
    assert min(sizes) >= 30


def test_partition_gives_an_unsplittable_chain_to_one_replica():
    owner, replicas = partition(np.array([-1, 0, 1, 2]), 4)
    assert set(owner.tolist()) == {0} and set(replicas.tolist()) == {1}


def test_candidates_are_tallied_by_source_and_depth() -> None:
    judge = Judge(Acceptance(priors()))
    source = SuffixSource(LookaheadConfig(), [], first_features()["suffix"], RecycleTable())
    source.observe([1, 2, 3, 4, 1, 2], True)
    rows = SequenceRows(5)
    rows.add_chain([2], reaches_end=True)
    tree = CandidateTree(rows, [4, 1, 2], 2, [source], judge)
    tree.fill(2)
    assert rows.tokens == [2, 3, 4]
    assert tree.tally(np.array([3, 9, 9], np.int32)) == ([(2, 1)], [(1, 1), (1, 0)])
    assert tree.tally(np.array([9, 9, 9], np.int32)) == ([(2, 0)], [(1, 0), (1, 0)])


def test_each_candidate_knows_all_who_proposed_it() -> None:
    judge, starts = Judge(Acceptance(priors())), first_features()
    sources = [SuffixSource(LookaheadConfig(), [], starts[name], RecycleTable()) for name in ("suffix", "recycle")]
    for source, text in zip(sources, ([1, 2, 3, 4, 1, 2], [1, 2, 3, 9, 1, 2]), strict=True):
        source.observe(text, True)
    rows = SequenceRows(5)
    rows.add_chain([2], reaches_end=True)
    tree = CandidateTree(rows, [9, 1, 2], 2, sources, judge)
    assert tree.proposers() == []
    tree.fill(3)
    assert dict(zip(rows.tokens[1:], tree.proposers(), strict=True)) == {3: 0b11, 4: 0b01, 9: 0b10}
    by_source, _ = tree.tally(np.array([9, 9, 9, 9], np.int32))
    assert [sum(bits >> index & 1 for bits in tree.proposers()) for index in (0, 1)] == [n for n, _ in by_source]
