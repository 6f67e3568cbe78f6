"""Sampling is a function of (logits, parameters, seed, position), with the softmax distribution."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from runtime.mesh.mesh import Mesh
from runtime.model.sampler import GREEDY_BELOW, Logits, Sampled, choose_tokens, gumbel, least_kept, top_tokens
from runtime.step import TOP_BITS, Choose, Row, Seq


def table(seed=0, temperature=1.0, top_k=0, top_p=1.0) -> np.ndarray:
    line = np.zeros(len(Seq), np.int32)
    line[Seq.TEMPERATURE] = np.float32(temperature).view(np.int32)
    line[Seq.TOP_K], line[Seq.TOP_P] = top_k, np.float32(top_p).view(np.int32)
    line[Seq.SEED_LOW] = seed & 0x7FFFFFFF
    line[Seq.SEED_HIGH] = np.uint32(seed >> 31).view(np.int32)
    return line


def rows_at(positions, choose=Choose.SAMPLE) -> np.ndarray:
    rows = np.zeros((len(positions), len(Row)), np.int32)
    rows[:, Row.POSITION], rows[:, Row.CHOOSE] = positions, choose
    return rows


def choose(logits, rows, parameters) -> np.ndarray:
    by_chance = parameters[:, Seq.TEMPERATURE].view(np.float32) >= GREEDY_BELOW
    index = np.flatnonzero((rows[:, Row.CHOOSE] == Choose.SAMPLE) & by_chance)
    sampled = Sampled(index, rows[index], parameters[index]) if len(index) else None
    return choose_tokens(Logits(logits), sampled, Mesh(), (0, logits.shape[1])).numpy()


LOGITS = torch.randn(40, generator=torch.Generator().manual_seed(3)) * 2


def test_greedy_and_jacobi_rows_take_the_largest_logit():
    logits = torch.stack([LOGITS, -LOGITS])
    greedy = np.stack([table(temperature=0.0)] * 2)
    expected = logits.argmax(-1).numpy()
    assert (choose(logits, rows_at([4, 5]), greedy) == expected).all()
    hot = np.stack([table(temperature=9.0)] * 2)
    assert (choose(logits, rows_at([4, 5], Choose.ARGMAX), hot) == expected).all()


@pytest.mark.parametrize("temperature", [0.7, 1.5])
def test_the_softmax_distribution_is_sampled(temperature):
    count = 40_000
    parameters = np.stack([table(seed=11, temperature=temperature)] * count)
    tokens = choose(LOGITS.expand(count, -1), rows_at(range(count)), parameters)
    observed = np.bincount(tokens, minlength=40) / count
    expected = (LOGITS.double() / temperature).softmax(0).numpy()
    chi2 = (count * (observed - expected) ** 2 / expected).sum()
    assert chi2 < 80  # 39 degrees of freedom: 1 in 10,000 exceeds 81


def test_a_rows_token_depends_on_seed_and_position_alone():
    one = choose(LOGITS[None], rows_at([7]), table(seed=5)[None])
    others = np.stack([table(seed=9), table(seed=5), table(seed=2**62 + 5)])
    company = choose(LOGITS.expand(3, -1), rows_at([7, 7, 7]), others)
    assert company[1] == one[0]
    many = np.stack([table(seed=2**40 + i) for i in range(200)])
    assert len(set(choose(LOGITS.expand(200, -1), rows_at([7] * 200), many))) > 5


@pytest.mark.slow
def test_top_k_and_top_p_sample_the_renormalised_rest():
    count = 20_000
    probabilities = LOGITS.double().softmax(0)
    order = probabilities.argsort(descending=True)
    nucleus = int((probabilities[order].cumsum(0) < 0.8).sum()) + 1
    for parameters, kept in ((table(top_k=3), order[:3]), (table(top_p=0.8), order[:nucleus])):
        tokens = choose(LOGITS.expand(count, -1), rows_at(range(count)), np.stack([parameters] * count))
        assert set(tokens) == set(kept.tolist())
        observed = np.bincount(tokens, minlength=40)[kept.numpy()] / count
        expected = (probabilities[kept] / probabilities[kept].sum()).numpy()
        assert np.abs(observed - expected).max() < 0.02


def test_a_flat_distribution_needs_more_than_the_prefix():
    flat = torch.linspace(0, 1e-3, 5000)
    kept = flat >= least_kept(flat, 1.0, 0, 0.9)
    mass = flat.double().softmax(0)
    assert 0.9 <= float(mass[kept].sum()) < 0.9 + float(mass.max()) * 1.01
    assert int((flat >= least_kept(flat, 1.0, 3000)).sum()) == 3000
    both = flat >= least_kept(flat, 1.0, 2000, 0.5)
    assert abs(int(both.sum()) - 1000) <= 2


def test_noise_can_be_computed_in_parts():
    seeds, positions = np.array([1, 2**62]), np.array([0, 10**9])
    whole = gumbel(seeds, positions, (0, 1000), torch.device("cpu"))
    parts = [gumbel(seeds, positions, bounds, torch.device("cpu")) for bounds in ((0, 333), (333, 1000))]
    assert torch.equal(whole, torch.cat(parts, dim=1))
    big = gumbel(np.arange(50), np.arange(50), (0, 20_000), torch.device("cpu"))
    assert abs(float(big.mean()) - 0.5772) < 0.005 and abs(float(big.var()) - np.pi**2 / 6) < 0.02
    assert float(torch.corrcoef(torch.stack([big[0], big[1]]))[0, 1]) < 0.03


@pytest.mark.parametrize("vocabulary", [40, 262, 1000, 4096])
@pytest.mark.parametrize("k", [1, 8])
def test_the_likeliest_tokens_are_those_of_a_full_sort(vocabulary, k):
    generator = torch.Generator().manual_seed(vocabulary + k)
    logits = torch.randn(6, vocabulary, generator=generator) * 4
    packed = top_tokens(Logits(logits), k, Mesh(), (0, vocabulary))
    best = logits.topk(k)
    assert torch.equal(packed >> TOP_BITS, best.indices)
    nats = (packed & (1 << TOP_BITS) - 1) / 16.0
    exact = logits.logsumexp(1, keepdim=True) - best.values
    # What the other tokens of a block hold is left out of the sum, so tokens seem likelier than they are, never less.
    assert (nats <= exact + 0.04).all() and (nats >= exact - 1.5).all()


def test_of_equal_logits_the_first_one_is_chosen():
    logits = torch.zeros(3, 1000)
    logits[1, [300, 299, 900]] = 2.0
    logits[2, 130:400] = 1.0
    assert choose(logits, rows_at([0, 1, 2]), np.stack([table(temperature=0.0)] * 3)).tolist() == [0, 299, 130]


def test_the_likeliest_of_fewer_tokens_than_asked_for_are_all_of_them():
    packed = top_tokens(Logits(torch.tensor([[0.0, 3.0, 1.0]])), 5, Mesh(), (0, 3))
    assert (packed >> TOP_BITS)[0, :3].tolist() == [1, 2, 0]
    assert (packed & (1 << TOP_BITS) - 1)[0, 3:].tolist() == [255, 255]
