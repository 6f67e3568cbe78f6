"""Attention over paged caches is that of a dense float64 model with explicit masks and distances, whatever the policy,
the tree, the lengths and the company; and a row's bits do not depend on which of its ancestors are stored."""

from __future__ import annotations

import pytest
import torch

from tests.oracles import POLICIES
from tests.runtime.model.cuda.layer import Layer, difference, needs_interpreter, random_tree, text_of

BOTH = pytest.mark.parametrize(
    "kernels", [pytest.param(True, marks=needs_interpreter, id="kernels"), pytest.param(False, id="torch")]
)
SMALL = {"num_kv": 1, "group": 2, "num_rows": 32}
LARGE = {
    "sink-large": {"policy": "sink", "num_sinks": 4, "window": 300},
    "sep-large": {**POLICIES["sep"], "num_neighbors": 200},
    "streaming-large": {**POLICIES["streaming"], "local": 300, "capacity": 400, "max_separators": 80},
}
ALL = POLICIES | LARGE


def agrees(layer: Layer, found: torch.Tensor) -> bool:
    return difference(found, layer.expected()) < (2e-5 if layer.kernels else 1e-11)


@BOTH
@pytest.mark.parametrize("policy", ALL)
@pytest.mark.slow
def test_every_policy_with_trees_on_several_sequences(policy: str, kernels: bool) -> None:
    """Two steps; a path through the first tree is accepted, part of it from a branch."""
    layer = Layer(ALL[policy], kernels, **SMALL)
    layer.append(text_of(590, seed=1), slot=0)
    layer.append(text_of(37, seed=2), slot=2)
    for seed in (1, 2):
        sizes = [min(6, layer.room(0)), min(5, layer.room(2))]
        one, other = random_tree(sizes[0], seed, chain=2), random_tree(sizes[1], seed + 10, chain=1)
        parents = other + [parent if parent < 0 else parent + sizes[1] for parent in one]
        slots = [2] * sizes[1] + [0] * sizes[0]
        assert agrees(layer, layer.step(text_of(sum(sizes), seed=seed), parents, slots))
        layer.commit(layer.path(sum(sizes) - 1), slot=0)
        layer.commit(layer.path(sizes[1] - 1), slot=2)


@BOTH
@pytest.mark.parametrize("policy", ["full", "streaming-original", "sep-large"])
@pytest.mark.parametrize("window", [7, 150])
def test_layers_with_a_sliding_window_of_the_models_own(policy: str, window: int, kernels: bool) -> None:
    layer = Layer(ALL[policy], kernels, window=window, **SMALL)
    layer.append(text_of(300, seed=1))
    count = min(8, layer.room(0))
    assert agrees(layer, layer.step(text_of(count, seed=2), random_tree(count, seed=3, chain=4)))


@pytest.mark.slow
@BOTH
@pytest.mark.parametrize("policy", ["full", "sep"])
def test_trees_deeper_than_a_chunk_and_than_the_window(policy: str, kernels: bool) -> None:
    """Two chains of 70 rows from one root: of the second, no row but the root stands in the sequence's pages."""
    layer = Layer(ALL[policy], kernels, num_kv=1, group=1, num_rows=141)
    layer.append(text_of(100, seed=1))
    parents = [-1, *range(0, 70), 0, *range(71, 140)]
    count = min(len(parents), layer.room(0))
    assert agrees(layer, layer.step(text_of(count, seed=2), parents[:count]))
    layer.commit([0, *range(71, count)])
    assert agrees(layer, layer.step([3, 4, 5], [-1, 0, 0]))


@needs_interpreter
@pytest.mark.parametrize("length", [0, 1, 64, 127, 255, 256])
def test_lengths_at_the_borders_of_chunks_and_pages(length: int) -> None:
    layer = Layer(POLICIES["full"], True, **SMALL)
    layer.append(text_of(length, seed=1))
    assert agrees(layer, layer.step(text_of(5, seed=2), [-1, 0, 0, 1, 2]))


@needs_interpreter
@pytest.mark.parametrize(
    ("head_dim", "num_kv", "group"), [(64, 1, 3), (80, 2, 1), (96, 1, 8), (128, 1, 4), (256, 1, 2)]
)
def test_head_sizes_and_groups(head_dim: int, num_kv: int, group: int) -> None:
    for policy in ("full", "sink"):
        layer = Layer(POLICIES[policy], True, num_kv, group, head_dim, num_rows=8)
        layer.append(text_of(150, seed=1))
        assert agrees(layer, layer.step(text_of(4, seed=2), [-1, 0, 0, 1]))


@needs_interpreter
@pytest.mark.parametrize("group", [5, 7])
def test_groups_that_divide_no_tile(group: int) -> None:
    layer = Layer(POLICIES["full"], True, num_kv=1, group=group, num_rows=32)
    layer.append(text_of(200, seed=1))
    assert agrees(layer, layer.step(text_of(12, seed=2), random_tree(12, seed=3)))


@pytest.mark.slow
@needs_interpreter
def test_a_prompt_of_512_rows_in_one_step() -> None:
    layer = Layer(POLICIES["full"], True, num_kv=1, group=1, num_rows=512)
    found = layer.step(text_of(512, seed=1), list(range(-1, 511)))
    assert agrees(layer, found)
    layer.commit(range(512))
    assert agrees(layer, layer.step([1, 2], [-1, -1]))


@needs_interpreter
@pytest.mark.parametrize(
    "policy",
    ["full", "streaming-large", *(pytest.param(name, marks=pytest.mark.slow) for name in ("sink-large", "sep-large"))],
)
def test_a_rows_bits_depend_neither_on_what_is_stored_nor_on_its_company(policy: str) -> None:
    """A chain decoded one row at a time; as a trunk; as a branch; on another slot beside other sequences, its pages and
    its place in the step others. In every case its ancestors stand somewhere else."""
    length, depth = 444, 8  # over the border of a chunk, at 448
    settings = {"num_kv": 1, "group": 2, "num_rows": 16, "num_slots": 3}
    probe = Layer(ALL[policy], True, **settings)
    text, heads = text_of(length, seed=1), probe.random(length)
    chain, chain_heads = text_of(depth, seed=2), probe.random(depth)

    def ready(slot: int = 0) -> Layer:
        layer = Layer(ALL[policy], True, seed=9, **settings)
        if slot:
            layer.append(text_of(333, seed=5), slot=0)
        layer.append(text, slot, heads)
        assert layer.room(slot) >= depth
        return layer

    layer, singles = ready(), []
    for token, row in zip(chain, chain_heads, strict=True):
        singles.append(layer.step([token], [-1], heads=row[None])[0])
        layer.commit([0])
    alone = torch.stack(singles)
    assert difference(ready().step(chain, list(range(-1, depth - 1)), heads=chain_heads), alone) == 0

    layer = ready()  # another branch has the places of the positions
    others, other_heads = text_of(8, seed=3), layer.random(8)
    parents = [*range(-1, 7), -1, *range(8, 8 + depth - 1)]
    found = layer.step(others + chain, parents, heads=torch.cat([other_heads, chain_heads]))
    assert difference(found[8:], alone) == 0

    layer = ready()  # the first half stored, the second half a branch below others
    layer.step(chain[:4], list(range(-1, 3)), heads=chain_heads[:4])
    layer.commit(range(4))
    parents = [-1, 0, 0, -1, *range(3, depth - 4 + 2)]
    found = layer.step(others[:3] + chain[4:], parents, heads=torch.cat([other_heads[:3], chain_heads[4:]]))
    assert difference(found[3:], alone[4:]) == 0

    layer = ready(slot=2)
    layer.append(text_of(5, seed=6), slot=1)
    parents = [-1, 0, 1] + [-1, 3, 3, 4, 5] + [-1, *range(8, 8 + depth - 1)]
    slots = [0] * 3 + [1] * 5 + [2] * depth
    found = layer.step(others[:8] + chain, parents, slots, torch.cat([other_heads[:8], chain_heads]))
    assert difference(found[8:], alone) == 0


@needs_interpreter
def test_order_of_additions_matters_where_it_is_not_fixed() -> None:
    """The test above could fail: torch, which adds up as many keys as there are, gives other bits in the same cases."""
    one, other = (Layer(POLICIES["full"], True, num_kv=1, group=2, num_rows=64, seed=9) for _ in range(2))
    text, heads = text_of(450, seed=1), one.random(450)
    chain, chain_heads = text_of(12, seed=2), one.random(12)
    for layer in (one, other):
        layer.append(text, heads=heads)
    other.step(chain[:-1], list(range(-1, 10)), heads=chain_heads[:-1])
    other.commit(range(11))
    staged = one.step(chain, list(range(-1, 11)), heads=chain_heads)[-1]
    stored = other.step(chain[-1:], [-1], heads=chain_heads[-1:])[-1]
    assert difference(staged, stored) == 0
    in_torch = other.step(chain[-1:], [-1], heads=chain_heads[-1:], by_kernels=False)[-1]
    assert 0 < difference(in_torch, stored) < 1e-5


@needs_interpreter
@pytest.mark.parametrize("policy", ["full", "streaming-large"])
def test_pages_that_were_given_back_serve_another_sequence(policy: str) -> None:
    """As few pages as two sequences need, full of the leavings of others that were not finite."""
    layer = Layer(ALL[policy], True, num_slots=2, num_rows=8, num_kv=1, group=2, num_pages=8)
    for round_ in range(2):
        for slot in range(2):
            layer.append(text_of(300, seed=round_), slot)
        found = layer.step(text_of(8, seed=round_), [-1, 0, 0, 1, -1, 4, 4, 5], [0] * 4 + [1] * 4)
        assert agrees(layer, found)
        layer.cache.buffer.fill_(torch.nan)
        for slot in range(2):
            layer.cache.reset(slot)
            layer.texts[slot], layer.heads[slot] = [], layer.random(0)
    assert layer.cache.num_free_pages == 8
