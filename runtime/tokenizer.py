"""Text at the edge: a model's tokenizer, its chat template, and detokenisation of a growing text."""

from __future__ import annotations

import codecs
import itertools
import json
import re
import secrets
import threading
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from runtime.errors import ConfigError, InvalidRequestError
from runtime.files import flaw, read_json
from runtime.prompts import check_messages, check_unicode
from runtime.request import ToolChat

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json", "merges.txt")
REPLACEMENT = "\ufffd"  # what decoders put for bytes that are not (yet) a character
PAPER_SEPARATORS = (".", ",", "?", "!", ";", ":", " ", "\t", "\n")
"""The separators of SepLLM (Chen et al., 2024, arXiv 2412.12094)."""


Encode = Callable[[str], list[int]]


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
            # Code in the directory is not run, and nobody is asked on the terminal whether it may be.
            tokenizer = AutoTokenizer.from_pretrained(
                str(directory), config=_light_config(Path(directory)), local_files_only=True, trust_remote_code=False
            )
        except Exception as error:  # the library raises nothing narrower for a broken file
            for path in sorted(Path(directory).glob("*.json")):
                read_json(path)  # names the one that is no JSON
                if path.read_bytes().startswith(codecs.BOM_UTF8):
                    problem, remedy = f"{path.name} begins with a byte order mark", "Save it as UTF-8 without one."
                    raise ConfigError("model.path", str(directory), problem, remedy) from error
            if "trust_remote_code" in str(error):
                problem = "its tokenizer is code in the directory (auto_map), which is not run"
                remedy = "Save the tokenizer as tokenizer.json, which needs no code."
                raise ConfigError("model.path", str(directory), problem, remedy) from error
            problem = f"has no tokenizer that can be read ({' '.join(str(error).split())})"
            raise ConfigError("model.path", str(directory), problem, "Add the model's tokenizer files.") from error
        self._tokenizer = tokenizer
        self._backend = tokenizer.backend_tokenizer if isinstance(tokenizer, PreTrainedTokenizerFast) else None
        if self._backend is not None:
            # The first call would change these in place, under the hands of other threads.
            self._backend.no_truncation()
            self._backend.no_padding()
        self.vocab_size: int = len(tokenizer)
        """Ids the tokenizer knows; the model's embedding may have more rows."""
        added = tokenizer.added_tokens_decoder
        self._special_ids = {token_id for token_id, token in added.items() if token.special}
        spellings = sorted((added[token_id].content for token_id in self._special_ids), key=len, reverse=True)
        self._lowered_specials = {spelling.lower() for spelling in spellings}
        self._special = re.compile("|".join(map(re.escape, spellings)) or r"(?!)")
        self._resembles_special = re.compile(self._special.pattern, re.IGNORECASE)  # a template may change the case
        self._guarded: _GuardedEncoder | None = None  # made when it is first needed
        self._making_guarded = threading.Lock()

    @property
    def backend_json(self) -> str | None:
        """The tokenizer as `tokenizers` writes it; None where it is not one of theirs."""
        return self._backend.to_str() if self._backend is not None else None

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Ids of `text`, with the special tokens that the tokenizer adds by default, or without them. A special token's
        name in the text stands for the token: raw text may have structure.

        Raises InvalidRequestError if the text is not valid Unicode.
        """
        check_unicode("prompt", text)
        if self._backend is None:
            return list(self._tokenizer(text, add_special_tokens=add_special_tokens).input_ids)
        # Of a batch, even of one, because that lets other threads run meanwhile.
        return list(self._backend.encode_batch_fast([text], add_special_tokens=add_special_tokens)[0].ids)

    def encode_chat(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """Ids of a conversation in the model's chat template, up to where the assistant's answer begins.

        Each message is {"role": one of ROLES, "content": text}. What the template writes may be special tokens; a
        special token's name in a content is plain text, and so cannot end the message or begin another. (The template
        is given such a name with a character of private use behind its first letter. A template that looks for special
        tokens in contents does not find them; one that drops the character is refused for such contents.)

        Raises InvalidRequestError if a message is malformed, or if the model has no template or one that refuses the
        conversation.
        """
        check_messages(messages)
        rendered, encode = self._render(messages)
        return encode(rendered)

    def encode_tool_chat(self, chat: ToolChat) -> list[int]:
        """As `encode_chat`, of a conversation with tools. Raises InvalidRequestError, too, where the template does not
        show tools."""
        if chat.tools and not self.shows_tools:
            problem, remedy = "the model's chat template does not show tools", "Leave them out, or take another model."
            raise InvalidRequestError("tools", f"{len(chat.tools)} tools", problem, remedy)
        rendered, encode = self._render(chat.messages, chat.tools, chat.opening)
        return encode(rendered)

    @property
    def chat_template(self) -> str | None:
        """The template's text, if there is one."""
        template = self._tokenizer.chat_template
        return template if isinstance(template, str | None) else None

    @cached_property
    def shows_tools(self) -> bool:
        """Whether the chat template shows the model what it may call."""
        tool = {"name": "probe_of_tools", "description": "", "parameters": {"type": "object", "properties": {}}}
        try:
            shown = self._apply_template([{"role": "user", "content": "?"}], [{"type": "function", "function": tool}])
        except InvalidRequestError:
            return False
        return "probe_of_tools" in shown

    def encode_turn(self, messages: Sequence[Mapping[str, str]], after: int | None) -> list[int]:
        """Ids that continue a conversation behind an assistant's answer: what the chat template puts between the end
        of that answer and the beginning of the next, with `messages` in between.

        They begin with the end-of-turn token, unless `after`, the newest token of the conversation, is it. Each
        message is as in `encode_chat`, with the same errors; a template that does not show earlier answers as they
        are is refused too.
        """
        check_messages(messages)
        marker = "Answer0"  # survives templates that strip what is said, and does not merge with what follows
        while any(marker in message["content"] for message in messages):
            marker += "0"
        past = [{"role": "user", "content": "Question"}, {"role": "assistant", "content": marker}]
        rendered, encode = self._render([*past, *messages])
        if rendered.count(marker) != 1:
            problem = "the model's chat template does not keep earlier answers as they are"
            raise InvalidRequestError("messages", list(messages), problem, "Send plain text or token ids instead.")
        # Encoded together, since some tokenizers treat the beginning of a text otherwise than its inside.
        answer = encode(marker)
        ids = encode(rendered[rendered.index(marker) :])
        if ids[: len(answer)] == answer:
            ids = ids[len(answer) :]
        else:
            ids = encode(rendered[rendered.index(marker) + len(marker) :])
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

    def _render(
        self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] = (), opening: str = ""
    ) -> tuple[str, Encode]:
        """The conversation in the chat template, up to where the assistant's answer begins, and what encodes it.
        `opening`: the template's own, behind it."""
        lowered = "\n".join(_texts_of([messages, tools])).lower()
        if not any(spelling in lowered for spelling in self._lowered_specials):  # far quicker than the expression
            return self._apply_template(messages, tools) + opening, self._encode_rendered
        # Names in contents are marked, those that are not are the template's own.
        mark = next(letter for letter in map(chr, range(0xE000, 0xF900)) if letter not in lowered)
        both = [list(messages), list(tools)]
        marked = self._apply_template(*self._with_names(both, lambda name: name[0] + mark + name[1:]))
        without = self._apply_template(*self._with_names(both, lambda name: "x" * len(name)))
        own = self._special.findall(marked)
        if own != self._special.findall(without):
            problem = "a content spells a special token, and the chat template hides that it is the content's"
            raise InvalidRequestError("messages", list(messages), problem, "Leave the special token's name out.")
        guarded = self._guarded_encoder(messages)
        return guarded.with_structure(self._special, marked + opening).replace(mark, ""), guarded.encode

    def _with_names(self, value: Any, put: Callable[[str], str]) -> Any:
        """A tree, what resembles a special token's name in its texts replaced."""
        if isinstance(value, str):
            return self._resembles_special.sub(lambda found: put(found[0]), value)
        if isinstance(value, Mapping):
            return {self._with_names(key, put): self._with_names(item, put) for key, item in value.items()}
        return [self._with_names(item, put) for item in value] if isinstance(value, list | tuple) else value

    def _guarded_encoder(self, messages: Sequence[Mapping[str, str]]) -> _GuardedEncoder:
        if self._backend is None:
            problem = "a content spells a special token, and this model's tokenizer cannot read it as plain text"
            raise InvalidRequestError("messages", list(messages), problem, "Leave the special token's name out.")
        with self._making_guarded:
            if self._guarded is None:
                self._guarded = _GuardedEncoder(self._backend.to_str())
        return self._guarded

    def _apply_template(self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] = ()) -> str:
        if self._tokenizer.chat_template is None:
            problem = "the model has no chat template"
            remedy = "Send plain text or token ids instead (on the command line: --raw)."
            raise InvalidRequestError("messages", list(messages), problem, remedy)
        try:
            rendered = self._tokenizer.apply_chat_template(
                [dict(message) for message in messages],
                tools=[dict(tool) for tool in tools] or None,
                add_generation_prompt=True,
                tokenize=False,
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

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that a token stands for inside a text; of a special token its name; of an unknown id none."""
        piece = self._tokenizer.convert_ids_to_tokens(token_id) if 0 <= token_id < self.vocab_size else None
        if piece is None:
            return b""
        if token_id in self._tokenizer.added_tokens_decoder:
            return str(piece).encode()
        if self._letters is not None:
            letters = self._letters
            return bytes(letters[letter] for letter in piece if letter in letters)
        if found := re.fullmatch(r"<0x([0-9A-F]{2})>", piece):
            return bytes.fromhex(found[1])
        return str(piece).replace("\u2581", " ").encode()  # SentencePiece's space

    @cached_property
    def _letters(self) -> dict[str, int] | None:
        """Of a vocabulary that is spelt in bytes: the byte behind each letter."""
        if self._backend is None or '"ByteLevel"' not in json.dumps(json.loads(self._backend.to_str())["decoder"]):
            return None
        shown = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]  # these stand for themselves
        hidden = [byte for byte in range(256) if byte not in shown]
        return {chr(byte): byte for byte in shown} | {chr(256 + index): byte for index, byte in enumerate(hidden)}

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


def _light_config(directory: Path) -> Any:
    """What AutoTokenizer wants to know of the model, where its files name a tokenizer's class; None: it shall see for
    itself, which imports the model's own configuration class, for seconds."""
    from transformers import PreTrainedConfig

    config, tokenizer = (
        read_json(path) if path.exists() else {}
        for path in (directory / "config.json", directory / "tokenizer_config.json")
    )
    if not isinstance(config.get("model_type"), str) or "tokenizer_class" not in tokenizer or "auto_map" in tokenizer:
        return None
    light = PreTrainedConfig(tokenizer_class=config.get("tokenizer_class"), name_or_path=str(directory))
    light.model_type = config["model_type"]
    return light


class _GuardedEncoder:
    """The same tokenizer, but its special tokens have names that nobody can spell."""

    def __init__(self, backend: str) -> None:
        """`backend`: the tokenizer, as `tokenizers` writes it."""
        from tokenizers import Tokenizer as Backend

        state = json.loads(backend)
        secret = secrets.token_hex(8)
        self._names = {
            token["content"]: f"<|{secret} {token['id']}|>" for token in state["added_tokens"] if token["special"]
        }
        for token in state["added_tokens"]:
            token["content"] = self._names.get(token["content"], token["content"])
        model = state["model"]
        if isinstance(model["vocab"], dict):
            model["vocab"] = {self._names.get(text, text): token_id for text, token_id in model["vocab"].items()}
        else:
            model["vocab"] = [[self._names.get(text, text), score] for text, score in model["vocab"]]
        if model.get("unk_token") in self._names:
            model["unk_token"] = self._names[model["unk_token"]]
        state["post_processor"] = None  # it adds what a template has written
        self._backend = Backend.from_str(json.dumps(state))

    def with_structure(self, special: re.Pattern[str], text: str) -> str:
        """`text`, the special tokens that it names spelt as they are here."""
        return special.sub(lambda found: self._names[found[0]], text)

    def encode(self, text: str) -> list[int]:
        return list(self._backend.encode_batch_fast([text], add_special_tokens=False)[0].ids)


class Detokenizer:
    """Text of a growing token sequence, piece by piece; the pieces do not depend on how the ids come grouped.

    A piece never ends inside a character: bytes that may still become one are held back, but never more
    than four tokens. The pieces and the flush, joined, are what the text of all ids, those `after` which the sequence
    comes included, has beyond the text of those alone: the space before a first word belongs to it, and so does a
    character that it completes. The one exception is a byte-fallback vocabulary (SentencePiece) that was given invalid
    UTF-8, or several U+FFFD spelt in bytes: its decoder takes back even the valid characters beside invalid bytes, here
    they stay.

    `tokenizers.decoders.DecodeStream` does nearly this, but has no way to flush, and withholds text for as long as
    it ends in a replacement character.
    """

    MAX_HELD = 4
    """A character has at most four bytes, so four tokens complete whatever character can be completed."""
    MAX_WINDOW = 32
    MIN_CONTEXT = 8
    """Tokens before the sequence that are decoded along with it."""

    def __init__(self, tokenizer: Tokenizer, after: Sequence[int] = ()) -> None:
        self._tokenizer = tokenizer
        # Only the window's tokens are decoded anew. It starts where a character starts, one piece back: decoders
        # treat the first token of a text otherwise than the same token further on (its leading space).
        self._window: list[int] = []
        self._shown = ""  # the text of the window that has been handed out
        self._num_pending = 0  # tokens at the window's end that are not, or not wholly, in _shown
        self._owed = ""  # what of the text before is not certain yet: an incomplete character
        if after:
            self._begin_behind(after)

    def _begin_behind(self, after: Sequence[int]) -> None:
        before = [token_id for token_id in after[-4 * self.MAX_WINDOW :] if self._tokenizer.shows(token_id)]
        # What begins inside a character, or ends in one, shows replacement characters.
        for num_pending, count in itertools.product(range(self.MAX_HELD), range(self.MAX_HELD)):
            window = before[-(self.MIN_CONTEXT + count) :]
            shown = self._tokenizer.decode(window[: len(window) - num_pending])
            if REPLACEMENT not in shown:
                break
        else:
            num_pending = 0
        whole = self._tokenizer.decode(window)
        self._restart(window, shown if num_pending else whole, num_pending)
        if num_pending:
            self._owed = whole[len(shown) :] if whole.startswith(shown) else REPLACEMENT * num_pending

    def push(self, ids: Iterable[int]) -> str:
        """The text that became certain with these ids."""
        return "".join(self._own(self._push(token_id)) for token_id in ids if self._tokenizer.shows(token_id))

    def _own(self, piece: str) -> str:
        """The piece without what of it belongs to the text before."""
        while piece and self._owed:
            piece, self._owed = (piece[1:], self._owed[1:]) if piece[0] == self._owed[0] else (piece, "")
        return piece

    def flush(self) -> str:
        """What is still held back; incomplete characters come as replacement characters."""
        text = self._tokenizer.decode(self._window)
        if text.startswith(self._shown):
            rest = text[len(self._shown) :]
        else:
            rest = self._tokenizer.decode(self._window[len(self._window) - self._num_pending :])
        self._restart([], "")
        return self._own(rest)

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
        stop = max(len(_certain(text)), len(self._shown))
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

    def _restart(self, window: list[int], shown: str, num_pending: int = 0) -> None:
        self._window, self._shown, self._num_pending = window, shown, num_pending


def _certain(text: str) -> str:
    """A text's beginning, without what may be an incomplete character: of up to three bytes, it shows as one to three
    replacement characters."""
    return text[: len(text) - min(len(text) - len(text.rstrip(REPLACEMENT)), 3)]


def _texts_of(value: Any) -> list[str]:
    """Every text in a tree of JSON, keys included."""
    if isinstance(value, str):
        return [value]
    if isinstance(value, Mapping):
        value = [*value, *value.values()]
    return [text for item in value for text in _texts_of(item)] if isinstance(value, list | tuple) else []


def _is_row_of(parts: Collection[str], text: str) -> bool:
    """Whether `text` is some of `parts`, one behind the other."""
    ends = {0}
    for start in range(len(text)):
        if start in ends:
            ends.update(start + len(part) for part in parts if text.startswith(part, start))
    return len(text) in ends
