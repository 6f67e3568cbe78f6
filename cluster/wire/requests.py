"""Requests on the wire: what a client sends as messages, and what a server reads out of them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import DecodeError, Message
from google.protobuf.unknown_fields import UnknownFieldSet

from cluster.pb.outrider.v1 import generation_pb2 as pb
from runtime.config import LookaheadConfig, SamplingParams
from runtime.errors import InvalidRequestError
from runtime.prompts import as_messages, as_token_ids, check_shapes
from runtime.request import AnswerSoFar, Prompt

M = TypeVar("M", bound=Message)

MAX_ID_LENGTH = 128
_WHOLE = (FieldDescriptor.CPPTYPE_INT32, FieldDescriptor.CPPTYPE_INT64)

# To messages


def prompted(
    kind: Any,
    prompt: str | None,
    messages: Sequence[Mapping[str, str]] | None,
    token_ids: Sequence[int] | None,
    sampling: Mapping[str, Any] | None,
    lookahead: Mapping[str, Any] | None,
) -> Any:
    """A GenerateRequest or a Turn: the prompt, and the parameters that are named. Raises InvalidRequestError."""
    name, value = one_prompt(prompt, messages, token_ids)
    request = kind(
        **_message("sampling", pb.SamplingParams, sampling), **_message("lookahead", pb.LookaheadParams, lookahead)
    )
    try:
        if name == "messages":
            request.messages.CopyFrom(pb.ChatMessages(messages=[pb.ChatMessage(**message) for message in value]))
        elif name == "token_ids":
            request.token_ids.CopyFrom(pb.TokenIds(ids=value))
        else:
            request.text = value
    except (TypeError, ValueError) as error:
        remedy = f"See {kind.DESCRIPTOR.name} in the proto."
        raise InvalidRequestError(name, value, f"cannot be sent ({error})", remedy) from error
    return request


def set_urgency(request: Any, priority: int | None, deadline_s: float | None) -> None:
    """Write priority and deadline into a GenerateRequest or a Turn. Raises InvalidRequestError."""
    for name, value in (("priority", priority), ("deadline_s", deadline_s)):
        if value is None:
            continue
        try:
            if isinstance(value, bool):
                raise TypeError("a truth value")
            setattr(request, name, value)
        except (TypeError, ValueError) as error:
            problem, remedy = f"cannot be sent ({error})", "Give a number."
            raise InvalidRequestError(name, value, problem, remedy) from error


def one_prompt(
    prompt: str | None, messages: Sequence[Mapping[str, str]] | None, token_ids: Sequence[int] | None
) -> tuple[str, Any]:
    """The one that is given, and its name on the wire. Raises InvalidRequestError if it is not one, or cannot be."""
    given = {"text": prompt, "messages": messages, "token_ids": token_ids}
    kinds = [kind for kind, value in given.items() if value is not None]
    if len(kinds) != 1:
        raise InvalidRequestError("prompt", kinds, "is not one prompt", "Give one of prompt, messages, token_ids.")
    name = kinds[0]
    if name == "messages":
        value = as_messages(messages)
        check_shapes(value)  # the wire would take None for an empty text
        return name, value
    if name == "token_ids":
        return name, as_token_ids(token_ids)
    if not isinstance(prompt, str):
        remedy = "Hand in a text; token_ids and messages have arguments of their own."
        raise InvalidRequestError("prompt", prompt, "is no text", remedy)
    return name, prompt


def _message(section: str, kind: Any, values: Mapping[str, Any] | None) -> dict[str, Any]:
    """Keyword argument for one parameter section, or none."""
    if values is None:
        return {}
    if isinstance(values, SamplingParams | LookaheadConfig):
        values = values.model_dump(include=values.model_fields_set, exclude_none=True)
    if not isinstance(values, Mapping):
        problem, remedy = f"is of type {type(values).__name__}", "Hand in a mapping of what differs from the server's."
        raise InvalidRequestError(section, values, problem, remedy)
    known = kind.DESCRIPTOR.fields_by_name
    message = kind()
    for name, value in values.items():
        if name not in known:
            raise InvalidRequestError(f"{section}.{name}", value, "unknown key", f"Known here: {', '.join(known)}.")
        is_switch = known[name].cpp_type == known[name].CPPTYPE_BOOL
        if (
            value is None
            or isinstance(value, bool)
            and not is_switch
            or isinstance(value, str)
            and known[name].is_repeated
        ):
            problem, remedy = (
                f"cannot be sent, being {value!r:.60}",
                "Give a value of the field's type, or leave it out.",
            )
            raise InvalidRequestError(f"{section}.{name}", value, problem, remedy)
        if isinstance(value, float) and value.is_integer() and known[name].cpp_type in _WHOLE:
            value = int(value)  # as the engine takes it
        if isinstance(value, Mapping) and known[name].cpp_type == known[name].CPPTYPE_STRING:  # a JSON schema
            value = json.dumps(value)
        if isinstance(value, Mapping) and is_map(known[name]):  # keys of JSON are texts
            value = {int(key) if isinstance(key, str) and key.isdecimal() else key: item for key, item in value.items()}
        try:
            message.MergeFrom(kind(**{name: value}))
        except (TypeError, ValueError) as error:
            problem, remedy = f"cannot be sent ({error})", "Give a value of the field's type."
            raise InvalidRequestError(f"{section}.{name}", value, problem, remedy) from error
    return {section: message} if values else {}


# From messages


def parse(kind: type[M], content: bytes) -> M:
    """The message that came as these bytes. Raises InvalidRequestError if it is none, or has unknown fields."""
    try:
        message = kind.FromString(content)
    except (DecodeError, ValueError) as error:
        problem = f"{len(content)} bytes are no {kind.DESCRIPTOR.name} ({error})"
        remedy = "Send a message of the proto's type; its texts are UTF-8."
        raise InvalidRequestError("request", f"{content[:16].hex(' ')} ...", problem, remedy) from error
    refuse_unknown_fields(message)
    return message


def refuse_unknown_fields(message: Message, path: str = "") -> None:
    """Raise InvalidRequestError if the sender set a field that this version's proto does not have."""
    for unknown in UnknownFieldSet(message):
        where, problem = path or "request", f"the message has no field with number {unknown.field_number}"
        remedy = "Leave the field out, or use a server as new as the client."
        raise InvalidRequestError(where, f"field {unknown.field_number}", problem, remedy)
    for field, value in message.ListFields():
        if field.type != field.TYPE_MESSAGE or is_map(field):
            continue
        name = f"{path}.{field.name}" if path else field.name
        if field.is_repeated:
            for index, item in enumerate(value):
                refuse_unknown_fields(item, f"{name}[{index}]")
        else:
            refuse_unknown_fields(value, name)


def read_prompt(request: pb.GenerateRequest | pb.Turn) -> Prompt:
    """The prompt as `Engine.make_request` takes it. Raises InvalidRequestError if it is missing or empty."""
    kind = request.WhichOneof("prompt")
    if kind is None:
        raise InvalidRequestError("prompt", None, "is missing", "Set one of text, messages and token_ids.")
    prompt: Prompt
    if kind == "text":
        prompt = request.text
    elif kind == "messages":
        prompt = [{"role": message.role, "content": message.content} for message in request.messages.messages]
    else:
        prompt = list(request.token_ids.ids)
    if not prompt:
        raise InvalidRequestError(kind, prompt, "is empty", "Send a prompt that is not empty.")
    return prompt


def read_so_far(request: pb.GenerateRequest | pb.Turn) -> tuple[AnswerSoFar, ...]:
    """What the client has already of the answers."""
    if isinstance(request, pb.Turn):
        return (AnswerSoFar(tuple(request.resume_from)),) if request.resume_from else ()
    return tuple(AnswerSoFar(tuple(one.token_ids), one.index, one.has_ended) for one in request.resume_from)


def read_urgency(request: pb.GenerateRequest | pb.Turn) -> dict[str, Any]:
    """Priority and deadline, as arguments of `Engine.make_request`."""
    return {name: getattr(request, name) for name in ("priority", "deadline_s") if request.HasField(name)}


def read_id(request: Message, field: str) -> str | None:
    """The id that the client chose, if it did. Raises InvalidRequestError."""
    if not request.HasField(field):
        return None
    name = str(getattr(request, field))
    if not 1 <= len(name) <= MAX_ID_LENGTH:
        remedy = f"Give 1 to {MAX_ID_LENGTH} characters, or leave it out."
        raise InvalidRequestError(field, name, "is empty or too long", remedy)
    return name


def read_sampling(request: pb.GenerateRequest | pb.Turn, defaults: SamplingParams) -> SamplingParams:
    """`defaults` with the fields that the client set. Raises InvalidRequestError naming the field."""
    return defaults.merged(_set_fields(request.sampling), prefix="sampling.")


def read_lookahead(request: pb.GenerateRequest | pb.Turn, defaults: LookaheadConfig) -> LookaheadConfig:
    """`defaults` with the fields that the client set. Raises InvalidRequestError naming the field."""
    return defaults.merged(_set_fields(request.lookahead), prefix="lookahead.")


def _set_fields(message: Message) -> dict[str, Any]:
    # Lists cannot say that they are unset, so an empty one keeps the default, as the proto states.
    return {field.name: _value(field, value) for field, value in message.ListFields()}


def _value(field: FieldDescriptor, value: Any) -> Any:
    if not field.is_repeated:
        return value
    return dict(value) if is_map(field) else tuple(value)


def is_map(field: FieldDescriptor) -> bool:
    """Whether the field is a map, which a message has as repeated entries."""
    return field.type == field.TYPE_MESSAGE and field.message_type.GetOptions().map_entry
