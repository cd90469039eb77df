"""Read the messages of a row, as OpenAI or ShareGPT spell them, into turns that a chat template takes."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

from automodel.data.formats.samples import Turn
from automodel.data.rows import BadRow, require_text

_ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "assistant": "assistant",
    "tool": "tool",
    "function": "tool",
}
_SHAREGPT_ROLES = _ROLES | {
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "function_call": "function_call",
    "observation": "tool",
}
_WEIGHT_KEYS = ("weight", "loss_weight")
_FLAG_KEYS = ("train", "training")
"""Whether a message is trained on, as other tools call it."""
_FLAGS = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}


def read_turns(value: Any, name: str) -> tuple[list[Turn], list[float | None] | None]:
    """Return the turns of a list of messages and their loss weights, None where no message has one.

    Raises:
        BadRow: it is not a list of messages, or a message cannot be read.
    """
    if isinstance(value, str):
        value = _parsed(value, f'the field "{name}"')
    if not isinstance(value, list) or not value:
        raise BadRow(f'the field "{name}" must be a list of messages that is not empty')
    turns = [read_turn(turn, f"message {number}") for number, turn in enumerate(value, start=1)]
    weights = [_read_weight(turn, f"message {number}") for number, turn in enumerate(value, start=1)]
    return turns, None if all(weight is None for weight in weights) else weights


def read_turn(turn: Any, where: str) -> Turn:
    """Return one message with its role, its content as text, its reasoning and its calls of tools.

    Raises:
        BadRow: the message cannot be read.
    """
    if not isinstance(turn, dict):
        raise BadRow(f"{where} must be an object with role and content, or with from and value")
    turn = without_nulls(turn)
    is_sharegpt = "from" in turn and "role" not in turn
    given, content = (turn["from"], turn.get("value")) if is_sharegpt else (turn.get("role"), turn.get("content"))
    roles = _SHAREGPT_ROLES if is_sharegpt else _ROLES
    role = roles.get(given) if isinstance(given, str) else None
    if role is None:
        raise BadRow(f"{where} has the role {given!r}; roles: {', '.join(roles)}")
    dropped = {"function_call", *_WEIGHT_KEYS, *_FLAG_KEYS} | ({"from", "value"} if is_sharegpt else set())
    read = {key: each for key, each in turn.items() if key not in dropped}
    if call := turn.get("function_call"):
        if read.get("tool_calls"):
            raise BadRow(f"{where}: function_call is the older name of tool_calls; keep one of them")
        read["tool_calls"] = [call] if isinstance(call, dict) else _parsed_call(call, where)
    if role == "function_call":
        return read | {"role": "assistant", "content": "", "tool_calls": _read_call_text(content, where)}
    if isinstance(content, list):
        content, extra = _read_parts(content, role, where)
        if any(key in read for key in extra):
            raise BadRow(f"{where}: {' and '.join(extra)} stand both beside the content and in its parts")
        read |= extra
    if read.get("tool_calls"):
        if role != "assistant":
            raise BadRow(f"{where}: tool_calls are the assistant's, not the {role}'s")
        calls = read["tool_calls"]
        read["tool_calls"] = _read_calls(_parsed_call(calls, where) if isinstance(calls, str) else calls, where)
        content = "" if content is None else content
    if "reasoning_content" in read:
        require_text(read["reasoning_content"], f"{where}: reasoning_content")
    text = require_text(content, f"{where}: {'value' if is_sharegpt else 'content'}")
    if role == "assistant" and not text.strip() and not read.get("tool_calls"):
        raise BadRow(f"{where}: the assistant's content is empty")
    return read | {"role": role, "content": text}


def read_tools(tools: Any) -> list[dict[str, Any]] | None:
    """Return the tool schemas of a row, which some data sets hold as JSON text; None: it has none.

    Each gets the form ``{"type": "function", "function": {...}}``, which templates expect.

    Raises:
        BadRow: they are no list of objects.
    """
    tools = _parsed(tools, 'the field "tools"') if isinstance(tools, str) and tools.strip() else without_nulls(tools)
    if not tools:
        return None
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise BadRow('the field "tools" must be a list of objects')
    return [
        {"type": "function", "function": tool} if "name" in tool and "function" not in tool else tool for tool in tools
    ]


def with_system(turns: list[Turn], weights: list[float | None] | None, system: str) -> tuple[list[Turn], Any]:
    """Put a system's message before the turns, unless it is blank.

    Raises:
        BadRow: there is one already.
    """
    if not system.strip():
        return turns, weights
    if turns[0]["role"] == "system":
        raise BadRow("a system field, and a message of the system as well; drop one of them")
    return [{"role": "system", "content": system}, *turns], None if weights is None else [None, *weights]


def without_nulls(value: Any) -> Any:
    """Return ``value`` without the keys of objects that hold null, at any depth.

    Parquet and Arrow give each object the keys of all others, null where it had none. An object that JSON Lines hold
    is treated in the same way, so that both train the same tokens; what is JSON text keeps its nulls in both.
    """
    if isinstance(value, dict):
        return {key: without_nulls(each) for key, each in value.items() if each is not None}
    return [without_nulls(each) for each in value] if isinstance(value, list) else value


def _read_weight(turn: Mapping[str, Any], where: str) -> float | None:
    """Return a message's loss weight, which it may give as a number or as whether it is trained on, also as text."""
    weights = {key: _weight(turn[key], f"{where}: {key}") for key in _WEIGHT_KEYS if turn.get(key) is not None}
    flags = {key: _flag(turn[key], f"{where}: {key}") for key in _FLAG_KEYS if turn.get(key) is not None}
    given = set(weights.values()) or {float(flag) for flag in flags.values()}
    if len(given) > 1 or any(bool(weight) != flag for weight in given for flag in flags.values()):
        raise BadRow(f"{where}: {' and '.join([*weights, *flags])} differ; keep one of them")
    return given.pop() if given else None


def _weight(value: Any, what: str) -> float:
    try:
        weight = float(_FLAGS.get(value.strip().lower(), value) if isinstance(value, str) else value)
    except (TypeError, ValueError):
        weight = math.nan
    if not 0 <= weight < math.inf:
        raise BadRow(f"{what}={value!r} must be a number that is not negative")
    return weight


def _flag(value: Any, what: str) -> bool:
    flag = _FLAGS.get(str(value).strip().lower().removesuffix(".0"))
    if flag is None:
        raise BadRow(f"{what}={value!r} must be true or false")
    return flag


def _read_parts(parts: list[Any], role: str, where: str) -> tuple[str, dict[str, Any]]:
    """Join the text of a content's parts; reasoning and calls of tools become fields of the message."""
    texts: list[str] = []
    reasoning: list[str] = []
    calls: list[Any] = []
    for part in parts:
        if not isinstance(part, dict):
            raise BadRow(f"{where}: every part of the content must be an object")
        kind = part.get("type")
        value = part.get("text", part.get("value"))
        if kind in ("reasoning", "tool_call") and role != "assistant":
            raise BadRow(f"{where}: a part of type {kind!r} is the assistant's, not the {role}'s")
        # A template writes thoughts first and calls last: another order would be lost.
        if (kind == "reasoning" and (texts or calls)) or (kind == "text" and calls):
            raise BadRow(f"{where}: reasoning, text and tool_call parts must be in this order")
        if kind == "text":
            texts.append(require_text(value, f"{where}: text"))
        elif kind == "reasoning":
            reasoning.append(require_text(value, f"{where}: reasoning"))
        elif kind == "tool_call":
            calls += _read_call_text(value, where)
        else:
            raise BadRow(
                f"{where}: a part of type {kind!r} is not supported; only text, reasoning and tool_call parts are"
            )
    extra = {"reasoning_content": "\n".join(reasoning), "tool_calls": calls}
    return "".join(texts), {key: value for key, value in extra.items() if value}


def _read_call_text(value: Any, where: str) -> list[dict[str, Any]]:
    """Return the calls that JSON text holds: one object of name and arguments, or a list of them."""
    return _read_calls(_parsed_call(value, where), where)


def _parsed_call(value: Any, where: str) -> list[Any]:
    parsed = _parsed(require_text(value, f"{where}: the tool call"), f"{where}: the tool call")
    return parsed if isinstance(parsed, list) else [parsed]


def _read_calls(calls: Any, where: str) -> list[dict[str, Any]]:
    """Return calls of tools, their arguments as they are: an object, or its JSON text."""
    if not isinstance(calls, list):
        raise BadRow(f"{where}: tool_calls must be a list")
    read = []
    for call in calls:
        function = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str) or not function["name"]:
            raise BadRow(f"{where}: a tool call must have a name")
        arguments = function.get("arguments", function.get("parameters")) or {}
        is_text = isinstance(arguments, str)
        if not isinstance(
            _parsed(arguments, f"{where}: the arguments of {function['name']!r}") if is_text else arguments, dict
        ):
            raise BadRow(f"{where}: the arguments of {function['name']!r} must be an object")
        outer = {key: call[key] for key in ("id", "type") if call.get(key) is not None}
        read.append({"type": "function"} | outer | {"function": {"name": function["name"], "arguments": arguments}})
    return read


def _parsed(text: str, what: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        raise BadRow(f"{what} is text, but not JSON") from None
