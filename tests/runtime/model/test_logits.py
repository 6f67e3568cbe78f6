"""The decoder computes what Hugging Face computes, however the rows are cut into steps."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from runtime.mesh.mesh import Mesh
from runtime.model.directory import load_spec, resolve_model
from runtime.model.loader import load_decoder
from tests.zoo import TRAINED, VARIANTS, Runner, make_model, some_tokens

TOLERANCE = 1e-4
PLAIN = [name for name in VARIANTS if "dynamic" not in name]


def both(tmp_path: Path, variant: str, dtype: torch.dtype = torch.float32):
    """The Hugging Face model, and our decoder loaded from its checkpoint."""
    model = make_model(variant)
    model.save_pretrained(tmp_path)
    return model, load_decoder(tmp_path, load_spec(tmp_path), Mesh(), dtype)


@torch.inference_mode()
def reference(model, tokens: list[int]) -> torch.Tensor:
    return model(torch.tensor([tokens])).logits[0].float()


def difference(one: torch.Tensor, other: torch.Tensor) -> float:
    assert one.shape == other.shape
    return (one - other).abs().max().item()


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_equal_hugging_face(tmp_path: Path, variant: str) -> None:
    model, decoder = both(tmp_path, variant)
    tokens = some_tokens(TRAINED + 24)
    expected = reference(model, tokens)
    assert expected.std() > 0.1
    assert difference(Runner(decoder).rows(tokens, rope_length=len(tokens)), expected) < TOLERANCE


@pytest.mark.parametrize("variant", PLAIN)
def test_chunks_and_tree_rows_equal_plain_sequences(tmp_path: Path, variant: str) -> None:
    """Two sequences are prefilled in uneven chunks; then one step carries a random tree on each."""
    model, decoder = both(tmp_path, variant)
    runner = Runner(decoder, num_slots=2)
    prompts = [some_tokens(23, seed=1), some_tokens(6, seed=2)]
    for start, stop in ((0, 1), (1, 14), (14, 23)):
        last = runner.extend(prompts[0][start:stop], slot=0, rope_length=23)
    assert difference(last, reference(model, prompts[0])[14:]) < TOLERANCE
    runner.extend(prompts[1], slot=1, rope_length=6)

    rng = np.random.default_rng(3)
    sizes = (14, 9)
    tokens = some_tokens(sum(sizes), seed=4)
    slots = [1] * sizes[0] + [0] * sizes[1]  # order of slots in a step is free
    parents = [int(rng.integers(-1, i)) for i in range(sizes[0])]
    parents += [-1 if (drawn := int(rng.integers(-1, i))) < 0 else drawn + sizes[0] for i in range(sizes[1])]
    logits = runner.rows(tokens, parents, slots)
    for row, slot in enumerate(slots):
        path, ancestor = [], row
        while ancestor >= 0:
            path.append(tokens[ancestor])
            ancestor = parents[ancestor]
        expected = reference(model, prompts[slot] + path[::-1])[-1]
        assert difference(logits[row], expected) < TOLERANCE, f"row {row}"


@pytest.mark.parametrize("variant", ["llama", "mistral-window", "qwen3-bias-window"])
def test_committed_tree_path_continues_like_a_plain_sequence(tmp_path: Path, variant: str) -> None:
    model, decoder = both(tmp_path, variant)
    runner = Runner(decoder)
    prompt = some_tokens(11, seed=5)
    runner.extend(prompt)
    runner.rows([3, 50, 60, 4, 61, 5], parents=[-1, 0, 0, 1, 2, 3])
    runner.commit([0, 1, 3, 5], [3, 50, 4, 5])
    accepted = [3, 50, 4, 5]
    logits = runner.rows([8, 9])
    assert difference(logits, reference(model, prompt + accepted + [8, 9])[-2:]) < TOLERANCE


@pytest.mark.parametrize("num_prompt", [5, TRAINED, TRAINED + 9])
def test_dynamic_rope_follows_hugging_face_generate(tmp_path: Path, num_prompt: int) -> None:
    """Hugging Face stretches the base as the cache grows past the trained length; keys keep their rotation."""
    model, decoder = both(tmp_path, "llama-rope-dynamic")
    runner = Runner(decoder)
    tokens = some_tokens(TRAINED + 20)
    ours = [runner.extend(tokens[:num_prompt], rope_length=num_prompt)[-1]]
    theirs = []
    with torch.inference_mode():
        out = model(torch.tensor([tokens[:num_prompt]]), use_cache=True)
        theirs.append(out.logits[0, -1])
        for token in tokens[num_prompt:]:
            ours.append(runner.extend([token], rope_length=num_prompt)[-1])
            out = model(torch.tensor([[token]]), past_key_values=out.past_key_values, use_cache=True)
            theirs.append(out.logits[0, -1])
    assert difference(torch.stack(ours), torch.stack(theirs)) < TOLERANCE
    if num_prompt == TRAINED:  # the case tells something only if the base matters
        assert difference(torch.stack(ours)[-1], reference(model, tokens)[-1]) > 10 * TOLERANCE


def test_dynamic_rope_does_not_depend_on_rows_per_step(tmp_path: Path) -> None:
    _, decoder = both(tmp_path, "qwen3-rope-dynamic")
    tokens = some_tokens(TRAINED + 20)
    num_prompt = TRAINED - 3
    single, chunked = Runner(decoder), Runner(decoder)
    one_by_one = [single.extend(tokens[:num_prompt], rope_length=num_prompt)]
    one_by_one += [single.extend([token], rope_length=num_prompt) for token in tokens[num_prompt:]]
    cuts = (0, 4, num_prompt, num_prompt + 11, len(tokens))
    in_chunks = [chunked.extend(tokens[a:b], rope_length=num_prompt) for a, b in zip(cuts, cuts[1:], strict=False)]
    assert difference(torch.cat(one_by_one), torch.cat(in_chunks)) < 1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("variant", ["llama", "qwen3"])
def test_half_precision_is_as_close_as_hugging_face(tmp_path: Path, variant: str, dtype: torch.dtype) -> None:
    model, decoder = both(tmp_path, variant, dtype)
    tokens = some_tokens(30)
    exact = reference(model, tokens)
    theirs = (reference(model.to(dtype), tokens) - exact).square().mean().sqrt()
    ours = (Runner(decoder).rows(tokens) - exact).square().mean().sqrt()
    assert 0 < ours < 1.5 * theirs


def test_float64_agrees_with_float32(tmp_path: Path) -> None:
    model, decoder = both(tmp_path, "qwen2", torch.float64)
    tokens = some_tokens(30)
    logits = Runner(decoder).rows(tokens)
    assert logits.dtype == torch.float64
    assert difference(logits.float(), reference(model, tokens)) < TOLERANCE


@pytest.mark.slow
def test_embedded_model_rows_are_bit_identical_in_steps_of_any_size() -> None:
    """A chain decoded one row at a time, each row run as two, and as the first branch of trees of 5, 17 and 64 rows."""
    directory = resolve_model(None)
    decoder = load_decoder(directory, load_spec(directory), Mesh(), torch.float32)
    prompt, chain = some_tokens(40, seed=1), some_tokens(64, seed=2)
    runner = Runner(decoder)
    runner.extend(prompt)
    singles = []
    for token in chain:
        singles.append(runner.rows([token, token], parents=[-1, -1])[0])
        runner.commit([0], [token])
    rng = np.random.default_rng(3)
    for count in (5, 17, 64):
        for depth in (3, count):
            runner = Runner(decoder)
            runner.extend(prompt)
            parents = [*range(-1, depth - 1), *(int(rng.integers(-1, row)) for row in range(depth, count))]
            rows = runner.rows(chain[:depth] + some_tokens(count - depth, seed=4), parents)
            for row in range(depth):
                assert torch.equal(rows[row], singles[row]), f"row {row} of {depth} in a step of {count}"
