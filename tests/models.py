"""Tiny random models with a byte-level tokenizer, saved as a Hugging Face directory."""

from __future__ import annotations

from pathlib import Path

import torch

CHAT_TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def save_tiny_model(directory: Path, seed: int = 0, architecture: str = "Llama", **overrides) -> Path:
    """A random model of 9 query and 3 KV heads (nothing divides), vocabulary 262, in float32.

    Its end token is 261, that of the tokenizer; with a smaller vocabulary it has none.
    """
    import transformers

    settings = dict(
        vocab_size=262,
        hidden_size=72,
        intermediate_size=100,
        num_hidden_layers=3,
        num_attention_heads=9,
        num_key_value_heads=3,
        head_dim=8,
        max_position_embeddings=512,
        initializer_range=0.15,
        bos_token_id=None,
        tie_word_embeddings=False,
    )
    settings |= overrides
    settings.setdefault("eos_token_id", 261 if settings["vocab_size"] > 261 else None)
    suffix = "TextConfig" if architecture == "Gemma3" else "Config"
    config = getattr(transformers, f"{architecture}{suffix}")(**settings)
    torch.manual_seed(seed)
    model = getattr(transformers, f"{architecture}ForCausalLM")(config).float()
    model.save_pretrained(directory)
    save_byte_tokenizer(directory)
    return directory


def save_byte_tokenizer(directory: Path) -> None:
    """One token per byte (ids 0..255), then the chat roles, padding and the end token (id 261)."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    bpe = Tokenizer(models.BPE(vocab={symbol: index for index, symbol in enumerate(alphabet)}, merges=[]))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    special = ["<|system|>", "<|user|>", "<|assistant|>", "<|tool|>", "<|pad|>", "<|end|>"]
    bpe.add_special_tokens(special)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<|end|>", pad_token="<|pad|>")
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(directory)
