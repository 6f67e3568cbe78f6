"""Rows do not influence each other, shares of a tensor add up, masks follow the tree."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from runtime.mesh.mesh import Mesh
from runtime.model.attention import RowBatch, ancestry
from runtime.model.layers import Linear, RMSNorm, VocabParallelEmbedding, activate
from runtime.model.rotary import Rotary, pairs_adjacent
from runtime.model.shard import HeadShard, split
from runtime.model.spec import ACTIVATIONS, RopeSpec
from runtime.retention import Sliding

SMOLLM2 = {"qkv": (960, 576), "output": (576, 576), "gate_up": (3072, 576), "down": (576, 1536), "head": (4000, 576)}


def assert_rows_independent(function: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor, counts: range) -> None:
    everything = function(x)
    differing = [count for count in counts if not torch.equal(function(x[:count].contiguous()), everything[:count])]
    assert not differing, f"results change with the number of rows at T = {differing}"


@pytest.mark.parametrize("layer", SMOLLM2)
def test_float32_linear_is_bit_identical_for_any_number_of_rows(layer: str) -> None:
    torch.manual_seed(0)
    weight = torch.randn(SMOLLM2[layer])
    linear = Linear(weight, torch.randn(len(weight)))
    assert linear.packed
    x = torch.randn(300, weight.shape[1])
    assert_rows_independent(linear, x, range(1, 65))
    assert_rows_independent(linear, x, range(65, 301, 47))
    assert torch.allclose(linear(x), F.linear(x, weight, linear.bias), atol=1e-3)


def test_float32_norms_are_bit_identical_for_any_number_of_rows() -> None:
    torch.manual_seed(0)
    assert_rows_independent(RMSNorm(torch.randn(576), 1e-5), torch.randn(64, 576), range(1, 65))
    assert_rows_independent(RMSNorm(torch.randn(12, 64), 1e-5), torch.randn(64, 12, 64), range(1, 65))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("num_rows", [1, 2, 17])
def test_linear_in_every_dtype(dtype: torch.dtype, num_rows: int) -> None:
    torch.manual_seed(0)
    weight, bias, x = torch.randn(33, 48), torch.randn(33), torch.randn(num_rows, 48)
    result = Linear(weight.to(dtype), bias.to(dtype))(x.to(dtype))
    assert result.dtype == dtype and result.shape == (num_rows, 33)
    tolerance = 40 * torch.finfo(dtype).eps * x.norm(dim=1).max().item()
    assert (result.double() - F.linear(x.double(), weight.double(), bias.double())).abs().max() < tolerance


@pytest.mark.parametrize("tp", [1, 2, 3, 5])
def test_embedding_shares_add_up(tp: int) -> None:
    torch.manual_seed(0)
    table, tokens = torch.randn(101, 6), torch.tensor([0, 100, 50, 33, 34, 67, 0])
    shares = []
    for shard in range(tp):
        start, stop = split(101, shard, tp)
        shares.append(VocabParallelEmbedding(table[start:stop], start, Mesh())(tokens))
    assert torch.equal(sum(shares), table[tokens])


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations_are_those_of_hugging_face(name: str) -> None:
    from transformers.activations import ACT2FN

    x = torch.linspace(-6, 6, 200)
    assert torch.allclose(activate(x, name), ACT2FN[name](x), atol=1e-6)


@pytest.mark.parametrize(("num_heads", "num_kv_heads"), [(9, 3), (8, 2), (8, 8), (8, 1), (14, 2), (40, 8)])
def test_head_shards_cover_every_query_head_once(num_heads: int, num_kv_heads: int) -> None:
    per_kv = num_heads // num_kv_heads
    for tp in range(1, num_heads + 1):
        seen = []
        for shard in range(tp):
            heads = HeadShard.of(num_heads, num_kv_heads, shard, tp)
            seen += range(heads.query_start, heads.query_stop)
            assert len(heads.slots) == heads.query_stop - heads.query_start
            assert len(set(heads.slots)) == len(heads.slots) and max(heads.slots) < heads.num_heads
            for head, slot in zip(range(heads.query_start, heads.query_stop), heads.slots, strict=True):
                assert head // per_kv == heads.kv_start + slot // heads.group
            assert heads.kv_stop <= num_kv_heads
            if num_heads % tp == 0 and num_kv_heads % tp == 0:
                assert heads.num_heads == num_heads // tp and heads.num_kv_heads == num_kv_heads // tp
        assert seen == list(range(num_heads))


def test_ancestry_of_a_tree_and_of_a_chain() -> None:
    tree = ancestry(np.array([-1, 0, 0, 1, -1, 4]))
    sees = [np.flatnonzero(row).tolist() for row in tree]
    assert sees == [[0], [0, 1], [0, 2], [0, 1, 3], [4], [4, 5]]
    assert np.array_equal(ancestry(np.arange(-1, 5)), np.tri(6, dtype=bool))
    with pytest.raises(ValueError, match="parent"):
        ancestry(np.array([-1, 1]))


def everything(num_tokens: int) -> Sliding:
    """The full policy with some tokens stored."""
    retained = Sliding(None, 20, slot=False)
    retained.commit(range(num_tokens))
    return retained


def test_segments_and_sliding_window_masks() -> None:
    batch = RowBatch.build(
        tokens=np.arange(5),
        positions=np.array([6, 7, 7, 4, 5]),
        parents=np.array([-1, 0, 0, -1, 3]),
        slots=np.array([2, 2, 2, 1, 1]),
        rope_lengths=np.zeros(5),
        device=torch.device("cpu"),
    )
    assert [(s.slot, s.start, s.stop) for s in batch.segments] == [(2, 0, 3), (1, 3, 5)]
    sees = batch.segments[0].sees(everything(6), None)
    assert [np.flatnonzero(row).tolist() for row in sees[:, 6:]] == [[0], [0, 1], [0, 2]] and sees[:, :6].all()
    sees = batch.segments[0].sees(everything(6), 3)  # a query at p sees keys at p-2, p-1 and p
    assert [np.flatnonzero(row).tolist() for row in sees] == [[4, 5, 6], [5, 6, 7], [5, 6, 8]]
    sees = batch.segments[1].sees(everything(4), 6)  # positions 0..5 are all within 6 of 5: the window cuts nothing
    assert sees[:, :4].all() and sees.shape == (2, 6)


def test_a_single_row_needs_no_mask() -> None:
    one = np.array([0])
    batch = RowBatch.build(one, np.array([9]), np.array([-1]), one, one, torch.device("cpu"))
    assert batch.segments[0].sees(everything(9), None) is None and batch.segments[0].sees(everything(9), 10) is None
    assert batch.segments[0].sees(everything(9), 9) is not None


def test_rotation_keeps_distances_at_millions_of_tokens() -> None:
    """q.k depends on the distance alone; with float32 angles it would not at this length."""
    torch.manual_seed(0)
    rope = RopeSpec(tuple(1e4 ** (-i / 32) for i in range(32)))
    rotary = Rotary(rope, torch.device("cpu"))
    heads = torch.randn(2, 32, dtype=torch.complex64)

    def score(position: int, distance: int) -> float:
        where = torch.tensor([position, position - distance])
        query, key = torch.view_as_real(heads * rotary.turns(where, torch.zeros_like(where)).to(torch.complex64))
        return (query * key).sum().item()

    for distance in (0, 1, 77):
        assert score(4_000_077, distance) == pytest.approx(score(distance, distance), abs=1e-4)


def test_rotated_pairs_come_to_stand_side_by_side() -> None:
    assert pairs_adjacent(torch.arange(6)).tolist() == [0, 3, 1, 4, 2, 5]
    assert pairs_adjacent(torch.arange(8).view(2, 4)).tolist() == [[0, 2, 1, 3], [4, 6, 5, 7]]
