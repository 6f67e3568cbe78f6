"""Every control of sampling against transformers' processors, and native kernels against the function on torch."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from runtime.mesh.mesh import Mesh
from runtime.model.native.build import available
from runtime.model.sampler import GREEDY_BELOW, Logits, Ragged, Sampled, choose_tokens, gumbel
from runtime.step import Choose, Row, Seq

REALS = {"temperature", "top_p", "min_p", "repetition", "presence", "frequency"}
ROWS, VOCABULARY = 6, 1000


def line(seed: int = 3, **values: float) -> np.ndarray:
    """Of StepPlan.sequences."""
    found = np.zeros(len(Seq), np.int32)
    found[Seq.TOP_P] = np.float32(1).view(np.int32)
    found[Seq.SEED_LOW] = seed
    for name, value in values.items():
        found[Seq[name.upper()]] = np.float32(value).view(np.int32) if name in REALS else value
    return found


def sampled_of(lines: list[np.ndarray], texts: list[list[int]] | None = None, **more) -> Sampled:
    """Rows at positions 10, 11, ..., one per line; `texts`: what the answer has had."""
    rows = np.zeros((len(lines), len(Row)), np.int32)
    rows[:, Row.POSITION], rows[:, Row.CHOOSE] = 10 + np.arange(len(lines)), Choose.SAMPLE
    if texts is not None:
        counted = [np.unique(np.array(text, np.int32), return_counts=True) for text in texts]
        more["counts"] = Ragged.of([(tokens.astype(np.int32), counts.astype(np.int32)) for tokens, counts in counted])
    return Sampled(np.arange(len(lines)), rows, np.stack(lines), **more)


def some_logits(seed: int = 0, rows: int = ROWS) -> torch.Tensor:
    return torch.randn(rows, VOCABULARY, generator=torch.Generator().manual_seed(seed)) * 3


def native(logits, sampled, mesh=None, vocab_range=None):
    from runtime.model.native.build import library
    from runtime.model.native.drawing import draw

    return draw(library(), logits, sampled, mesh or Mesh(), vocab_range or (0, logits.shape[1]), 2)


KERNELS = [
    None,
    pytest.param(native, marks=pytest.mark.skipif(not available()[0], reason="there are no native kernels here")),
]


def chosen(logits, sampled, kernels) -> list[int]:
    return choose_tokens(Logits(logits), sampled, Mesh(), (0, logits.shape[1]), kernels).tolist()


CASES = {
    "temperature": dict(temperature=0.7),
    "min_p": dict(temperature=1.0, min_p=0.1),
    "top_k": dict(temperature=1.3, top_k=7),
    "top_k of nearly all": dict(temperature=3.0, top_k=990),
    "top_p": dict(temperature=1.0, top_p=0.6),
    "top_p of nearly all": dict(temperature=20.0, top_p=0.97),
    "top_k and top_p": dict(temperature=0.9, top_k=30, top_p=0.8),
    "repetition": dict(temperature=0.9, repetition=1.7),
    "repetition, greedy": dict(temperature=0.0, repetition=1.4),
    "all": dict(temperature=1.5, min_p=0.01, top_k=100, top_p=0.95, repetition=1.2),
}


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("name", CASES)
def test_a_row_chooses_what_the_processors_of_transformers_leave(name, kernels):
    case, logits = CASES[name], some_logits()
    texts = [list(range(row, 400, 3)) for row in range(ROWS)]
    sampled = sampled_of([line(**case)] * ROWS, texts)
    temperature = case["temperature"]
    processors = LogitsProcessorList()
    if "repetition" in case:
        processors.append(RepetitionPenaltyLogitsProcessor(case["repetition"]))
    if temperature >= GREEDY_BELOW:
        processors.append(TemperatureLogitsWarper(temperature))
    if "min_p" in case:
        processors.append(MinPLogitsWarper(case["min_p"]))
    if "top_k" in case:
        processors.append(TopKLogitsWarper(case["top_k"]))
    if "top_p" in case:
        processors.append(TopPLogitsWarper(case["top_p"]))
    expected = []
    for row, text in enumerate(texts):
        scores = processors(torch.tensor([text]), logits[row : row + 1].double())[0]
        if temperature >= GREEDY_BELOW:
            scores = scores + gumbel(np.array([3]), np.array([11 + row]), (0, VOCABULARY), logits.device)[0]
        expected.append(int(scores.argmax()))
    assert chosen(logits, sampled, kernels) == expected


@pytest.mark.parametrize("kernels", KERNELS)
def test_filters_leave_the_tokens_that_transformers_leaves(kernels):
    """Over many positions a row chooses every token that stays, and no other."""
    logits, count = some_logits(rows=1)[:, :40].repeat(3000, 1), 3000
    for case in (
        dict(min_p=0.05),
        dict(top_k=5),
        dict(top_p=0.7),
        dict(top_k=20, top_p=0.5),
        dict(min_p=0.2, top_p=0.6),
    ):
        sampled = sampled_of([line(temperature=1.0, **case)] * count)
        processors = LogitsProcessorList()
        if "min_p" in case:
            processors.append(MinPLogitsWarper(case["min_p"]))
        if "top_k" in case:
            processors.append(TopKLogitsWarper(case["top_k"]))
        if "top_p" in case:
            processors.append(TopPLogitsWarper(case["top_p"]))
        left = processors(torch.zeros(1, 1), logits[:1].double())[0]
        assert set(chosen(logits, sampled, kernels)) == set(torch.isfinite(left).nonzero().flatten().tolist())


@pytest.mark.parametrize("kernels", KERNELS)
def test_presence_and_frequency_are_taken_once_and_for_each_time(kernels):
    logits = torch.zeros(4, 50)
    logits[:, [5, 6, 7, 8]] = torch.tensor([4.0, 3.9, 3.8, 3.0])
    texts = [[5, 5, 6]] * 4
    lines = [
        line(temperature=0.0, presence=0.15),  # 3.85, 3.75, 3.8
        line(temperature=0.0, frequency=0.15),  # 3.7, 3.75, 3.8
        line(temperature=0.0, frequency=-0.5),  # 5, 4.4, 3.8
        line(temperature=0.0, presence=0.9),  # 3.1, 3.0, 3.8
    ]
    assert chosen(logits, sampled_of(lines, texts), kernels) == [5, 7, 5, 7]
    # What only the prompt has counts for neither.
    of_prompt = Ragged.of([(np.array([5, 6], np.int32), np.zeros(2, np.int32))] * 4)
    assert chosen(logits, sampled_of(lines, counts=of_prompt), kernels) == [5, 5, 5, 5]


@pytest.mark.parametrize("kernels", KERNELS)
def test_biases_bars_and_masks(kernels):
    logits = some_logits(7)
    best = logits.topk(3).indices
    lines = [line(temperature=0.0)] * ROWS
    barred = Ragged.of([(row[:1].int().numpy(), np.full(1, -np.inf, np.float32)) for row in best])
    assert chosen(logits, sampled_of(lines, biases=barred), kernels) == best[:, 1].tolist()
    raised = Ragged.of([(np.array([13], np.int32), np.array([50], np.float32))] * ROWS)
    assert chosen(logits, sampled_of(lines, biases=raised), kernels) == [13] * ROWS
    masks = np.zeros((1, -(-VOCABULARY // 32)), np.uint32)
    masks[0, 30] = 0b1001  # 960 and 963
    given = dict(masks=masks.view(np.int32), mask_of=np.array([0, -1, 0, 0, -1, 0]))
    found = chosen(logits, sampled_of(lines, **given), kernels)
    legal = [960 + 3 * int(row[963] > row[960]) for row in logits]
    assert found == [legal[i] if mask == 0 else int(best[i, 0]) for i, mask in enumerate(given["mask_of"])]
    hot = sampled_of([line(temperature=5.0, top_p=0.9, min_p=0.01)] * ROWS, **given)
    assert {token for token, mask in zip(chosen(logits, hot, kernels), given["mask_of"], strict=True) if mask == 0} <= {
        960,
        963,
    }


@pytest.mark.parametrize("bounds", [[0, 300, 1000], [0, 999, 1000], [0, 32, 500, 1000]])
def test_shards_of_the_vocabulary_choose_what_the_whole_chooses(bounds):
    """`least` and noise of every shard are those of the whole."""
    from runtime.model import sampler

    logits = some_logits(5)
    cases = [
        dict(temperature=1.0, **more)
        for more in (
            dict(),
            dict(top_p=0.7),
            dict(top_k=9),
            dict(min_p=0.1),
            dict(repetition=2.0),
            dict(top_p=0.9, frequency=0.5),
        )
    ]
    texts = [list(range(0, 900, 2))] * ROWS
    masks = np.random.default_rng(0).integers(-(2**31), 2**31, (1, -(-VOCABULARY // 32)), dtype=np.int32)
    sampled = sampled_of([line(**case) for case in cases], texts, masks=masks, mask_of=np.array([0, 0, -1, 0, -1, 0]))
    shards = list(zip(bounds, bounds[1:], strict=False))
    for kernels in [sampler.draw_on_torch, *([native] if available()[0] else [])]:
        whole = kernels(logits.clone(), sampled, Mesh(), (0, VOCABULARY))

        class Others(Mesh):
            """A mesh whose other shards are not there: what they would give is computed here."""

            def all_gather(self, tensor):
                if tensor.numel() == 1:
                    return [torch.tensor([stop - start]) for start, stop in shards]
                parameters = sampler.Parameters(sampled.sequences)
                wide = max(stop - start for start, stop in shards)
                some = np.flatnonzero(parameters.is_filtered)
                found = []
                for start, stop in shards:
                    part = sampler.adjust(logits[:, start:stop].clone(), sampled, parameters, (start, stop))[some]
                    found.append(torch.nn.functional.pad(part, (0, wide - part.shape[1]), value=-torch.inf))
                return found

        best = [
            kernels(logits[:, start:stop].contiguous(), sampled, Others(tp=len(shards)), (start, stop))
            for start, stop in shards
        ]
        values = torch.stack([value for value, _ in best])
        places = torch.stack([place + start for (_, place), (start, _) in zip(best, shards, strict=True)])
        winner = values.argmax(0)
        assert torch.equal(values.max(0).values, whole[0])
        assert torch.equal(places.gather(0, winner[None])[0], whole[1])


@pytest.mark.skipif(not available()[0], reason="there are no native kernels here")
def test_native_scores_are_those_on_torch():
    from runtime.model.sampler import draw_on_torch

    generator = np.random.default_rng(1)
    for width in (1, 31, 262, 5000):
        logits = torch.from_numpy(generator.normal(size=(40, width)) * generator.choice([0.01, 3, 30], (40, 1))).float()
        logits[::7] = logits[::7].round()  # with equal ones
        lines = [
            line(
                seed=int(generator.integers(2**31)),
                temperature=generator.choice([0.0, 0.01, 0.7, 1.0, 50.0]),
                top_p=generator.choice([1.0, 0.9, 0.3, 1e-6]),
                top_k=int(generator.choice([0, 1, 20, 10_000])),
                min_p=generator.choice([0.0, 0.02, 1.0]),
                repetition=generator.choice([0.0, 0.5, 1.3]),
                presence=generator.choice([0.0, 1.0, -2.0]),
                frequency=generator.choice([0.0, 0.3]),
            )
            for _ in range(40)
        ]
        texts = [generator.integers(0, width, 30).tolist() for _ in range(40)]
        sampled = sampled_of(lines, texts)
        ours, theirs = native(logits, sampled), draw_on_torch(logits.clone(), sampled, Mesh(), (0, width))
        assert torch.equal(ours[1], theirs[1])
        torch.testing.assert_close(ours[0], theirs[0], rtol=1e-12, atol=0)
