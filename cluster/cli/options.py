"""Command-line options that stand for fields of the config: written once there, never repeated by hand."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, get_args, get_origin

import typer

from runtime.config import Config, SamplingParams
from runtime.errors import ConfigError

ConfigOption = Annotated[
    Path | None, typer.Option("--config", help="YAML file with the sections of the config.", show_default="defaults")
]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Override one key, e.g. parallel.lp=2. Repeatable."),
]
AddressOption = Annotated[
    str | None,
    typer.Option(metavar="HOST:PORT", help="Ask a running server instead of loading the model here.", envvar=None),
]
PatienceOption = Annotated[
    float | None,
    typer.Option(
        min=0,
        metavar="S",
        help="Seconds that an answer is waited for whose server went away; it goes on where it was.",
        show_default="120",
    ),
]
PriorityOption = Annotated[
    int | None,
    typer.Option(metavar="N", help="Where requests wait, the highest comes first.", show_default="0"),
]
DeadlineOption = Annotated[
    float | None,
    typer.Option(
        metavar="S",
        help="Seconds after which an answer is of no use; what cannot be in time is refused.",
        show_default="none",
    ),
]
TokenOption = Annotated[
    Path | None,
    typer.Option("--token-file", help="With --address: file of the token.", show_default="OUTRIDER_TOKEN"),
]
TlsOption = Annotated[
    str | None,
    typer.Option(
        "--tls-ca",
        metavar="FILE",
        help="With --address: PEM file of the server's authority, or system; the connection is TLS.",
        show_default="OUTRIDER_TLS_CA",
    ),
]
LookaheadOption = Annotated[
    bool | None, typer.Option("--lookahead/--no-lookahead", help="Shorthand for lookahead.enabled.")
]
ColorOption = Annotated[
    bool | None,
    typer.Option("--color/--no-color", help="Tokens accepted in parallel in colour.", show_default="on a terminal"),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]

PER_REQUEST_SECTIONS = ("sampling", "lookahead")
"""Sections whose values a request may bring along."""


def with_sampling(command: Callable[..., None]) -> Callable[..., None]:
    """Give `command` one option per field of SamplingParams. Its argument `sampling` gets those that were named."""
    fields = SamplingParams.model_fields

    @functools.wraps(command)
    def wrapper(**arguments: Any) -> None:
        given = {name: arguments.pop(name) for name in fields}
        sampling = {name: value for name, value in given.items() if value is not None}
        for name, value in sampling.items():
            if get_origin(fields[name].annotation) is dict:
                sampling[name] = dict(_pair(name, text) for text in value)
        command(**arguments, sampling=sampling)

    options = []
    for name, field in fields.items():
        kind, default = _kind(field.annotation), field.get_default(call_default_factory=True)
        # Shown only: the value comes from the config, or from the server.
        shown = "none" if default in (None, (), {}) else str(default)
        metavar = "ID:BIAS" if get_origin(field.annotation) is dict else None
        option = typer.Option(help=field.description, show_default=shown, metavar=metavar)
        options.append(
            inspect.Parameter(
                name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[kind | None, option]
            )
        )
    own = [p for p in inspect.signature(command, eval_str=True).parameters.values() if p.name != "sampling"]
    keywords = [parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for parameter in own]
    wrapper.__signature__ = inspect.Signature([*keywords, *options])  # type: ignore[attr-defined]
    wrapper.__annotations__ = {}
    del wrapper.__wrapped__  # typer would read the annotations of what is wrapped
    return wrapper


def _kind(annotation: Any) -> Any:
    """What typer takes an option's values for."""
    if isinstance(annotation, UnionType):
        (annotation,) = (kind for kind in get_args(annotation) if kind is not NoneType)
    if get_origin(annotation) is tuple:
        return list[get_args(annotation)[0]]  # type: ignore[misc]
    if get_origin(annotation) is dict:
        return list[str]
    assert annotation in (int, float, bool, str), f"{annotation}: no kind of option"
    return annotation


def _pair(name: str, text: str) -> tuple[int, float]:
    """An entry of a mapping of numbers. Raises ConfigError."""
    key, _, value = text.partition(":")
    try:
        return int(key), float(value)
    except ValueError:
        option = f"--{name.replace('_', '-')}"
        raise ConfigError(option, text, "is not ID:BIAS", f"Write for example {option} 42:-1.5.") from None


def request_overrides(config: Path | None, settings: Sequence[str]) -> dict[str, dict[str, Any]]:
    """What --set says about requests, by section. Raises ConfigError for what only the server can decide."""
    if config is not None:
        remedy = "Start the server with it, or leave out --address."
        raise ConfigError("--config", str(config), "is not for a client: the server has its own", remedy)
    loaded = Config.load(None, settings)  # refuses unknown keys and bad values
    overrides: dict[str, dict[str, Any]] = {section: {} for section in PER_REQUEST_SECTIONS}
    for section in loaded.model_fields_set - overrides.keys():
        setting = next(setting for setting in settings if setting.strip().startswith(section))
        remedy = f"With --address, set keys of {' and '.join(PER_REQUEST_SECTIONS)} only."
        raise ConfigError("--set", setting, "is not for a client: the server decides that", remedy)
    for section in loaded.model_fields_set:
        given = getattr(loaded, section)
        overrides[section] = given.model_dump(mode="json", include=given.model_fields_set)
        for name, value in overrides[section].items():
            if value in (None, [], {}):  # the wire has no way to say so
                problem = "cannot be asked of a server, which would take its own default"
                raise ConfigError(f"{section}.{name}", value, problem, "Leave it out, or give a value.")
    return overrides
