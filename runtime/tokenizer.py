"""Text at the edge: a model's tokenizer, its chat template, and detokenisation of a growing text."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from runtime.errors import ConfigError, InvalidRequestError
from runtime.files import flaw, read_json

ROLES = ("system", "user", "assistant", "tool")
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json", "merges.txt")
REPLACEMENT = "\ufffd"  # what decoders put for bytes that are not (yet) a character
PAPER_SEPARATORS = (".", ",", "?", "!", ";", ":", " ", "\t", "\n")
"""The separators of SepLLM (Chen et al., 2024, arXiv 2412.12094)."""


class Tokenizer:
    """The tokenizer in a model directory, as Hugging Face loads it. Safe to use from several threads.

    Raises ConfigError if the directory holds none.
    """

    def __init__(self, directory: str | Path) -> None:
        from transformers import AutoTokenizer, PreTrainedTokenizerFast

        for name in TOKENIZER_FILES:
            path = Path(directory) / name
            if path.exists() and (found := flaw(path)):
                raise ConfigError("model.path", str(directory), f"{name} {found[0]}", found[1])
        try:
            tokenizer = AutoTokenizer.from_pretrained(str(directory), local_files_only=True)
        except Exception as error:  # the library raises nothing narrower for a broken file
            for path in sorted(Path(directory).glob("*.json")):
                read_json(path)  # names the one that is no JSON
            problem = f"has no tokenizer that can be read ({' '.join(str(error).split())})"
            raise ConfigError("model.path", str(directory), problem, "Add the model's tokenizer files.") from error
        if isinstance(tokenizer, PreTrainedTokenizerFast):
            # The first call would change these in place, under the hands of other threads.
            tokenizer.backend_tokenizer.no_truncation()
            tokenizer.backend_tokenizer.no_padding()
        self._tokenizer = tokenizer
        self.vocab_size: int = len(tokenizer)
        """Ids the tokenizer knows; the model's embedding may have more rows."""
        added = tokenizer.added_tokens_decoder
        self._special_ids = {token_id for token_id, token in added.items() if token.special}

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Ids of `text`, with the special tokens that the tokenizer adds by default, or without them.

        Raises InvalidRequestError if the text is not valid Unicode.
        """
        _check_unicode("prompt", text)
        return list(self._tokenizer(text, add_special_tokens=add_special_tokens).input_ids)

    def encode_chat(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """Ids of a conversation in the model's chat template, up to where the assistant's answer begins.

        Each message is {"role": one of ROLES, "content": text}. Raises InvalidRequestError if a message is
        malformed, or if the model has no template or one that refuses the conversation.
        """
        _check_messages(messages)
        return self._encode_rendered(self._render(messages))

    def encode_turn(self, messages: Sequence[Mapping[str, str]], after: int | None) -> list[int]:
        """Ids that continue a conversation behind an assistant's answer: what the chat template puts between the end
        of that answer and the beginning of the next, with `messages` in between.

        They begin with the end-of-turn token, unless `after`, the newest token of the conversation, is it. Each
        message is as in `encode_chat`, with the same errors; a template that does not show earlier answers as they
        are is refused too.
        """
        _check_messages(messages)
        marker = "Answer0"  # survives templates that strip what is said, and does not merge with what follows
        while any(marker in message["content"] for message in messages):
            marker += "0"
        past = [{"role": "user", "content": "Question"}, {"role": "assistant", "content": marker}]
        rendered = self._render([*past, *messages])
        if rendered.count(marker) != 1:
            problem = "the model's chat template does not keep earlier answers as they are"
            raise InvalidRequestError("messages", list(messages), problem, "Send plain text or token ids instead.")
        # Encoded together, since some tokenizers treat the beginning of a text otherwise than its inside.
        answer = self._encode_rendered(marker)
        ids = self._encode_rendered(rendered[rendered.index(marker) :])
        if ids[: len(answer)] == answer:
            ids = ids[len(answer) :]
        else:
            ids = self._encode_rendered(rendered[rendered.index(marker) + len(marker) :])
        if after in self._special_ids and after in ids:
            end = ids.index(after)
            if not self.decode(ids[:end]).strip():  # Llama 2 has a space before the end of a turn
                ids = ids[end + 1 :]
        return ids

    @cached_property
    def turn_end_id(self) -> int | None:
        """The special token that the chat template puts behind an assistant's answer; None if it puts none there."""
        marker = "Answer0"
        conversation = [{"role": "user", "content": "Question"}, {"role": "assistant", "content": marker}]
        try:
            rendered = self._tokenizer.apply_chat_template(conversation, tokenize=False)
        except Exception:  # there is no template, or it refuses: then there is no chat
            return None
        _, found, rest = str(rendered).rpartition(marker)
        behind = self._encode_rendered(rest.lstrip()) if found else []
        return behind[0] if behind and behind[0] in self._special_ids else None

    def opening(self) -> list[int]:
        """Ids of some text behind which the model would begin an answer, not empty: a short conversation in its chat
        template, or, without one, what it puts before every text."""
        try:
            return self.encode_chat([{"role": "user", "content": "Hello"}])
        except InvalidRequestError:
            return self.encode("") or self._encode_rendered("\n")

    def _render(self, messages: Sequence[Mapping[str, str]]) -> str:
        """The conversation in the chat template, up to where the assistant's answer begins."""
        if self._tokenizer.chat_template is None:
            problem, remedy = "the model has no chat template", "Send plain text or token ids instead."
            raise InvalidRequestError("messages", list(messages), problem, remedy)
        try:
            rendered = self._tokenizer.apply_chat_template(
                [dict(message) for message in messages], add_generation_prompt=True, tokenize=False
            )
        except Exception as error:  # a template is the model's own program and may raise anything
            problem = f"the model's chat template refuses the conversation ({error})"
            remedy = "Send roles in an order that the model supports."
            raise InvalidRequestError("messages", list(messages), problem, remedy) from error
        assert isinstance(rendered, str)
        return rendered

    def _encode_rendered(self, text: str) -> list[int]:
        """A chat template writes the special tokens itself."""
        return self.encode(text, add_special_tokens=False)

    def decode(self, ids: Sequence[int]) -> str:
        """Text of `ids`, special tokens left out."""
        # Clean-up (" ." to ".") would make the text of a token depend on those after it.
        text = self._tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)
        assert isinstance(text, str)
        return text

    def shows(self, token_id: int) -> bool:
        """Whether decode gives the id any text at all: special and unknown ids it leaves out."""
        return 0 <= token_id < self.vocab_size and token_id not in self._special_ids

    def separator_ids(
        self, separators: Literal["paper"] | Sequence[str] | Sequence[int], merged: bool = False
    ) -> tuple[int, ...]:
        """Ids of the tokens that separate segments, ascending.

        A text stands for every token whose text is exactly it (special tokens by their names), an id for itself;
        "paper" is those of PAPER_SEPARATORS that the vocabulary has. `merged` adds every token that is several
        separators in a row, such as ".\\n". Raises ConfigError naming what is no single token of the vocabulary.
        """
        field = "cache.separators"
        texts = self._token_texts()
        given: Sequence[str | int]
        if separators == "paper":
            known = set(texts)
            given = [separator for separator in PAPER_SEPARATORS if separator in known]
        elif isinstance(separators, str):
            raise ConfigError(field, separators, "is not a list", 'Write "paper", or a list of texts or token ids.')
        else:
            given = separators
        found: set[int] = set()
        for separator in given:
            if isinstance(separator, int):
                if not 0 <= separator < len(texts):
                    remedy = f"Token ids are whole numbers from 0 to {len(texts) - 1}."
                    raise ConfigError(field, separator, "is not a token id of this model", remedy)
                found.add(separator)
            else:
                ids = [token_id for token_id, text in enumerate(texts) if text and text == separator]
                if not ids:
                    remedy = "Name texts that are one token each, or token ids."
                    raise ConfigError(field, separator, "is no single token of this model's vocabulary", remedy)
                found.update(ids)
        if not found:
            raise ConfigError(field, separators, "names no token", "Name at least one separator.")
        if merged:
            whole = {texts[token_id] for token_id in found} - {""}
            found.update(token_id for token_id, text in enumerate(texts) if text and _is_row_of(whole, text))
        return tuple(sorted(found))

    def _token_texts(self) -> list[str]:
        """Every token's text inside a text, by id; special tokens by their names."""
        # Decoders treat the first token of a text otherwise than the same token further on (its leading space).
        first = self.encode("a", add_special_tokens=False)[-1]
        start = len(self._tokenizer.decode([first], skip_special_tokens=False, clean_up_tokenization_spaces=False))
        pairs = [[first, token_id] for token_id in range(self.vocab_size)]
        texts = self._tokenizer.batch_decode(pairs, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return [text[start:] for text in texts]


class Detokenizer:
    """Text of a growing token sequence, piece by piece; the pieces do not depend on how the ids come grouped.

    A piece never ends inside a character: bytes that may still become one are held back, but never more
    than four tokens. The pieces and the flush, joined, are `tokenizer.decode` of all ids. The one exception is a
    byte-fallback vocabulary (SentencePiece) that was given invalid UTF-8, or several U+FFFD spelt in bytes: its decoder
    takes back even the valid characters beside invalid bytes, here they stay.

    `tokenizers.decoders.DecodeStream` does nearly this, but has no way to flush, and withholds text for as long as
    it ends in a replacement character.
    """

    MAX_HELD = 4
    """A character has at most four bytes, so four tokens complete whatever character can be completed."""
    MAX_WINDOW = 32

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        # Only the window's tokens are decoded anew. It starts where a character starts, one piece back: decoders
        # treat the first token of a text otherwise than the same token further on (its leading space).
        self._window: list[int] = []
        self._shown = ""  # the text of the window that has been handed out
        self._num_pending = 0  # tokens at the window's end that are not, or not wholly, in _shown

    def push(self, ids: Iterable[int]) -> str:
        """The text that became certain with these ids."""
        return "".join(self._push(token_id) for token_id in ids if self._tokenizer.shows(token_id))

    def flush(self) -> str:
        """What is still held back; incomplete characters come as replacement characters."""
        text = self._tokenizer.decode(self._window)
        if text.startswith(self._shown):
            rest = text[len(self._shown) :]
        else:
            rest = self._tokenizer.decode(self._window[len(self._window) - self._num_pending :])
        self._restart([], "")
        return rest

    def _push(self, token_id: int) -> str:
        self._window.append(token_id)
        self._num_pending += 1
        text = self._tokenizer.decode(self._window)
        if not text.startswith(self._shown):
            # A byte-fallback decoder gives up a whole run of bytes while its last character is incomplete.
            if self._num_pending < self.MAX_HELD:
                return ""
            window = self._window[len(self._window) - self._num_pending :]
            piece = self._tokenizer.decode(window)
            self._restart(window, piece)
            return piece
        # An incomplete character of up to three bytes shows as one to three replacement characters.
        num_unsure = min(len(text) - len(text.rstrip(REPLACEMENT)), 3)
        stop = max(len(text) - num_unsure, len(self._shown))
        piece, self._shown = text[len(self._shown) : stop], text[:stop]
        if stop == len(text):
            window = self._window[len(self._window) - self._num_pending :]
            self._restart(window, self._tokenizer.decode(window))
        elif len(self._window) > self.MAX_WINDOW:
            # Tokens that each end inside a character. Decoding from inside one falls back into step after it.
            tail = text[stop:]
            self._window = self._window[-self.MAX_WINDOW // 2 :]
            self._num_pending = min(self._num_pending, len(self._window))
            self._shown = self._tokenizer.decode(self._window).removesuffix(tail)
        return piece

    def _restart(self, window: list[int], shown: str) -> None:
        self._window, self._shown, self._num_pending = window, shown, 0


def _is_row_of(parts: Collection[str], text: str) -> bool:
    """Whether `text` is some of `parts`, one behind the other."""
    ends = {0}
    for start in range(len(text)):
        if start in ends:
            ends.update(start + len(part) for part in parts if text.startswith(part, start))
    return len(text) in ends


def _check_messages(messages: Sequence[Mapping[str, str]]) -> None:
    if not messages:
        raise InvalidRequestError("messages", list(messages), "is empty", "Send at least one message.")
    for index, message in enumerate(messages):
        field = f"messages[{index}]"
        if not isinstance(message, Mapping):
            raise InvalidRequestError(field, message, "is not a mapping", 'Send {"role": ..., "content": ...}.')
        for key in ("role", "content"):
            value: Any = message.get(key)
            if not isinstance(value, str):
                raise InvalidRequestError(f"{field}.{key}", value, "is not a text", f"Give each message a {key}.")
            _check_unicode(f"{field}.{key}", value)
        if unknown := [key for key in message if key not in ("role", "content")]:
            remedy = "Known here: role, content."
            raise InvalidRequestError(f"{field}.{unknown[0]}", message[unknown[0]], "unknown key", remedy)
        if message["role"] not in ROLES:
            remedy = f"Known roles: {', '.join(ROLES)}."
            raise InvalidRequestError(f"{field}.role", message["role"], "unknown role", remedy)


def _check_unicode(field: str, text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        remedy = "Send characters, not halves of surrogate pairs."
        raise InvalidRequestError(field, text, f"is not valid Unicode ({error.reason})", remedy) from error
