"""Pages come and go; accepted rows move only where they must."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.oracles import POLICIES
from tests.runtime.model.cuda.layer import Layer, text_of


def layer_of(policy: str = "full", **settings) -> Layer:
    return Layer(POLICIES[policy], kernels=False, num_kv=1, group=1, **settings)


def test_a_trunk_that_is_accepted_stays_where_it_is() -> None:
    layer = layer_of()
    layer.append(text_of(10, seed=1))
    layer.step(text_of(6, seed=2), [-1, 0, 1, 1, 3, 4])
    layer.commit([0, 1, 2])
    assert layer.cache.take_moves().shape == (2, 0)


def test_a_branch_moves_to_the_places_of_its_positions() -> None:
    layer = layer_of()
    layer.append(text_of(10, seed=1))
    layer.step(text_of(6, seed=2), [-1, 0, 1, 0, 3, 4])
    layer.commit([0, 3, 4, 5])
    sources, destinations = layer.cache.take_moves()
    first = layer.cache.runs[0].pages[0] * 256
    assert sources.tolist() == [3, 4, 5] and destinations.tolist() == [first + 11, first + 12, first + 13]


@pytest.mark.parametrize("policy", ["sink", "sep", "streaming"])
def test_a_streaming_session_holds_few_pages_however_long(policy: str) -> None:
    layer = layer_of(policy)
    layer.cache.begin_step()
    held = []
    for start in range(0, 4096, 512):
        layer.append(text_of(512, seed=start))
        layer.cache.begin_step()
        held.append(layer.cache.num_pages - layer.cache.num_free_pages)
    separators = sum(token in POLICIES["sep"]["separators"] for token in layer.texts[0])
    most = 3 if policy != "sep" else 2 + -(-(separators + 3) // 256)
    assert max(held) <= most
    layer.cache.reset(0)
    layer.cache.begin_step()
    assert layer.cache.num_free_pages == layer.cache.num_pages


def test_pages_wait_for_the_moves_that_fill_them() -> None:
    """Eviction in the same commit: the accepted branch's page is given back before its move was made."""
    layer = layer_of("sink", num_rows=32)
    layer.append(text_of(250, seed=1))
    parents = [-1, *range(0, 12), 0, *range(13, 31)]
    layer.step(text_of(32, seed=2), parents)
    before = layer.cache.num_free_pages
    layer.commit(layer.path(31))
    free = set(layer.cache._free)
    destinations = np.concatenate([moves[1] for moves in layer.cache._moves]) // 256
    assert not free & set(destinations.tolist())
    layer.cache.begin_step()
    assert layer.cache.num_free_pages >= before


def test_diverged_rows_of_an_earlier_step_cannot_be_accepted() -> None:
    layer = layer_of()
    layer.append(text_of(5, seed=1), slot=0)
    layer.append(text_of(5, seed=2), slot=1)
    layer.step([1, 2, 3], [-1, 0, 0], [0, 0, 0])
    staged = layer.rows
    layer.step([4, 5], [-1, -1], [1, 1])
    with pytest.raises(AssertionError, match="earlier step"):
        layer.cache.commit(0, [0, 2], [1, 3])
    layer.cache.commit(0, [0, 1], [1, 2])  # these stand in the sequence's own page
    assert layer.cache.retained[0].length == 7 and len(staged) == 3


def test_rows_read_on_one_replica_are_appended_on_another() -> None:
    one, other = (layer_of("sep-no-initial", seed=3) for _ in range(2))
    heads = one.random(30)
    for layer in (one, other):
        layer.append(text_of(30, seed=1), heads=heads)
    tokens = [1, 5, 9, 2, 77]
    one.step(tokens, [-1, 0, 1, 0, 3])
    staged = one.rows
    block = one.cache.read_staged(0, [0, 3, 4])
    received = other.cache.empty_block(3).copy_(block)
    one.commit([0, 3, 4])
    other.cache.append(0, received, [1, 2, 77])
    other._extend(0, [1, 2, 77], staged[[0, 3, 4]])
    follow = one.random(2)
    found = [layer.step([3, 4], [-1, 0], heads=follow) for layer in (one, other)]
    assert torch.equal(*found)
    assert (found[0] - one.expected()).abs().max() < 1e-11
