"""Models with random weights, made where they run, and sequences on them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from runtime.config import Config
from runtime.mesh.mesh import Mesh
from runtime.model.attention import RowBatch
from runtime.model.decoder import Decoder, DecoderLayer
from runtime.model.layers import GatedMLP, Linear, RMSNorm, RowParallelLinear, VocabParallelEmbedding
from runtime.model.rotary import Rotary
from runtime.model.shard import HeadShard
from runtime.model.spec import ModelSpec, RopeSpec
from runtime.retention import layer_groups


def spec_of(
    num_layers: int,
    hidden: int,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    intermediate: int,
    vocabulary: int,
    max_positions: int = 16384,
) -> ModelSpec:
    """A Llama of these sizes."""
    frequencies = tuple(5e5 ** (-pair / head_dim) for pair in range(0, head_dim, 2))
    return ModelSpec(
        architecture="LlamaForCausalLM",
        num_layers=num_layers,
        hidden_size=hidden,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        intermediate_size=intermediate,
        vocab_size=vocabulary,
        rms_eps=1e-5,
        tie_embeddings=False,
        qkv_bias=False,
        o_bias=False,
        mlp_bias=False,
        qk_norm=False,
        sliding_windows=(None,) * num_layers,
        max_positions=max_positions,
        eos_token_ids=(),
        activation="silu",
        rope=RopeSpec(frequencies),
    )


SHAPES = {
    "1B": spec_of(16, 2048, 32, 8, 64, 8192, 128256),
    "8B": spec_of(32, 4096, 32, 8, 128, 14336, 128256),
}
"""Llama 3.2 and 3.1."""
SMALL = spec_of(2, 512, 8, 2, 128, 1024, 2048)
TINY = spec_of(2, 32, 4, 2, 8, 48, 64)


def random_decoder(
    spec: ModelSpec, device: torch.device, dtype: torch.dtype, seed: int = 0, bits: torch.dtype | None = None
) -> Decoder:
    """Weights drawn on the device, so that activations keep their size from layer to layer. `bits`: values that this
    narrower type has, too."""
    generator = torch.Generator(device).manual_seed(seed)

    def weight(rows: int, columns: int) -> torch.Tensor:
        drawn = torch.empty(rows, columns, dtype=dtype, device=device)
        drawn.normal_(0, columns**-0.5, generator=generator)
        return drawn if bits is None else drawn.to(bits).to(dtype)

    def norm(size: int) -> RMSNorm:
        return RMSNorm(torch.ones(size, dtype=dtype, device=device), spec.rms_eps)

    mesh, size, dim = Mesh(device=device), spec.hidden_size, spec.head_dim
    layers = []
    for _ in range(spec.num_layers):
        gate_up = Linear(weight(2 * spec.intermediate_size, size))
        down = RowParallelLinear(weight(size, spec.intermediate_size), None, mesh)
        qkv = Linear(weight((spec.num_heads + 2 * spec.num_kv_heads) * dim, size))
        output = RowParallelLinear(weight(size, spec.num_heads * dim), None, mesh)
        mlp = GatedMLP(gate_up, down, spec.activation)
        layers.append(DecoderLayer(norm(size), qkv, None, output, norm(size), mlp, None))
    return Decoder(
        spec=spec,
        mesh=mesh,
        dtype=dtype,
        heads=HeadShard.of(spec.num_heads, spec.num_kv_heads, 0, 1),
        vocab_range=(0, spec.vocab_size),
        embedding=VocabParallelEmbedding(weight(spec.vocab_size, size), 0, mesh),
        layers=tuple(layers),
        norm=norm(size),
        head=Linear(weight(spec.vocab_size, size)),
        rotary=Rotary(spec.rope, device),
    )


def converted(decoder: Decoder, device: torch.device, dtype: torch.dtype) -> Decoder:
    """The same weights elsewhere, in another type."""

    def norm(given: RMSNorm) -> RMSNorm:
        weight = given.weight if given.narrow else given.weight / given.root
        return RMSNorm(weight.to(device, dtype), decoder.spec.rms_eps)

    def linear(given: Linear) -> Linear:
        assert not given.packed
        return Linear(given.weight.to(device, dtype))

    mesh = Mesh(device=device)
    layers = tuple(
        replace(
            layer,
            attention_norm=norm(layer.attention_norm),
            qkv=linear(layer.qkv),
            output=RowParallelLinear(layer.output.linear.weight.to(device, dtype), None, mesh),
            mlp_norm=norm(layer.mlp_norm),
            mlp=GatedMLP(
                linear(layer.mlp.gate_up),
                RowParallelLinear(layer.mlp.down.linear.weight.to(device, dtype), None, mesh),
                decoder.spec.activation,
            ),
        )
        for layer in decoder.layers
    )
    table = decoder.embedding.table[:-1].to(device, dtype)
    return replace(
        decoder,
        mesh=mesh,
        dtype=dtype,
        embedding=VocabParallelEmbedding(table, 0, mesh),
        layers=layers,
        norm=norm(decoder.norm),
        head=linear(decoder.head),
        rotary=Rotary(decoder.spec.rope, device),
    )


class Running:
    """Sequences of a decoder under a cache policy."""

    def __init__(
        self,
        decoder: Any,
        cache: Mapping[str, Any],
        num_slots: int = 1,
        max_rows: int = 512,
        max_positions: int | None = None,
    ) -> None:
        self.decoder = decoder
        spec = decoder.spec
        groups = layer_groups(
            Config.from_dict({"cache": cache}).cache, spec.num_layers, max_positions or spec.max_positions
        )
        self.caches = decoder.make_caches(groups, num_slots, max_staged=max_rows)

    @property
    def room(self) -> int:
        """Tokens that the next step may have behind those of slot 0."""
        kept = self.caches[0].retained[0]
        return kept.horizon - kept.length

    def batch(self, tokens: Sequence[int], parents: Sequence[int], slots: Sequence[int] | None = None) -> RowBatch:
        """Rows behind what is committed."""
        slots = [0] * len(tokens) if slots is None else slots
        positions: list[int] = []
        for parent, slot in zip(parents, slots, strict=True):
            positions.append(self.caches[0].retained[slot].length if parent < 0 else positions[parent] + 1)
        none = np.zeros(len(tokens), np.int64)
        columns = np.array(tokens), np.array(positions), np.array(parents), np.array(slots), none
        return RowBatch.build(*columns, self.decoder.batch_device)

    def logits(self, tokens: Sequence[int], parents: Sequence[int], slots: Sequence[int] | None = None) -> torch.Tensor:
        """[T, V]"""
        hidden = self.decoder.forward(self.batch(tokens, parents, slots), self.caches)
        return self.decoder.logits(hidden).clone()

    def chosen(self, tokens: Sequence[int], parents: Sequence[int], slots: Sequence[int] | None = None) -> list[int]:
        """The likeliest token behind each row."""
        batch = self.batch(tokens, parents, slots)
        found = self.decoder.step(batch, self.caches, np.arange(len(tokens), dtype=np.int64), 0)
        return found[:, 0].tolist()

    def commit(self, rows: Sequence[int], tokens: Sequence[int], slot: int = 0) -> None:
        """Rows of the last step, whose tokens these are."""
        for cache in self.caches:
            cache.commit(slot, list(rows), list(tokens))

    def read(self, tokens: Sequence[int], chunk: int, slot: int = 0) -> None:
        """A prompt, in steps of at most `chunk` rows."""
        tokens = list(tokens)
        while tokens:
            kept = self.caches[0].retained[slot]
            part = tokens[: min(chunk, kept.horizon - kept.length)]
            self.decoder.forward(self.batch(part, list(range(-1, len(part) - 1)), [slot] * len(part)), self.caches)
            self.commit(range(len(part)), part, slot)
            tokens = tokens[len(part) :]

    def fill(self, count: int, slot: int = 0) -> None:
        """`count` tokens with random keys and values enter the cache."""
        for cache in self.caches:
            left = count
            while left:
                part = min(left, 512)
                block = cache.empty_block(part).normal_()
                cache.append(slot, block, [1] * part)
                left -= part


def random_tokens(count: int, vocabulary: int, seed: int) -> list[int]:
    return np.random.default_rng(seed).integers(0, vocabulary, count).tolist()


def random_tree(count: int, seed: int) -> list[int]:
    """Parents: every row hangs on an earlier one."""
    rng = np.random.default_rng(seed)
    return [-1, *(int(rng.integers(max(0, row - 8), row)) for row in range(1, count))]


def save_random_model(directory: Path, is_tiny: bool) -> Path:
    """A random Llama with a byte tokenizer, as a Hugging Face directory, for what reads such."""
    import transformers
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    size = 32 if is_tiny else 256
    config = transformers.LlamaConfig(
        vocab_size=264,
        hidden_size=size,
        intermediate_size=2 * size,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=size // 4,
        max_position_embeddings=2048,
        initializer_range=0.15,
        bos_token_id=None,
        eos_token_id=None,
        tie_word_embeddings=False,
    )
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(config).save_pretrained(directory)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    bpe = Tokenizer(models.BPE(vocab={symbol: index for index, symbol in enumerate(alphabet)}, merges=[]))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    transformers.PreTrainedTokenizerFast(tokenizer_object=bpe).save_pretrained(directory)
    return directory
