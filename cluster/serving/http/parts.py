"""JSON objects of calls: read strictly, and refused by field, value and remedy."""

from __future__ import annotations

import re
from typing import Annotated, Any, Self

from pydantic import ConfigDict, Field, ValidationError, ValidationInfo, field_validator
from pydantic.fields import FieldInfo

from runtime.config import Section
from runtime.errors import InvalidRequestError

RENAMED = {"functions": "tools", "function_call": "tool_choice"}
"""What OpenAI called fields earlier."""


class Part(Section):
    """A JSON object. null stands for a field that is left out."""

    refusal = InvalidRequestError
    model_config = ConfigDict(strict=True)

    @field_validator("*", mode="after")
    @classmethod
    def _no_switch_for_a_number(cls, value: Any, info: ValidationInfo) -> Any:
        """Instead of Section's, which would make Python's values of JSON's: strict numbers are no switches anyway."""
        return value

    @classmethod
    def read(cls, content: bytes) -> Self:
        """The body of a call. Raises InvalidRequestError naming the field."""
        try:
            return cls.model_validate_json(content)
        except ValidationError as error:
            raise refusal(cls, error) from None

    def given(self, names: tuple[str, ...]) -> dict[str, Any]:
        """Those of the fields that were given."""
        return {name: value for name in names if (value := getattr(self, name)) is not None}


class Made(Part):
    """Base of those that are made here of other fields, which have their descriptions with them."""

    model_config = ConfigDict(use_attribute_docstrings=False)


def refusal(cls: type[Section], error: ValidationError) -> InvalidRequestError:
    """What is wrong with a body, by field, value and remedy."""
    first = error.errors(include_url=False)[0]
    path = ""
    for part in first["loc"]:
        if isinstance(part, str) and not re.fullmatch(r"[a-z0-9_.-]+", part):
            continue  # of a union, the kind that was tried
        path += f"[{part}]" if isinstance(part, int) else f".{part}" if path else str(part)
    if first["type"] == "json_invalid":
        return InvalidRequestError("body", "(not shown)", f"is no JSON ({first['ctx']['error']})", "Send one object.")
    if first["type"] == "extra_forbidden":
        name = str(first["loc"][-1])
        near = f"Did you mean {RENAMED[name]}? " if name in RENAMED else ""
        fields = _fields_at(cls, first["loc"][:-1])
        return InvalidRequestError(path, first["input"], "unknown field", f"{near}Known here: {', '.join(fields)}.")
    problem = first["msg"].removeprefix("Value error, ")
    if first["type"] == "value_error" and ": " in problem:
        name, problem = problem.split(": ", 1)
        problem, _, remedy = problem.partition("; ")
        path = f"{path}[{name}]" if name[0].isdigit() else f"{path}.{name}" if path else name
        return InvalidRequestError(path, "(see there)", problem, f"{remedy[:1].upper()}{remedy[1:]}.")
    problem = f"{problem[:1].lower()}{problem[1:]}"
    return InvalidRequestError(path or "body", first["input"], problem, "See docs/http.md for what it may be.")


def _fields_at(cls: Any, path: tuple[int | str, ...]) -> list[str]:
    for part in path:
        if isinstance(part, int):
            continue
        field = getattr(cls, "model_fields", {}).get(part)
        inner = [kind for kind in _kinds(field.annotation) if hasattr(kind, "model_fields")] if field else []
        cls = inner[0] if inner else cls
    fields = getattr(cls, "model_fields", {})
    return sorted(field.alias or name for name, field in fields.items())


def _kinds(annotation: Any) -> list[Any]:
    arguments = getattr(annotation, "__args__", ())
    return [annotation, *(kind for argument in arguments for kind in _kinds(argument))]


def optional(field: FieldInfo) -> tuple[Any, Any]:
    """A config's field as one that a call may leave out: with its type, bounds and description."""
    kind: Any = Annotated[(field.annotation, *field.metadata)] if field.metadata else field.annotation
    return kind | None, Field(default=None, description=field.description)
