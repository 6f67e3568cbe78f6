"""A GGUF file's vocabulary as a tokenizer of the `tokenizers` library.

How text is cut before merging (`tokenizer.ggml.pre`) is known by name only; an unknown name is refused, since a wrong
cut gives other tokens than the model was trained on, and nobody would notice.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from runtime.errors import ConfigError
from runtime.model.gguf_file import GGUFFile, refused

if TYPE_CHECKING:
    from tokenizers import Tokenizer

CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
LLAMA3 = (
    rf"{CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2 = LLAMA3.replace("{1,3}", "")
TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
GPT2, SINGLE_DIGITS = "gpt-2", r"\p{N}"
SPLITS = {
    **dict.fromkeys(("default", "gpt-2", "phi-2", "olmo", "mpt"), GPT2),
    **dict.fromkeys(("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone"), SINGLE_DIGITS),
    **dict.fromkeys(("llama3", "llama-v3", "llama-bpe", "falcon3", "smaug-bpe"), LLAMA3),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen", "kormo", "megrez"), QWEN2),
    "tekken": TEKKEN,
}
"""By tokenizer.ggml.pre; a file without one is cut as GPT-2's text is."""
WHOLE_WORDS = (LLAMA3, TEKKEN)
"""Those whose words are looked up whole before they are merged, and that begin a text unless told otherwise."""

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
SPECIAL = {"bos": "bos_token", "eos": "eos_token", "unknown": "unk_token", "padding": "pad_token"}
SPACE = "\u2581"


@dataclass(frozen=True)
class GGUFTokenizer:
    """A tokenizer and what goes with it."""

    backend: Tokenizer
    special: dict[str, str]
    """Tokens by Hugging Face's names for them."""
    chat_template: str | None

    @classmethod
    def of(cls, file: GGUFFile) -> GGUFTokenizer:
        """The tokenizer that the file's metadata describe. Raises ConfigError."""
        template = file.metadata.get("tokenizer.chat_template")
        if template is not None and not isinstance(template, str):
            raise _broken(file, "its tokenizer.chat_template is no text")
        return cls(*_build(file), template)

    @property
    def vocab_size(self) -> int:
        return self.backend.get_vocab_size(with_added_tokens=True)

    def save(self, target: Path) -> None:
        """Write tokenizer.json, tokenizer_config.json and the chat template."""
        self.backend.save(str(target / "tokenizer.json"))
        config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False, **self.special}
        (target / "tokenizer_config.json").write_text(json.dumps(config, indent=2))
        if self.chat_template is not None:
            (target / "chat_template.jinja").write_text(self.chat_template)


def _build(file: GGUFFile) -> tuple[Tokenizer, dict[str, str]]:
    from tokenizers import AddedToken, processors

    data = file.metadata
    tokens = _list(file, "tokens", str)
    types = _list(file, "token_type", int) if "tokenizer.ggml.token_type" in data else [NORMAL] * len(tokens)
    if len(types) != len(tokens):
        raise _broken(file, f"it has {len(tokens)} tokens and the types of {len(types)}")
    vocabulary = {token: index for index, token in enumerate(tokens)}
    if len(vocabulary) != len(tokens):
        twice = next(token for index, token in enumerate(tokens) if vocabulary[token] != index)
        raise _broken(file, f"its vocabulary has {twice!r} twice")
    kind = data.get("tokenizer.ggml.model")
    if kind not in ("gpt2", "llama"):
        problem = f"its tokenizer.ggml.model = {kind!r} is not supported"
        raise refused(file.paths[0], problem, "Supported: gpt2, llama.")
    try:
        tokenizer, begins = (_byte_level if kind == "gpt2" else _sentencepiece)(file, vocabulary)
    except ConfigError:
        raise
    except Exception as error:  # the library raises nothing narrower
        raise _broken(file, f"its vocabulary and merges do not fit together ({error})") from error
    whole = [
        (token, kind) for token, kind in zip(tokens, types, strict=True) if kind in (UNKNOWN, CONTROL, USER_DEFINED)
    ]
    tokenizer.add_special_tokens([AddedToken(t, normalized=False, special=True) for t, k in whole if k != USER_DEFINED])
    tokenizer.add_tokens([AddedToken(t, normalized=False, special=False) for t, k in whole if k == USER_DEFINED])
    special: dict[str, str] = {}
    for name, attribute in SPECIAL.items():
        token_id = data.get(f"tokenizer.ggml.{name}_token_id")
        if isinstance(token_id, int) and 0 <= token_id < len(tokens):
            special[attribute] = tokens[token_id]
    before = special.get("bos_token") if _switch(file, "add_bos_token", begins) else None
    behind = special.get("eos_token") if _switch(file, "add_eos_token", False) else None
    around = [token for token in (before, behind) if token]
    if around:
        single = [*([before] if before else []), "$A", *([behind] if behind else [])]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=single, pair=[*single, "$B"], special_tokens=[(token, vocabulary[token]) for token in set(around)]
        )
    return tokenizer, special


def _byte_level(file: GGUFFile, vocabulary: dict[str, int]) -> tuple[Tokenizer, bool]:
    """Byte-level BPE, and whether it begins every text with a token of its own."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    name = file.metadata.get("tokenizer.ggml.pre", "default")
    if not isinstance(name, str) or name not in SPLITS:
        problem = f"its tokenizer.ggml.pre = {name!r} is not supported"
        raise refused(file.paths[0], problem, f"Supported: {', '.join(sorted(SPLITS))}.")
    split = SPLITS[name]
    pairs = [merge.partition(" ")[::2] for merge in _list(file, "merges", str)]
    merges = [(left, right) for left, right in pairs if left + right in vocabulary]  # others can make no token
    bpe = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, ignore_merges=split in WHOLE_WORDS))
    if split == QWEN2:
        bpe.normalizer = normalizers.NFC()
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=split in (GPT2, SINGLE_DIGITS))
    cuts = [] if split == GPT2 else [pre_tokenizers.Split(Regex(split), behavior="isolated")]
    bpe.pre_tokenizer = pre_tokenizers.Sequence([*cuts, byte_level])
    bpe.decoder = decoders.ByteLevel()
    return bpe, split in WHOLE_WORDS


def _sentencepiece(file: GGUFFile, vocabulary: dict[str, int]) -> tuple[Tokenizer, bool]:
    """SentencePiece BPE with bytes for what it has no piece for."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    unknown = file.metadata.get("tokenizer.ggml.unknown_token_id", 0)
    tokens = list(vocabulary)
    bpe = models.BPE(
        vocab=vocabulary,
        merges=_merges(_list(file, "scores", float), vocabulary),
        unk_token=tokens[unknown] if isinstance(unknown, int) and 0 <= unknown < len(tokens) else None,
        fuse_unk=True,
        byte_fallback=True,
    )
    prefixed = _switch(file, "add_space_prefix", True)
    tokenizer = Tokenizer(bpe)
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(
        replacement=SPACE, prepend_scheme="first" if prefixed else "never", split=False
    )
    steps: list[Any] = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*steps, *([decoders.Strip(" ", 1, 0)] if prefixed else [])])
    return tokenizer, True


def _merges(scores: list[float], vocabulary: dict[str, int]) -> list[tuple[str, str]]:
    """The merges that a vocabulary with scores stands for: best piece first, each from any two pieces that make it."""
    ranked: list[tuple[float, int, int, int, str, str]] = []
    for token, index in vocabulary.items():
        for cut in range(1, len(token)):
            left, right = token[:cut], token[cut:]
            if left in vocabulary and right in vocabulary:
                ranked.append((-scores[index], index, vocabulary[left], vocabulary[right], left, right))
    return [(left, right) for *_, left, right in sorted(ranked)]


def _list(file: GGUFFile, name: str, kind: type) -> list[Any]:
    found = file.metadata.get(f"tokenizer.ggml.{name}")
    if not isinstance(found, list) or not all(isinstance(value, kind) for value in found):
        raise _broken(file, f"its tokenizer.ggml.{name} is missing, or no list of such values")
    if name == "scores" and len(found) != len(file.metadata["tokenizer.ggml.tokens"]):
        raise _broken(file, f"its tokenizer.ggml.{name} has {len(found)} entries, unlike its vocabulary")
    return found


def _switch(file: GGUFFile, name: str, default: bool) -> bool:
    found = file.metadata.get(f"tokenizer.ggml.{name}", default)
    if not isinstance(found, bool):
        raise _broken(file, f"its tokenizer.ggml.{name} = {found!r:.60} is neither true nor false")
    return found


def _broken(file: GGUFFile, problem: str) -> ConfigError:
    return refused(file.paths[0], problem, "Fetch it again, or convert the model anew.")
