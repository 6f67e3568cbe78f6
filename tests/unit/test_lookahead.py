"""Windows, pools, trees and partitions, without a model: a deterministic toy language stands in for one."""

from __future__ import annotations

import random

import pytest

from runtime.config import LookaheadConfig, SamplingParams
from runtime.lookahead.partition import partition
from runtime.lookahead.pool import NgramPool
from runtime.lookahead.rows import SequenceRows
from runtime.lookahead.sequence import Sequence
from runtime.lookahead.sources import SuffixSource
from runtime.lookahead.tree import CandidateTree
from runtime.lookahead.window import Window
from runtime.request import Request
from runtime.retention import LayerGroup, Ledger, Sliding
from runtime.step import Choose


def ancestors(rows: SequenceRows, row: int) -> list[int]:
    """Tokens from the first row of the forest down to `row`."""
    path = []
    while row >= 0:
        path.append(rows.tokens[row])
        row = rows.parents[row]
    return path[::-1]


def toy_model(context: list[int]) -> int:
    """A next token that depends on the last three, with repeats enough for candidates to be accepted."""
    return (3 * context[-1] + 5 * context[-2] + context[-3]) % 7


def choose_all(rows: SequenceRows, cached: list[int]) -> list[int]:
    return [
        toy_model([0, 0, *cached, *ancestors(rows, row)]) if choose != Choose.NOTHING else -1
        for row, choose in enumerate(rows.choose)
    ]


def decode(lookahead: LookaheadConfig, prompt: list[int], count: int, max_chain: int = 4, room: int = 1000):
    """The tokens a Sequence emits under the toy model, and its steps."""
    sampling = SamplingParams(max_new_tokens=count)
    ledger = Ledger([LayerGroup((0,), lambda: Sliding(None, 1000, slot=False))], capacity=1000)
    sequence = Sequence(Request("r", tuple(prompt), sampling, lookahead), 0, ledger, eos_token_ids=())
    output: list[int] = []
    while len(output) < count:
        cached = sequence.text[: sequence.num_cached]
        rows = sequence.plan(max_chain, room)
        assert all(
            rows.positions[i] == (rows.positions[p] if p >= 0 else len(cached) - 1) + 1
            for i, p in enumerate(rows.parents)
        )
        output += sequence.accept(choose_all(rows, cached), 0.0)[0]
    return output[:count], sequence.usage.num_steps


@pytest.mark.parametrize("sources", [("jacobi",), ("suffix",), ("jacobi", "suffix")], ids="-".join)
@pytest.mark.parametrize("shape", [(1, 2, 1), (3, 2, 4), (1, 6, 2), (5, 3, 5), (15, 5, 15)], ids=str)
def test_lookahead_emits_what_one_at_a_time_emits(sources, shape):
    window_size, ngram_size, guess_set_size = shape
    config = LookaheadConfig(
        window_size=window_size, ngram_size=ngram_size, guess_set_size=guess_set_size, sources=sources
    )
    prompt = [1, 2, 3, 4, 5, 6, 0, 1, 3]
    plain, plain_steps = decode(LookaheadConfig(enabled=False), prompt, 200)
    tokens, steps = decode(config, prompt, 200)
    assert plain_steps == 200
    assert tokens == plain
    assert steps < plain_steps


def test_a_row_budget_bounds_the_rows_and_keeps_the_tokens():
    config = LookaheadConfig(sources=("suffix",))
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
    assert list(pool.tails(1)) == [(6, 7), (2, 3)]  # (4, 5) was used least recently
    assert list(pool.tails(9)) == []
    pool.add_text([8, 9, 8, 9])
    assert list(pool.tails(8)) == [(9, 8)] and list(pool.tails(9)) == [(8, 9)]


def test_suffix_prefers_long_then_recent_matches():
    text = [1, 2, 3, 7, 9, 2, 3, 8, 1, 2, 3]
    source = SuffixSource(LookaheadConfig(sources=("suffix",)), text)
    source.observe(text, len(text), is_prompt=True)
    proposals = [candidate[0] for candidate in source.propose(text)]
    assert proposals == [7, 8]  # after [1, 2, 3]; then after [2, 3]
    text += [7]
    source.observe(text, 1, is_prompt=False)
    assert next(source.propose(text))[0] == 9


def test_tree_stores_shared_prefixes_once_and_walks_the_longest_path():
    rows = SequenceRows(first_position=0)
    rows.add_chain([5], reaches_end=True)
    tree = CandidateTree(rows)
    tree.grow([iter([(1, 2, 3), (1, 4), (1, 2, 9)])], room=100, horizon=100)
    assert rows.tokens == [5, 1, 2, 3, 4, 9]
    assert rows.parents == [-1, 0, 1, 2, 1, 2]
    chosen = [1, 2, 9, 0, 0, 6]
    assert tree.walk(chosen) == ([1, 2, 5], [1, 2, 9, 6])
    assert tree.walk([8, 0, 0, 0, 0, 0]) == ([], [8])


def test_tree_takes_turns_between_sources_within_its_room():
    rows = SequenceRows(first_position=0)
    rows.add_chain([5], reaches_end=True)
    CandidateTree(rows).grow([iter([(1, 2), (3, 4)]), iter([(6, 7)])], room=5, horizon=100)
    assert rows.tokens[1:] == [1, 2, 6, 7, 3]


@pytest.mark.parametrize("num_replicas", [1, 2, 3, 8])
def test_partition_is_closed_under_ancestors_and_balanced(num_replicas):
    generator = random.Random(num_replicas)
    for _ in range(50):
        size = generator.randint(1, 120)
        parents = [generator.randint(max(-1, i - 9), i - 1) for i in range(size)]
        owner, replicas = partition(parents, num_replicas)
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
    _, replicas = partition(rows.parents, 2)
    sizes = [sum(mask >> r & 1 for mask in replicas) for r in range(2)]
    assert max(sizes) <= 36  # 60 rows, 15 of them in row 0
    assert min(sizes) >= 30


def test_partition_gives_an_unsplittable_chain_to_one_replica():
    owner, replicas = partition([-1, 0, 1, 2], 4)
    assert set(owner) == {0} and set(replicas) == {1}
