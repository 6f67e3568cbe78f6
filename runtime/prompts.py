"""What people hand in as prompts: texts, token ids as Python, numpy and torch have them, conversations; one or several.

Whatever cannot be meant is refused by name, before it is taken apart into something that can.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping, Sequence
from pathlib import PurePath
from typing import Any

from runtime.errors import InvalidRequestError
from runtime.request import Prompt, ToolChat

ROLES = ("system", "user", "assistant", "tool")
_KINDS = "Hand in a text, a list of token ids, or a list of chat messages."


def as_prompts(given: Any) -> list[Prompt]:
    """One prompt or several, as a list. A list of numbers is one prompt, and so is one of messages; a matrix of ids has
    a prompt in each row. Raises InvalidRequestError."""
    value = _as_list(given, "prompts", most_dims=2)
    if isinstance(value, str) or value and (_is_number(value[0]) or isinstance(value[0], Mapping)):
        return [as_prompt(value)]
    return [as_prompt(one, f"prompts[{index}]") for index, one in enumerate(value)]


def as_prompt(given: Any, field: str = "prompt") -> Prompt:
    """One prompt: a text, a list of Python's numbers, or a list of messages. Raises InvalidRequestError."""
    if isinstance(given, ToolChat):
        return given
    value = _as_list(given, field)
    if isinstance(value, str) or value and isinstance(value[0], Mapping):
        return value
    return as_token_ids(value, "token_ids" if field == "prompt" else field)


def as_token_ids(given: Any, field: str = "token_ids") -> list[int]:
    """Whole numbers of any kind, as Python's. Whether the model has such tokens is the engine's to say.

    Raises InvalidRequestError.
    """
    value = given if type(given) is list else _as_list(given, field)
    if isinstance(value, str):
        raise InvalidRequestError(field, value, "is a text, not token ids", _KINDS)
    if all(type(item) is int for item in value):
        return value
    return [_as_token_id(item, f"{field}[{index}]") for index, item in enumerate(value)]


def _as_token_id(item: Any, field: str) -> int:
    try:
        if not _is_bool(item):
            return operator.index(item)
    except (TypeError, ValueError):  # torch has both
        pass
    problem = f"is no token id, but of type {type(item).__name__}"
    raise InvalidRequestError(field, item, problem, "Token ids are whole numbers. " + _KINDS)


def _as_list(given: Any, field: str, most_dims: int = 1) -> Any:
    """A text as it is, anything else that has members in a list."""
    if isinstance(given, str | list):
        return given
    if given is None or isinstance(given, bytes | bytearray | memoryview):
        remedy = _KINDS if given is None else "Decode bytes to a text first."
        raise InvalidRequestError(field, given, "is no prompt", remedy)
    if isinstance(given, Mapping):
        problem, remedy = "is a mapping", "Put a message into a list; of a tokenizer's result, hand in the input_ids."
        raise InvalidRequestError(field, given, problem, remedy)
    if isinstance(given, PurePath):
        raise InvalidRequestError(field, str(given), "is a path", "Hand in the text that the file holds.")
    if isinstance(dims := getattr(given, "ndim", None), int) and hasattr(given, "tolist"):  # an array, or a tensor
        if not 1 <= dims <= most_dims:
            remedy = "Hand in one row of token ids." if dims else _KINDS
            raise InvalidRequestError(field, given, f"has {dims} dimensions", remedy)
        return given.tolist()
    if isinstance(given, Iterable) and not isinstance(given, set | frozenset):
        return list(given)
    raise InvalidRequestError(field, given, f"is no prompt, but of type {type(given).__name__}", _KINDS)


def _is_number(item: Any) -> bool:
    return isinstance(item, int | float | complex) or getattr(item, "ndim", None) == 0


def _is_bool(item: Any) -> bool:
    return isinstance(item, bool) or "bool" in str(getattr(item, "dtype", ""))


def kind_of(prompt: Prompt) -> str:
    """What `as_prompt` gave, by the name that it has on the wire: text, messages or token_ids; or tool_chat."""
    if isinstance(prompt, str):
        return "text"
    if isinstance(prompt, ToolChat):
        return "tool_chat"
    return "messages" if prompt and isinstance(prompt[0], Mapping) else "token_ids"


def as_messages(given: Any, field: str = "messages") -> Sequence[Mapping[str, str]]:
    """Chat messages in a list; `check_messages` says what each has to be. Raises InvalidRequestError."""
    value = _as_list(given, field)
    if isinstance(value, str):
        raise InvalidRequestError(field, value, "is a text", 'Send [{"role": "user", "content": ...}].')
    return value


def check_messages(messages: Sequence[Mapping[str, str]]) -> None:
    """Raises InvalidRequestError if there is none, or naming the first that no chat template knows."""
    if not messages:
        raise InvalidRequestError("messages", list(messages), "is empty", "Send at least one message.")
    check_shapes(messages)
    for index, message in enumerate(messages):
        if message["role"] not in ROLES:
            remedy = f"Known roles: {', '.join(ROLES)}."
            raise InvalidRequestError(f"messages[{index}].role", message["role"], "unknown role", remedy)


def check_shapes(messages: Sequence[Mapping[str, str]]) -> None:
    """Raises InvalidRequestError naming the first message that is not a role and a content, both texts."""
    for index, message in enumerate(messages):
        field = f"messages[{index}]"
        if not isinstance(message, Mapping):
            raise InvalidRequestError(field, message, "is not a mapping", 'Send {"role": ..., "content": ...}.')
        for key in ("role", "content"):
            value: Any = message.get(key)
            if not isinstance(value, str):
                raise InvalidRequestError(f"{field}.{key}", value, "is not a text", f"Give each message a {key}.")
            check_unicode(f"{field}.{key}", value)
        if unknown := [key for key in message if key not in ("role", "content")]:
            remedy = "Known here: role, content."
            raise InvalidRequestError(f"{field}.{unknown[0]}", message[unknown[0]], "unknown key", remedy)


def check_unicode(field: str, text: str) -> None:
    """Raises InvalidRequestError for halves of characters."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        remedy = "Send characters, not halves of surrogate pairs."
        raise InvalidRequestError(field, text, f"is not valid Unicode ({error.reason})", remedy) from error
