"""A checkpoint's weights are read whole and as they are meant, or refused by name before any is read."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from runtime.errors import ConfigError
from runtime.mesh.mesh import Mesh
from runtime.model.directory import load_spec
from runtime.model.loader import load_decoder
from runtime.model.weights import INDEX, SINGLE, check_weights
from tests.zoo import Runner, make_model, some_tokens

TOKENS = some_tokens(20)


def logits_of(directory: Path) -> torch.Tensor:
    return Runner(load_decoder(directory, load_spec(directory), Mesh(), torch.float32)).rows(TOKENS)


def transformers_logits(directory: Path) -> torch.Tensor:
    from transformers import AutoModelForCausalLM

    with torch.inference_mode():
        model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
        return model(torch.tensor([TOKENS])).logits[0]


def saved(directory: Path, edit: Callable[[dict[str, Any]], object] = len, variant: str = "llama", **raw: Any) -> Path:
    """A tiny model's directory, its tensors and its config.json changed."""
    make_model(variant).save_pretrained(directory)
    weights = load_file(directory / SINGLE)
    edit(weights)
    save_file(weights, directory / SINGLE, metadata={"format": "pt"})
    config = json.loads((directory / "config.json").read_text()) | raw
    (directory / "config.json").write_text(json.dumps(config))
    return directory


def sharded(directory: Path) -> list[Path]:
    """A tiny model in several files."""
    make_model("llama").save_pretrained(directory, max_shard_size="40KB")
    return sorted(directory.glob("*.safetensors"))


def refusal_of(directory: Path) -> str:
    with pytest.raises(ConfigError) as caught:
        check_weights(directory, load_spec(directory))
    with pytest.raises(ConfigError):
        logits_of(directory)
    assert "\n" not in str(caught.value)
    return str(caught.value)


HEAD, TABLE = "lm_head.weight", "model.embed_tokens.weight"
TIED: dict[str, Callable[[dict], object]] = {
    "both, and they differ": len,
    "both, and they are equal": lambda w: w.update({HEAD: w[TABLE].clone()}),
    "the embedding alone": lambda w: w.pop(HEAD),
    "the head alone": lambda w: w.pop(TABLE),
}


@pytest.mark.parametrize("name", TIED)
def test_a_tied_model_uses_the_head_that_is_there(tmp_path: Path, name: str) -> None:
    saved(tmp_path, TIED[name], tie_word_embeddings=True)
    assert (logits_of(tmp_path) - transformers_logits(tmp_path)).abs().max() < 1e-4


def test_a_bare_decoder_is_read_as_transformers_does(tmp_path: Path) -> None:
    def edit(weights: dict) -> None:
        for name in list(weights):
            weights[name.removeprefix("model.")] = weights.pop(name)
        del weights["lm_head.weight"]

    saved(tmp_path, edit, tie_word_embeddings=True)
    assert (logits_of(tmp_path) - transformers_logits(tmp_path)).abs().max() < 1e-4


def test_frequencies_left_over_do_no_harm(tmp_path: Path) -> None:
    plain = logits_of(saved(tmp_path / "plain"))
    left = {f"model.layers.{layer}.self_attn.rotary_emb.inv_freq": torch.ones(4) for layer in range(2)}
    assert torch.equal(logits_of(saved(tmp_path / "more", lambda w: w.update(left))), plain)


def put(name: str, *shape: int, dtype: torch.dtype = torch.float32) -> Callable[[dict], object]:
    return lambda weights: weights.update({name: torch.ones(shape).to(dtype)})


UP = "model.layers.1.mlp.up_proj.weight"
WRONG: dict[str, tuple[Callable[[dict], object], str]] = {
    "missing": (lambda w: w.pop(UP), f"no tensor {UP}"),
    "missing head": (lambda w: w.pop(HEAD), f"no tensor {HEAD}"),
    "shape": (put(UP, 52, 72), rf"{UP} has shape \(52, 72\), config.json asks for \(53, 72\)"),
    "axes": (put("model.norm.weight", 72, 1), r"model.norm.weight has shape \(72, 1\)"),
    "vocabulary": (put(TABLE, 102, 72), rf"{TABLE} has shape \(102, 72\)"),
    "layer": (put("model.layers.2.mlp.up_proj.weight", 53, 72), r"tensor model\.layers\.2\.mlp\.up_proj\.weight"),
    "bias": (put("model.layers.0.self_attn.q_proj.bias", 72), r"tensor model\.layers\.0\.self_attn\.q_proj\.bias"),
    "norm of heads": (put("model.layers.0.self_attn.q_norm.weight", 8), "self_attn.q_norm.weight"),
    "adapter": (put("model.layers.0.self_attn.q_proj.lora_A.weight", 4, 72), "lora_A"),
    "float8": (put(UP, 53, 72, dtype=torch.float8_e4m3fn), f"{UP} has type F8_E4M3"),
    "int8": (put(UP, 53, 72, dtype=torch.int8), f"{UP} has type I8"),
}


@pytest.mark.parametrize("name", WRONG)
def test_tensors_that_are_not_the_configs_are_named(tmp_path: Path, name: str) -> None:
    edit, said = WRONG[name]
    assert re.search(said, refusal_of(saved(tmp_path, edit)))


def test_tensors_under_another_models_prefix_are_refused(tmp_path: Path) -> None:
    def edit(weights: dict) -> None:
        for name in list(weights):
            weights[f"language_model.{name}"] = weights.pop(name)

    assert "no tensor model.embed_tokens.weight" in refusal_of(saved(tmp_path, edit))


BROKEN: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "cut": (lambda whole: whole[: len(whole) // 2], "cannot be read"),
    "cut in its head": (lambda whole: whole[:20], "cannot be read"),
    "empty": (lambda whole: b"", "is empty"),
    "pointer": (lambda whole: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "Git LFS pointer"),
    "page": (lambda whole: b"<html>no such file</html>", "cannot be read"),
}


@pytest.mark.parametrize("is_sharded", [False, True])
@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_file_is_named(tmp_path: Path, name: str, is_sharded: bool) -> None:
    change, said = BROKEN[name]
    file = sharded(tmp_path)[1] if is_sharded else saved(tmp_path) / SINGLE
    file.write_bytes(change(file.read_bytes()))
    text = refusal_of(tmp_path)
    assert file.name in text and said in text


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    file = sharded(tmp_path)[1]
    file.unlink()
    assert f"names files that are not there: {file.name}" in refusal_of(tmp_path)


def test_a_tensor_that_is_not_where_the_index_says_is_named(tmp_path: Path) -> None:
    files = sharded(tmp_path)
    index = json.loads((tmp_path / INDEX).read_text())
    name = next(name for name, place in index["weight_map"].items() if place == files[0].name)
    index["weight_map"][name] = files[1].name
    (tmp_path / INDEX).write_text(json.dumps(index))
    assert f"says that {files[1].name} has tensor {name}" in refusal_of(tmp_path)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("{", f"{INDEX} is not JSON"),
        ("[]", f"{INDEX} is not a JSON object"),
        ("{}", "no weight_map"),
        ('{"weight_map": []}', "no weight_map"),
        ('{"weight_map": {}}', "no weight_map"),
        ('{"weight_map": {"a": 1}}', "no weight_map"),
        ('{"weight_map": {"a": "../b.safetensors"}}', "no file beside it"),
        ("", f"{INDEX} is empty"),
    ],
)
def test_a_broken_index_is_named(tmp_path: Path, content: str, said: str) -> None:
    sharded(tmp_path)
    (tmp_path / INDEX).write_text(content)
    assert said in refusal_of(tmp_path)


def test_of_several_copies_the_indexs_is_read(tmp_path: Path) -> None:
    sharded(tmp_path)
    expected = logits_of(tmp_path)
    other = saved(tmp_path / "other", lambda weights: [tensor.mul_(2) for tensor in weights.values()])
    for name in (SINGLE, "consolidated.safetensors", "pytorch_model.bin"):
        (tmp_path / name).write_bytes((other / SINGLE).read_bytes())
    assert torch.equal(logits_of(tmp_path), expected)
    (tmp_path / INDEX).unlink()
    assert torch.equal(logits_of(tmp_path), logits_of(other))


def test_weights_in_another_format_are_named(tmp_path: Path) -> None:
    (saved(tmp_path) / SINGLE).rename(tmp_path / "pytorch_model.bin")
    text = refusal_of(tmp_path)
    assert "neither model.safetensors nor" in text and "only pytorch_model.bin" in text


def test_an_adapter_beside_the_weights_is_refused(tmp_path: Path) -> None:
    (saved(tmp_path) / "adapter_config.json").write_text("{}")
    assert "LoRA adapter" in refusal_of(tmp_path)
