"""YAML as people write it: what a plain word means is up to the field that it is for.

YAML 1.1 makes a boolean of `no`, 750 of `12:30`, 8 of `010`, and a text of `1e-1`, whatever it is meant for. Here a
plain scalar stays the text it is (`Plain`) until `for_field` reads it as the type of its field.
"""

from __future__ import annotations

import re
import types
from collections.abc import Mapping
from decimal import Decimal
from typing import Any, Literal, Union, get_args, get_origin

import yaml
from pydantic import BaseModel

NULLS = ("", "~", "null", "Null", "NULL", "None")
TRUE, FALSE = ("true", "yes", "on"), ("false", "no", "off")
_WHOLE = re.compile(r"[-+]?\d[\d_]*")
_BASED = re.compile(r"[-+]?0([xX][0-9a-fA-F_]+|[oO][0-7_]+|[bB][01_]+)")
_REAL = re.compile(r"([-+]?)(\d[\d_]*\.?[\d_]*|\.\d[\d_]*)([eE][-+]?\d+)?")
_SPECIAL = re.compile(r"[-+]?\.?(inf|nan)", re.IGNORECASE)
_MOST_DIGITS = 30
"""Of a whole number written with an exponent."""


class Plain(str):
    """A scalar without quotes."""


class Loader(yaml.SafeLoader):
    """Plain scalars become `Plain`; a key that comes twice is an error."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode) and key.value != "<<"]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.constructor.ConstructorError(None, None, f"the key {key!r} comes twice", node.start_mark)
        return {str(key) if isinstance(key, str) else key: value for key, value in _mapping(self, node, deep).items()}

    def plain(self, node: Any) -> str:
        """A scalar, whatever YAML takes it for."""
        text = str(self.construct_scalar(node))
        return Plain(text) if node.style is None else text


def _mapping(loader: Loader, node: Any, deep: bool) -> dict[Any, Any]:
    return yaml.SafeLoader.construct_mapping(loader, node, deep)


for _kind in ("null", "bool", "int", "float", "timestamp", "value", "str"):
    Loader.add_constructor(f"tag:yaml.org,2002:{_kind}", Loader.plain)


def load(content: str | bytes) -> Any:
    """The document's value, its plain scalars unread; None if there is none. Raises yaml.YAMLError."""
    return yaml.load(content, Loader)


def for_field(value: Any, annotation: Any) -> Any:
    """`value` with its plain scalars read as `annotation` wants them; what it cannot be stays a text, to be refused."""
    options = get_args(annotation) if get_origin(annotation) in (Union, types.UnionType) else (annotation,)
    if isinstance(value, Mapping):
        section = next((kind for kind in options if isinstance(kind, type) and issubclass(kind, BaseModel)), None)
        fields = section.model_fields if section is not None else {}
        free = next((get_args(kind)[1] for kind in options if get_origin(kind) is dict), str)
        return {key: for_field(item, fields[key].annotation if key in fields else free) for key, item in value.items()}
    sequences = [get_args(kind)[0] for kind in options if get_origin(kind) is tuple]
    if isinstance(value, list):
        for kind in sequences:
            read = [for_field(item, kind) for item in value]
            if kind is not int or all(isinstance(item, int) for item in read):
                return read
        return [for_field(item, str) for item in value]
    if not isinstance(value, Plain):
        return value
    return _scalar(str(value), options, sequences)


def _scalar(text: str, options: tuple[Any, ...], sequences: list[Any]) -> Any:
    if type(None) in options and text in NULLS:
        return None
    if any(get_origin(kind) is Literal and text in get_args(kind) for kind in options):
        return text
    if bool in options and text.lower() in TRUE + FALSE:
        return text.lower() in TRUE
    for kind in (int, float):
        if kind in options and (number := _number(text, kind)) is not None:
            return number
    for kind in sequences:  # a, b for [a, b]; a text may have commas of its own
        read = [for_field(Plain(part.strip()), kind) for part in text.split(",") if part.strip()]
        if len(sequences) == 1 or kind is int and read and all(isinstance(item, int) for item in read):
            return read
    return text


def _number(text: str, kind: type) -> int | float | None:
    """The number that `text` writes down, if it does; 1e3 is a whole one too."""
    if _WHOLE.fullmatch(text):
        return kind(text.replace("_", ""))
    if _BASED.fullmatch(text):
        return kind(int(text.replace("_", ""), 0))
    if kind is float and _SPECIAL.fullmatch(text):
        return float(text.replace(".", ""))
    if not _REAL.fullmatch(text):
        return None
    if kind is float:
        return float(text.replace("_", ""))
    number = Decimal(text.replace("_", ""))
    whole = number.adjusted() < _MOST_DIGITS and number == number.to_integral_value()
    return int(number) if whole else None
