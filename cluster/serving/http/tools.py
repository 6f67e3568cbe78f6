"""Functions that a model may call: how the prompt shows them, and what binds a call to its schema.

A call that is asked for (tool_choice) begins in the prompt, in the markup of the model's template, and the answer is
the rest of it, bound by the function's schema.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from cluster.serving.http.fields import CalledFunction, Chat, Message, NamedTool, Tool
from cluster.serving.http.tool_calls import CallForm, ToolUse
from runtime.errors import InvalidRequestError
from runtime.request import ToolChat
from runtime.tokenizer import Tokenizer

Json = dict[str, Any]
MOST_DEPTH = 64
"""Of a schema."""


def prepare(body: Chat, tokenizer: Tokenizer) -> tuple[ToolChat, ToolUse | None, Json]:
    """The conversation as the template takes it; how calls are read, if there may be any; and what binds the answer.

    Raises InvalidRequestError.
    """
    messages = _messages(body.messages)
    choice = body.tool_choice
    if not body.tools:
        if choice not in (None, "none", "auto"):
            raise InvalidRequestError(
                "tool_choice", _shown(choice), "there are no tools", "Send some, or leave it out."
            )
        return ToolChat(messages, ()), None, {}
    names = [tool.function.name for tool in body.tools]
    if len(set(names)) != len(names):
        raise InvalidRequestError("tools", max(names, key=names.count), "is named twice", "Name each function once.")
    if choice == "none":
        return ToolChat(messages, ()), None, {}
    form = CallForm.of(tokenizer.chat_template or "")
    if form is None:
        problem, remedy = "the model writes calls in a form that is not read", "Leave them out, or take another model."
        raise InvalidRequestError("tools", f"{len(names)} tools", problem, remedy)
    tools = [_shown_tool(tool) for tool in body.tools]
    if choice in (None, "auto"):
        first_only = body.parallel_tool_calls is False
        bound = {"stop": (*(body.stop or ()), form.end.strip())} if first_only and form.end else {}
        return ToolChat(messages, tools), ToolUse(form, frozenset(names), None, first_only), bound
    if body.response_format is not None and body.response_format.type != "text":
        problem, remedy = "contradicts tool_choice, which asks for a call", "Leave one of them out."
        raise InvalidRequestError("response_format", body.response_format.type, problem, remedy)
    opening, schema = form.begin + ("[" if form.is_listed else ""), _schema_of_any(body.tools, form)
    use = ToolUse(form, frozenset(names), "")
    if isinstance(choice, NamedTool):
        name = choice.function.name
        if name not in names:
            raise InvalidRequestError("tool_choice", name, "is none of the tools", f"Known here: {', '.join(names)}.")
        opening += f'{{"name": {json.dumps(name)}, "{form.arguments}": '
        schema, use = _parameters(body.tools[names.index(name)]), ToolUse(form, frozenset(names), name)
    return ToolChat(messages, tools, opening), use, {"json_schema": schema}


def _shown(choice: Any) -> Any:
    return choice.function.name if isinstance(choice, NamedTool) else choice


def _messages(given: Sequence[Message]) -> list[Json]:
    """As templates take them: arguments are mappings, and a tool's answer has the function's name."""
    names: dict[str, str] = {}
    messages: list[Json] = []
    for index, each in enumerate(given):
        message: Json = {"role": "system" if each.role == "developer" else each.role, "content": each.content or ""}
        if each.content is None and not each.tool_calls:
            problem, remedy = "is missing", "Only an assistant that calls tools may leave it out."
            raise InvalidRequestError(f"messages[{index}].content", None, problem, remedy)
        if each.tool_calls:
            if each.role != "assistant":
                problem, remedy = "is not an assistant's", "Leave it out, or set the role to assistant."
                raise InvalidRequestError(f"messages[{index}].tool_calls", each.role, problem, remedy)
            names |= {call.id: call.function.name for call in each.tool_calls}
            message["tool_calls"] = [
                {"id": call.id, "type": "function", "function": _called(call.function, f"messages[{index}]")}
                for call in each.tool_calls
            ]
        if each.role == "tool":
            if each.tool_call_id not in names:
                problem, remedy = "is no id of a call before it", "Name the call that the message answers."
                raise InvalidRequestError(f"messages[{index}].tool_call_id", each.tool_call_id, problem, remedy)
            message |= {"tool_call_id": each.tool_call_id, "name": names[each.tool_call_id or ""]}
        elif each.tool_call_id is not None:
            problem, remedy = "is not a tool's", "Leave it out, or set the role to tool."
            raise InvalidRequestError(f"messages[{index}].tool_call_id", each.tool_call_id, problem, remedy)
        messages.append(message)
    return messages


def _called(function: CalledFunction, where: str) -> Json:
    try:
        arguments = json.loads(function.arguments)
    except (ValueError, RecursionError):
        arguments = None
    if not isinstance(arguments, dict):
        field = f"{where}.tool_calls.function.arguments"
        raise InvalidRequestError(field, "(not shown)", "is no JSON object", "Send it as the model wrote it.")
    return {"name": function.name, "arguments": arguments}


def _shown_tool(tool: Tool) -> Json:
    function = {"name": tool.function.name, "description": tool.function.description or ""}
    return {"type": "function", "function": function | {"parameters": _parameters(tool)}}


def _parameters(tool: Tool) -> Json:
    return tool.function.parameters or {"type": "object", "properties": {}, "additionalProperties": False}


def _schema_of_any(tools: Sequence[Tool], form: CallForm) -> Json:
    """Of a call of one of the functions. Each one's schema stands among the definitions, its references led there."""
    definitions = {
        f"tool{index}": _moved(_parameters(tool), f"#/$defs/tool{index}") for index, tool in enumerate(tools)
    }
    calls = [
        {
            "type": "object",
            "properties": {"name": {"const": tool.function.name}, form.arguments: {"$ref": f"#/$defs/tool{index}"}},
            "required": ["name", form.arguments],
            "additionalProperties": False,
        }
        for index, tool in enumerate(tools)
    ]
    return {"anyOf": calls, "$defs": definitions}


def _moved(schema: Any, place: str, depth: int = 0) -> Any:
    """A schema that stands at `place` from now on."""
    if depth > MOST_DEPTH:
        problem, remedy = "is nested too deeply", f"At most {MOST_DEPTH} levels."
        raise InvalidRequestError("tools.function.parameters", "(not shown)", problem, remedy)
    if isinstance(schema, Mapping):
        if "x-guidance" in schema:
            problem, remedy = "x-guidance is no keyword of JSON schemas", "Leave it out."
            raise InvalidRequestError("tools.function.parameters", "x-guidance", problem, remedy)
        moved = {key: _moved(value, place, depth + 1) for key, value in schema.items()}
        reference = moved.get("$ref")
        if isinstance(reference, str) and reference.startswith("#"):
            moved["$ref"] = place + reference[1:]
        return moved
    return [_moved(item, place, depth + 1) for item in schema] if isinstance(schema, list) else schema
