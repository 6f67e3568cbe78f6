"""A GGUF file is run as it is meant, or refused by name before anything is written."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch

from runtime.errors import ConfigError
from runtime.mesh.mesh import Mesh
from runtime.model.directory import load_spec, resolve_model
from runtime.model.gguf import converted
from runtime.model.loader import load_decoder
from runtime.tokenizer import Tokenizer
from tests.runtime.model.gguf_files import VOCABULARY, gguf_model, symbols, write_gguf
from tests.zoo import Runner

PROMPT = [(7 * place + place * place // 3) % 256 for place in range(100)]  # beyond the trained 64
F32 = gguf.GGMLQuantizationType.F32


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("OUTRIDER_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def is_same(directory: Path, model: Any) -> bool:
    """Whether a converted file computes what the Hugging Face model does."""
    decoder = load_decoder(directory, load_spec(directory), Mesh(), torch.float32)
    with torch.inference_mode():
        expected = model(torch.tensor([PROMPT])).logits[0]
    return bool((Runner(decoder, max_staged=len(PROMPT)).rows(PROMPT) - expected).abs().max() < 1e-3)


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q8_0", "Q4_0", "Q5_1"])
def test_every_type_is_read_exactly(tmp_path: Path, kind: str) -> None:
    model = gguf_model()
    assert is_same(converted(write_gguf(tmp_path / "tiny.gguf", model, kind=kind)), model)


@pytest.mark.parametrize(
    "variant", ["llama", "llama-tied", "llama-attention_bias", "llama-mlp_bias", "qwen2", "qwen3", "qwen3-bias-window"]
)
def test_every_architecture_is_read_exactly(tmp_path: Path, variant: str) -> None:
    model = gguf_model(variant, **({"use_sliding_window": False} if variant.startswith("qwen3") else {}))
    directory = converted(write_gguf(tmp_path / "tiny.gguf", model))
    assert is_same(directory, model)
    assert load_spec(directory).tie_embeddings == (variant == "llama-tied")


@pytest.mark.parametrize(("layers", "scalar"), [(7, 16), (62, 64 // 4)])
def test_a_gemma_3_is_read_exactly(tmp_path: Path, layers: int, scalar: int) -> None:
    """Norms' weights are stored with 1 added, each sixth layer sees everything and has its own rotation."""

    def edit(values: dict, tensors: dict) -> None:
        values |= {"gemma3.attention.sliding_window": 24, "gemma3.rope.freq_base": 1e6}

    types = ["full_attention" if layer % 6 == 5 else "sliding_attention" for layer in range(layers)]
    settings = {"num_hidden_layers": layers, "layer_types": types, "sliding_window": 24}
    model = gguf_model("gemma3", **settings, query_pre_attn_scalar=scalar)
    directory = converted(write_gguf(tmp_path / "tiny.gguf", model, edit))
    assert is_same(directory, model)
    spec = load_spec(directory)
    assert spec.tie_embeddings and spec.sliding_windows[5] is None and spec.sliding_windows[6] == 24


def test_heads_of_another_size_are_read(tmp_path: Path) -> None:
    def edit(values: dict, tensors: dict) -> None:
        values |= {f"llama.{key}": 32 for key in ("attention.key_length", "attention.value_length")}
        values["llama.rope.dimension_count"] = 32

    model = gguf_model(head_dim=32)
    assert is_same(converted(write_gguf(tmp_path / "tiny.gguf", model, edit)), model)


SCALINGS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "none": ({"rope.scaling.type": "none", "rope.scaling.factor": 4.0}, {"rope_type": "default"}),
    "linear": ({"rope.scaling.type": "linear", "rope.scaling.factor": 4.0}, {"rope_type": "linear", "factor": 4.0}),
    "linear by its old key": ({"rope.scale_linear": 4.0}, {"rope_type": "linear", "factor": 4.0}),
    "yarn": (
        {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0, "rope.scaling.original_context_length": 16},
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
    ),
    "yarn with its parameters": (
        {
            "rope.scaling.type": "yarn",
            "rope.scaling.factor": 4.0,
            "rope.scaling.original_context_length": 16,
            "rope.scaling.yarn_beta_fast": 8.0,
            "rope.scaling.yarn_beta_slow": 2.0,
            "rope.scaling.attn_factor": 0.5,
        },
        {
            "rope_type": "yarn",
            "factor": 4.0,
            "original_max_position_embeddings": 16,
            "beta_fast": 8.0,
            "beta_slow": 2.0,
            "attention_factor": 0.5 * (1 + 0.1 * np.log(4.0)),
        },
    ),
}


@pytest.mark.parametrize("name", SCALINGS)
def test_rope_scaling_is_kept(tmp_path: Path, name: str) -> None:
    stored, parameters = SCALINGS[name]
    model = gguf_model(rope_parameters={"rope_theta": 1e4, **parameters})

    def edit(values: dict, tensors: dict) -> None:
        values |= {f"llama.{key}": value for key, value in stored.items()}

    assert is_same(converted(write_gguf(tmp_path / "tiny.gguf", model, edit)), model)


@pytest.mark.parametrize("factor", [1.0, 4.0])
def test_frequencies_of_llama_3_are_kept(tmp_path: Path, factor: float) -> None:
    llama3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    rope = {"rope_theta": 1e4, **llama3, "original_max_position_embeddings": 64}
    model = gguf_model(rope_parameters=rope)
    plain = 1e4 ** (-torch.arange(0, 16, 2) / 16)
    divisors = np.float32(plain / model.model.rotary_emb.inv_freq)
    model.model.rotary_emb.inv_freq /= factor

    def edit(values: dict, tensors: dict) -> None:
        tensors["rope_freqs.weight"] = (divisors, F32)
        values["llama.rope.scaling.factor"] = factor

    directory = converted(write_gguf(tmp_path / "tiny.gguf", model, edit))
    assert is_same(directory, model)
    from transformers import AutoModelForCausalLM

    assert is_same(directory, AutoModelForCausalLM.from_pretrained(directory).eval())


def test_a_window_is_kept(tmp_path: Path) -> None:
    model = gguf_model("mistral-window")

    def edit(values: dict, tensors: dict) -> None:
        values["llama.attention.sliding_window"] = 7

    directory = converted(write_gguf(tmp_path / "tiny.gguf", model, edit, architecture="llama"))
    assert is_same(directory, model) and load_spec(directory).sliding_windows == (7, 7)


@pytest.mark.parametrize("named", [0, 1, 2])
def test_a_split_file_is_read_whole_whichever_part_is_named(tmp_path: Path, named: int) -> None:
    model = gguf_model()
    write_gguf(tmp_path / "tiny.gguf", model, parts=3)
    files = sorted(tmp_path.glob("*.gguf"))
    directory = resolve_model(str(files[named]))
    assert is_same(directory, model) and directory == converted(files[0])


@pytest.mark.parametrize("lost", [0, 2])
def test_a_missing_part_is_named(tmp_path: Path, cache: Path, lost: int) -> None:
    write_gguf(tmp_path / "tiny.gguf", gguf_model(), parts=3)
    files = sorted(tmp_path.glob("*.gguf"))
    files[lost].unlink()
    with pytest.raises(ConfigError, match=f"missing: {files[lost].name}"):
        resolve_model(str(files[1]))
    assert not list(cache.rglob("*tiny*"))


def test_parts_that_do_not_belong_together_are_refused(tmp_path: Path) -> None:
    write_gguf(tmp_path / "tiny.gguf", gguf_model(), parts=3)
    files = sorted(tmp_path.glob("*.gguf"))
    files[2].write_bytes(files[1].read_bytes())
    with pytest.raises(ConfigError, match=rf"{files[2].name} is not part 3 of 3"):
        converted(files[0])
    files[0].rename(tmp_path / "renamed.gguf")
    with pytest.raises(ConfigError, match="is part 1 of 3, but its name does not say so"):
        converted(tmp_path / "renamed.gguf")


def test_all_kinds_of_end_tokens_end_a_text(tmp_path: Path) -> None:
    def edit(values: dict, tensors: dict) -> None:
        values |= {"tokenizer.ggml.eot_token_id": 260, "tokenizer.ggml.eom_token_id": 258}

    directory = converted(write_gguf(tmp_path / "tiny.gguf", gguf_model(), edit))
    assert load_spec(directory).eos_token_ids == (258, 260, 261)


@pytest.mark.parametrize("begins", [None, True, False])
@pytest.mark.parametrize(("cut", "by_default"), [("gpt-2", False), ("llama-bpe", True)])
def test_a_text_begins_with_a_token_where_the_file_says_so(
    tmp_path: Path, begins: bool | None, cut: str, by_default: bool
) -> None:
    def edit(values: dict, tensors: dict) -> None:
        values |= {"tokenizer.ggml.bos_token_id": 256, "tokenizer.ggml.pre": cut}
        if begins is not None:
            values["tokenizer.ggml.add_bos_token"] = begins

    tokenizer = Tokenizer(converted(write_gguf(tmp_path / "tiny.gguf", gguf_model(), edit)))
    assert tokenizer.encode("hi") == [256, *b"hi"][0 if (by_default if begins is None else begins) else 1 :]


def test_special_tokens_and_the_chat_template_are_kept(tmp_path: Path) -> None:
    odd, digits = "<\uff5cUser\uff5c>", "<think>"

    def edit(values: dict, tensors: dict) -> None:
        values["tokenizer.ggml.tokens"][256:258] = [odd, digits]  # the first in letters that no byte is written with
        values["tokenizer.ggml.token_type"][257] = 4
        values["tokenizer.chat_template"] = "{% for m in messages %}" + odd + "{{ m['content'] }}{% endfor %}"

    tokenizer = Tokenizer(converted(write_gguf(tmp_path / "tiny.gguf", gguf_model(), edit)))
    assert tokenizer.encode_chat([{"role": "user", "content": "a<think>"}]) == [256, ord("a"), 257]
    assert tokenizer.decode([256, ord("a"), 257]) == "a<think>"


@pytest.mark.parametrize("prefixed", [True, False])
def test_a_sentencepiece_vocabulary_is_read(tmp_path: Path, prefixed: bool) -> None:
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "\u2581", "a", "\u2581a"]

    def edit(values: dict, tensors: dict) -> None:
        values |= {
            "tokenizer.ggml.model": "llama",
            "tokenizer.ggml.tokens": pieces,
            "tokenizer.ggml.scores": [-float(index) for index in range(len(pieces))],
            "tokenizer.ggml.token_type": [2, 3, 3, *[6] * 256, 1, 1, 1],
            "tokenizer.ggml.bos_token_id": 1,
            "tokenizer.ggml.eos_token_id": 2,
            "tokenizer.ggml.add_space_prefix": prefixed,
        }
        del values["tokenizer.ggml.merges"]

    tokenizer = Tokenizer(converted(write_gguf(tmp_path / "tiny.gguf", gguf_model(), edit)))
    ids = tokenizer.encode("a a\u00e9")
    assert ids == [1, 261 if prefixed else 260, 261, 3 + 0xC3, 3 + 0xA9]
    assert tokenizer.decode(ids) == "a a\u00e9"


def drop(name: str) -> Callable[[dict, dict], object]:
    return lambda values, tensors: (values if name in values else tensors).pop(name)


def put(name: str, value: Any) -> Callable[[dict, dict], object]:
    return lambda values, tensors: values.update({name: value})


def add(name: str, *shape: int) -> Callable[[dict, dict], object]:
    return lambda values, tensors: tensors.update({name: (np.ones(shape, np.float32), F32)})


REFUSALS: dict[str, tuple[Callable[[dict, dict], object], str]] = {
    "longrope": (put("llama.rope.scaling.type", "longrope"), r"rope\.scaling\.type = 'longrope'"),
    "longrope's factors": (add("rope_factors_long.weight", 8), "rope_factors_long.weight"),
    "partial rotation": (put("llama.rope.dimension_count", 8), r"rope\.dimension_count = 8"),
    "values of another size": (put("llama.attention.value_length", 8), r"attention\.value_length = 8"),
    "factor below 0": (put("llama.rope.scaling.factor", -2.0), r"rope\.scaling\.factor = -2\.0"),
    "experts": (put("llama.expert_count", 8), "expert_count = 8"),
    "scaled logits": (put("llama.logit_scale", 2.0), "logit_scale = 2.0"),
    "unknown key": (put("llama.attention.novelty", 1), "attention.novelty"),
    "heads by layer": (put("llama.attention.head_count_kv", [2, 1]), "differs from layer to layer"),
    "missing key": (drop("llama.block_count"), "block_count is missing"),
    "missing tensor": (drop("blk.1.ffn_up.weight"), r"model\.layers\.1\.mlp\.up_proj\.weight"),
    "missing embedding": (drop("token_embd.weight"), "token_embd.weight"),
    "unknown tensor": (add("blk.0.attn_sinks.weight", 4), "blk.0.attn_sinks.weight"),
    "layers beyond": (put("llama.block_count", 1), r"model\.layers\.1\."),
    "half of the biases": (add("blk.0.attn_q.bias", 64), r"model\.layers\.0\.self_attn\.k_proj\.bias"),
    "end token": (put("tokenizer.ggml.eos_token_id", 5000), "eos_token_id = 5000"),
    "tokenizer": (put("tokenizer.ggml.model", "bert"), "tokenizer.ggml.model = 'bert'"),
    "cut": (put("tokenizer.ggml.pre", "chatglm-bpe"), "tokenizer.ggml.pre = 'chatglm-bpe'"),
    "token types": (put("tokenizer.ggml.token_type", 1), "tokenizer.ggml.token_type"),
    "cut that is no name": (put("tokenizer.ggml.pre", ["llama3"]), r"tokenizer.ggml.pre = \['llama3'\]"),
    "a switch that is a text": (put("tokenizer.ggml.add_bos_token", "false"), "add_bos_token = 'false' is neither"),
    "unknown token": (put("tokenizer.ggml.unknown_token_id", 5000), "unknown_token_id = 5000"),
    "a part that is a text": (put("split.count", "2"), "split.count = '2' is not a whole number"),
    "layers without end": (put("llama.block_count", 2**31), "num_hidden_layers = 2147483648 is more than"),
    "too many tokens": (put("tokenizer.ggml.tokens", [*symbols(), *map(str, range(10, 30))]), "276 tokens"),
    "integers": (
        lambda values, tensors: tensors.update({"output_norm.weight": (np.ones(64, np.int8), None)}),
        "output_norm.weight has type I8",
    ),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_what_cannot_be_run_is_named_before_anything_is_written(tmp_path: Path, cache: Path, name: str) -> None:
    edit, said = REFUSALS[name]

    def typed(values: dict, tensors: dict) -> None:
        edit(values, tensors)
        if "tokens" in name:
            values["tokenizer.ggml.token_type"] = [1] * len(values["tokenizer.ggml.tokens"])

    file = write_gguf(tmp_path / "tiny.gguf", gguf_model(), typed)
    with pytest.raises(ConfigError, match=said) as caught:
        resolve_model(str(file))
    assert caught.value.field in ("model.path", "config.json") and "\n" not in str(caught.value)
    assert not [path for path in cache.rglob("*tiny*") if path.is_dir()]


@pytest.mark.parametrize("kept", [0, 3, 20, 300, 20_000, -1])
def test_a_file_that_ends_early_is_refused(tmp_path: Path, kept: int) -> None:
    file = write_gguf(tmp_path / "tiny.gguf", gguf_model())
    file.write_bytes(file.read_bytes()[: kept if kept >= 0 else -5000])
    with pytest.raises(ConfigError, match="tiny.gguf.*(is empty|no whole GGUF file)"):
        converted(file)


def test_files_that_are_no_gguf_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "tiny.gguf"
    write_gguf(file, gguf_model())
    whole = file.read_bytes()
    key, nine = (1).to_bytes(8, "little") + b"a", (9).to_bytes(4, "little")
    cases = {
        b"version https://git-lfs.github.com/spec/v1\noid sha256:0": "is a Git LFS pointer",
        b"<html>" + whole: "does not begin with GGUF",
        b"GGUF" + (3).to_bytes(4, "big") + whole[8:]: "big-endian",
        b"GGUF" + (9).to_bytes(4, "little") + whole[8:]: "GGUF version 9",
        whole[:16] + b"\xff" * 8 + whole[24:]: "no whole GGUF file",
        whole[:16] + (2).to_bytes(8, "little") + 2 * (key + (7).to_bytes(4, "little") + b"\1"): "the key a twice",
        whole[:16] + (1).to_bytes(8, "little") + key + nine + 5000 * (nine + (1).to_bytes(8, "little")): "array",
    }
    for content, said in cases.items():
        file.write_bytes(content)
        with pytest.raises(ConfigError, match=said):
            converted(file)


def test_other_content_under_the_same_name_is_converted_anew(tmp_path: Path) -> None:
    file, times = tmp_path / "tiny.gguf", (1_700_000_000, 1_700_000_000)
    places = []
    for seed in range(2):
        model = gguf_model()
        with torch.no_grad():
            model.model.embed_tokens.weight.mul_(1 + seed)
        write_gguf(file, model)
        os.utime(file, times)
        places.append(converted(file))
        assert is_same(places[-1], model)
    assert places[0] != places[1]


def test_a_vocabulary_smaller_than_the_embedding_is_read(tmp_path: Path) -> None:
    def edit(values: dict, tensors: dict) -> None:
        for key in ("tokens", "token_type"):
            values[f"tokenizer.ggml.{key}"] = values[f"tokenizer.ggml.{key}"][:-2]
        values["tokenizer.ggml.eos_token_id"] = 259

    model = gguf_model()
    directory = converted(write_gguf(tmp_path / "tiny.gguf", model, edit))
    assert is_same(directory, model)
    assert Tokenizer(directory).vocab_size == 260 and load_spec(directory).vocab_size == VOCABULARY
    assert json.loads((directory / "generation_config.json").read_text())["eos_token_id"] == [259]


@pytest.mark.parametrize("name", ["tiny.GGUF", "sha256-0123", f"{'x' * 240}.gguf"])
def test_a_file_is_known_by_how_it_begins_whatever_its_name(tmp_path: Path, name: str) -> None:
    model = gguf_model()
    write_gguf(tmp_path / "tiny", model)
    (tmp_path / "tiny").rename(tmp_path / name)
    assert is_same(resolve_model(str(tmp_path / name)), model)
