"""Messages and tools: what the chat template is handed.

A message needs a role and a content; its other fields (`name`, `tool_calls`, …) go to the template
as they are. A content given as a list of text parts becomes one string, the parts joined by
newlines, since most templates know strings alone.
"""

from __future__ import annotations

from typing import Any

from pdbatch.formats.problems import Problem, kind, show

MAX_LEVELS = 32
"""Levels of lists and objects within a message or a tool."""


def checked_messages(messages: list[dict[str, Any]], path: str) -> list[dict[str, Any]]:
    """The messages, fit for a template. Changes them in place; raises Problem."""
    if not messages:
        raise Problem(f"{path} is empty", "give at least one message", param=path)
    for i, message in enumerate(messages):
        if (
            len(message) == 2
            and type(message.get("content")) is str
            and type(role := message.get("role")) is str
            and role
        ):
            continue  # nearly every message
        _check_message(message, f"{path}[{i}]")
    return messages


def checked_tools(tools: list[dict[str, Any]], path: str) -> list[dict[str, Any]] | None:
    """The tools, or None where the list is empty. Raises Problem."""
    for i, tool in enumerate(tools):
        check_free(tool, f"{path}[{i}]")
    return tools or None


def _check_message(message: dict[str, Any], path: str) -> None:
    role = message.get("role")
    if not isinstance(role, str) or not role:
        what = "is missing" if role is None else f"is {kind(role)}" if role != "" else "is empty"
        raise Problem(
            f"{path}.role {what}",
            "give system, user, assistant or another role of the model's template",
            param=f"{path}.role",
        )
    content = message.get("content")
    if isinstance(content, list):
        message["content"] = _joined(content, f"{path}.content")
    elif content is None:
        if not message.get("tool_calls"):
            raise Problem(f"{path}.content is missing", "give a string", param=f"{path}.content")
    elif not isinstance(content, str):
        raise Problem(
            f"{path}.content is {kind(content)}",
            "give a string or a list of text parts",
            param=f"{path}.content",
        )
    for value in message.values():
        if not isinstance(value, str):
            check_free(value, path)


def _joined(parts: list[Any], path: str) -> str:
    if not parts:
        raise Problem(f"{path} is an empty list", "give a string", param=path)
    return "\n".join(_part_text(part, f"{path}[{i}]") for i, part in enumerate(parts))


def _part_text(part: Any, path: str) -> str:
    if isinstance(part, str):
        return part
    if not isinstance(part, dict):
        raise Problem(f"{path} is {kind(part)}", 'give {"type": "text", "text": "…"}', param=path)
    what = part.get("type")
    if what != "text":
        named = show(what) if isinstance(what, str) else kind(what)
        raise Problem(
            f"{path} is a part of type {named}, which a text model cannot read",
            "send parts of type text alone",
            param=f"{path}.type",
        )
    text = part.get("text")
    if not isinstance(text, str):
        raise Problem(f"{path}.text is {kind(text)}", "give a string", param=f"{path}.text")
    return text


def check_free(value: Any, path: str) -> None:
    """Raises Problem where free JSON is deeper, or its integers larger, than can be passed on."""
    level, depth = [value], 0
    while level:
        depth += 1
        if depth > MAX_LEVELS:
            raise Problem(
                f"{path} is nested deeper than {MAX_LEVELS} levels",
                "send fewer levels of brackets",
                param=path,
            )
        below: list[Any] = []
        for item in level:
            if isinstance(item, dict):
                below.extend(item.values())
            elif isinstance(item, list):
                below.extend(item)
            elif isinstance(item, int) and not -(2**63) <= item < 2**63:
                raise Problem(
                    f"an integer in {path} needs more than 64 bits",
                    "send it as a string",
                    param=path,
                )
        level = below
