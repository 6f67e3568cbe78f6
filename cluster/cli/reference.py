"""The references of all settings, written from the config trees themselves: `python -m cluster.cli.reference`.

`make docs` writes docs/configuration.md and docs/training-settings.md with it, and a test fails where a page and its
tree differ.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from runtime.config import CACHE_DEFAULTS, CacheConfig, Config, Section
from runtime.training.config import TrainingConfig

DOCS = Path(__file__).resolve().parents[2] / "docs"
PAGE = DOCS / "configuration.md"
TRAINING_PAGE = DOCS / "training-settings.md"

INTRODUCTION = """\
# Settings

<!-- Written by `make docs` from runtime/config.py. Change it there. -->

There is one tree of settings. A YAML file gives them by section, as the files in [`configs/`](../configs) do; `--set`
gives one key, and comes after the file; from Python, `Engine.from_config` takes a mapping, a file's path or a `Config`.

```
outrider serve --config configs/local-sink.yaml --set server.port=50052 --set parallel.lp=2
```

A value after `--set` is read as YAML: `null`, `true`, `[suffix, recycle]`. An unknown key or value is
an error that names it. The keys of `lookahead` and `sampling` are defaults: a request may bring its own values. Values
that belong together are checked together.
"""

TRAINING_INTRODUCTION = """\
# Settings of training

<!-- Written by `make docs` from runtime/training/config.py. Change it there. -->

What `outrider train --config FILE` reads, with `--set` for single keys, both as in [Settings](configuration.md).
[Training](training.md) says what is done with it.
"""

ENVIRONMENT = """\
## Environment

| variable | meaning |
|---|---|
| `OUTRIDER_TOKENS` | Of a server: tokens of callers, commas in between ([Security](security.md#tokens)). |
| `OUTRIDER_TOKEN` | Of a client: its token. |
| `OUTRIDER_TLS_CA` | Of a client: PEM file of the server's authority, or `system`; the connection is TLS. |
| `OUTRIDER_TLS_CERT`, `OUTRIDER_TLS_KEY` | Of a client: PEM files of its own certificate and key. |
| `OUTRIDER_CACHE` | Where what is made once is kept; else `outrider/` in `XDG_CACHE_HOME`, or in `~/.cache`. |
| `CXX` | The C++ compiler; else the first of `g++`, `clang++` and `c++` that is there. |
| `RAY_ADDRESS`, `RAY_AUTH_MODE` | As Ray documents them. `ray.address` comes first. |
| `GLOO_SOCKET_IFNAME` | The network interface that workers talk over; else the one of the node's address. |
| `ONEDNN_PRIMITIVE_CACHE_CAPACITY` | Kernels that oneDNN keeps (512 here, 1,024 by its own default). |
| `NO_COLOR` | Set to anything: no colour at the terminal. |
"""

_BOUNDS = {"ge": "at least", "gt": "above", "le": "at most", "lt": "below"}
_NAMES: dict[Any, str] = {str: "text", int: "whole number", float: "number", bool: "`true`, `false`"}
_PLURALS: dict[Any, str] = {str: "texts", int: "whole numbers"}


def page() -> str:
    """docs/configuration.md."""
    sections = [_section(name, field.annotation) for name, field in Config.model_fields.items()]
    return "\n".join([INTRODUCTION, *sections, ENVIRONMENT])


def training_page() -> str:
    """docs/training-settings.md."""
    fields = TrainingConfig.model_fields.items()
    sections = [
        _section(name, section_of(field)) for name, field in fields if section_of(field) not in (None, CacheConfig)
    ]
    cache = TrainingConfig.model_fields["cache"]
    others = [
        f"| `{name}` | {_type(field)} | {_default(TrainingConfig, name, field)} | {_meaning(field)} |"
        for name, field in fields
        if section_of(field) is None
    ]
    note = f"## cache\n\n{_meaning(cache)} Its keys are in [Settings](configuration.md#cache).\n"
    head = ["## At the top", "", "| key | values | default | meaning |", "|---|---|---|---|"]
    return "\n".join([TRAINING_INTRODUCTION, *sections, note, *head, *others, ""])


def section_of(field: FieldInfo) -> type[Section] | None:
    """The section that a field is, if it is one."""
    kinds = (field.annotation, *get_args(field.annotation))
    return next((kind for kind in kinds if isinstance(kind, type) and issubclass(kind, Section)), None)


def _section(name: str, kind: Any) -> str:
    assert issubclass(kind, Section)
    note = " ".join((kind.__doc__ or "").split()) if kind.__doc__ != Section.__doc__ else ""
    rows = _rows(name, kind)
    head = [
        f"## {name}",
        "",
        *([note, ""] if note else []),
        "| key | values | default | meaning |",
        "|---|---|---|---|",
    ]
    return "\n".join([*head, *rows, ""])


def _rows(name: str, kind: type[Section]) -> list[str]:
    """A line for each key, those of sections inside by their whole path."""
    rows: list[str] = []
    for key, field in kind.model_fields.items():
        inside = section_of(field)
        if inside is not None:
            rows += _rows(f"{name}.{key}", inside)
            continue
        rows.append(f"| `{name}.{key}` | {_type(field)} | {_default(kind, key, field)} | {_meaning(field)} |")
    return rows


def _type(field: FieldInfo) -> str:
    bounds = {name: value for each in field.metadata for name, value in dataclasses.asdict(each).items()}
    limits = [f"{words} {_number(bounds[name])}" for name, words in _BOUNDS.items() if name in bounds]
    return ", ".join([_type_name(field.annotation), *([" and ".join(limits)] if limits else [])])


def _type_name(annotation: Any) -> str:
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin in (Union, UnionType):
        parts = [_type_name(each) for each in arguments if each is not NoneType]
        return " or ".join([*parts, "`null`"] if NoneType in arguments else parts)
    if origin is Literal:
        return ", ".join(f"`{value}`" for value in arguments)
    if origin is dict:
        return "mapping"
    if origin is tuple:
        return f"list of {_PLURALS.get(arguments[0]) or _type_name(arguments[0])}"
    if origin is dict:
        return "mapping of token ids to numbers"
    return _NAMES[annotation]


def _number(value: float) -> str:
    return next((f"2^{bits}" for bits in (62, 63) if value == 2**bits), f"{value:g}")


def _default(kind: type[Section], key: str, field: FieldInfo) -> str:
    """The value, or for a setting of some cache policies the value of each."""
    values = [(policy, settings[key]) for policy, settings in CACHE_DEFAULTS.items() if key in settings]
    if kind.__name__ != "CacheConfig" or not values:
        return _value(field.get_default(call_default_factory=True))
    if len({_value(value) for _, value in values}) == 1:
        return _value(values[0][1])
    if key == "design":
        return _value(values[0][1])
    return ", ".join(f"{' '.join(filter(None, policy))}: {_value(value)}" for policy, value in values)


def _value(value: Any) -> str:
    if value is PydanticUndefined:
        return "to be given"
    if isinstance(value, tuple):
        return f"`[{', '.join(str(each) for each in value)}]`"
    return f"`{value if isinstance(value, str) else json.dumps(value)}`"


def _meaning(field: FieldInfo) -> str:
    return " ".join((field.description or "").split()).replace("|", "\\|")


def main() -> None:
    """Write the pages; with --check, only say (by the exit code) whether they are what they should be."""
    pages = {PAGE: page(), TRAINING_PAGE: training_page()}
    if "--check" in sys.argv[1:]:
        sys.exit(any(path.read_text() != text for path, text in pages.items()))
    for path, text in pages.items():
        path.write_text(text)


if __name__ == "__main__":
    main()
