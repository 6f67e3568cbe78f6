"""The small kernels do what the torch functions beside them do, which do what float64 says."""

from __future__ import annotations

import pytest
import torch

from runtime.mesh.mesh import Mesh
from runtime.model.cuda.activation import KINDS, gated, gated_eager
from runtime.model.cuda.arrays import CacheArrays
from runtime.model.cuda.embedding import embed, embed_eager
from runtime.model.cuda.heads import rotate_and_store, rotate_and_store_eager
from runtime.model.cuda.moves import move, move_eager
from runtime.model.cuda.norm import Norm, add_norm, add_norm_eager
from runtime.model.cuda.top import DeviceLogits
from runtime.model.layers import RMSNorm
from runtime.model.sampler import Logits, choose_tokens, top_tokens
from runtime.step import NOT_A_NUMBER
from tests.runtime.model.cuda.layer import difference, needs_interpreter

BOTH = pytest.mark.parametrize(
    "kernels", [pytest.param(True, marks=needs_interpreter), False], ids=["kernels", "torch"]
)
TOLERANCE = {torch.float32: 1e-6, torch.float16: 4e-3}
DTYPES = pytest.mark.parametrize("dtype", TOLERANCE, ids=str)


@BOTH
@DTYPES
@pytest.mark.parametrize("size", [64, 576, 80])
def test_norm_of_the_sum(size: int, dtype: torch.dtype, kernels: bool) -> None:
    torch.manual_seed(0)
    hidden, added = torch.randn(2, 5, size).to(dtype)
    weight = torch.randn(size).to(dtype)
    norm = Norm.of(RMSNorm(weight, 1e-5))
    run = add_norm if kernels else add_norm_eager
    for extra in (None, added):
        stream = hidden.clone()
        found = run(stream, extra, norm)
        total = hidden.double() if extra is None else (hidden + added).double()
        expected = total * (total.square().mean(-1, keepdim=True) + 1e-5).rsqrt() * weight.double()
        assert difference(stream, total) == 0
        assert difference(found, expected) < 4 * TOLERANCE[dtype] and found.dtype == dtype


@needs_interpreter
@DTYPES
@pytest.mark.parametrize("activation", KINDS)
def test_gated_activation(activation: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x = (3 * torch.randn(3, 2 * 1100)).to(dtype)
    expected = gated_eager(x.double(), activation)
    assert difference(gated(x, activation), expected) < 16 * TOLERANCE[dtype]


@BOTH
def test_embedding_of_a_slice_of_the_vocabulary(kernels: bool) -> None:
    table, tokens = torch.randn(7, 1030), torch.tensor([0, 10, 11, 16, 17, 14], dtype=torch.int32)
    found = (embed if kernels else embed_eager)(tokens, table, 10, 7)
    expected = torch.stack([table[t - 10] if 10 <= t < 17 else torch.zeros(1030) for t in tokens.tolist()])
    assert torch.equal(found, expected)


@BOTH
def test_moves_of_all_layers_at_once(kernels: bool) -> None:
    pool = torch.randn(2, 2, 3, 40, 12)
    sources, destinations = torch.randperm(40)[:36].view(2, 18)
    expected = pool.clone()
    expected[..., destinations, :] = pool[..., sources, :]
    lists = torch.cat([torch.zeros(5, dtype=torch.int64), sources, destinations]).int()
    run = move if kernels else move_eager
    run(pool, torch.tensor([5, 18], dtype=torch.int32), lists)
    assert torch.equal(pool, expected)
    run(pool, torch.tensor([0, 0], dtype=torch.int32), lists)
    assert torch.equal(pool, expected)


@needs_interpreter
@DTYPES
@pytest.mark.parametrize("has_norm", [False, True])
@pytest.mark.parametrize("has_slots", [False, True])
@pytest.mark.parametrize("head_dim", [8, 80])
def test_heads_are_normed_rotated_and_written(
    head_dim: int, has_slots: bool, has_norm: bool, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    num_rows, num_heads, num_kv = 4, 4, 2
    qkv = torch.randn(num_rows, (num_heads + 2 * num_kv) * head_dim).to(dtype)
    turns, slot_turns = (torch.view_as_real(torch.polar(torch.ones(1), torch.randn(4, head_dim // 2))) for _ in "ab")
    norm = Norm.of(RMSNorm(torch.randn(num_heads + num_kv, head_dim).to(dtype), 1e-6)) if has_norm else None
    places, nowhere = torch.tensor([3, 17, -1, 0]).int(), torch.tensor([-1, 9, -1, -1]).int()
    cached = CacheArrays(places, nowhere, *[places] * 6)
    found = []
    for run in (rotate_and_store, rotate_and_store_eager):
        keys, values = torch.zeros(2, num_kv, 20, head_dim, dtype=dtype)
        queries, slot_queries = torch.zeros(2, num_rows, num_heads, head_dim, dtype=dtype)
        slots = (slot_turns, slot_queries) if has_slots else (None, None)
        run(qkv.clone(), turns, slots[0], norm, cached, keys, values, queries, slots[1])
        queries[2] = slot_queries[2] = 0  # fills up the shape
        found.append(torch.cat([part.flatten() for part in (queries, slot_queries, keys, values)]))
        assert keys[:, [3, 17, 9, 0]].any(-1).all() and torch.equal(keys[:, 17], keys[:, 9])
        assert not keys[:, [1, 2, 19]].any() and slot_queries.any() == has_slots
    assert difference(*found) < 8 * TOLERANCE[dtype]


@needs_interpreter
@pytest.mark.parametrize("size", [5, 128, 1000, 3001])
@pytest.mark.parametrize("k", [1, 7, 8])
def test_largest_logits_and_their_sum(size: int, k: int) -> None:
    torch.manual_seed(0)
    logits = torch.randn(4, size) * 4
    logits[1, size // 2] = logits[1, 3] = 50  # equals: the first counts
    logits[2, : size - 2] = -torch.inf
    found = DeviceLogits(logits, k)
    values, places, whole = found.top(k)
    count = min(k, size)
    assert torch.equal(values[:, :count], logits.topk(count).values) and (values[:, count:] == -torch.inf).all()
    real = values[:, :count] > -torch.inf
    assert torch.equal(logits.gather(1, places[:, :count])[real], values[:, :count][real])
    assert places[1, 0] == min(3, size // 2) and len(set(places[0, :count].tolist())) == count
    assert difference(whole, logits.double().logsumexp(1)) < 1e-5
    assert all(torch.equal(one, other) for one, other in zip(found.best(), Logits(logits).best(), strict=True))


@needs_interpreter
def test_rows_without_a_token_say_so() -> None:
    torch.manual_seed(0)
    logits = torch.randn(5, 700)
    logits[0, 699], logits[1, 3], logits[2, 8], logits[3, 5:9] = torch.nan, torch.inf, -torch.inf, 9
    place = Mesh(), (0, 700)
    plain, on_device = (choose_tokens(each, None, *place) for each in (Logits(logits), DeviceLogits(logits, 3)))
    assert plain.tolist() == on_device.tolist()
    assert [token == NOT_A_NUMBER for token in on_device.tolist()] == [True, True, False, False, False]
    assert on_device[3] == 5
    ids = [top_tokens(each, 3, *place) >> 8 for each in (Logits(logits[2:]), DeviceLogits(logits[2:], 3))]
    assert torch.equal(ids[0][[0, 2]], ids[1][[0, 2]])
