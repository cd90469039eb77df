"""Recognise what a row holds and bring it to one shape: prompt and completion, messages, or text and label."""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

from automodel.data.readers import BadRow, require_text

FormatName = Literal["auto", "prompt_completion", "alpaca", "messages", "text_label"]


class UnknownFormat(BadRow):
    """The format of a whole file cannot be told; naming every row would say the same again and again."""


class PromptCompletion(NamedTuple):
    """Plain text of which the completion alone is supervised."""

    prompt: str
    completion: str
    kind: str | None = None


class Messages(NamedTuple):
    """A conversation; its assistant turns are supervised."""

    turns: list[dict[str, Any]]
    tools: list[dict[str, Any]] | None = None


class TextLabel(NamedTuple):
    """A text and the name of its class."""

    text: str
    label: str


# Fields by which a format is known, in the order in which they are looked for.
_SIGNS: dict[str, tuple[tuple[str, ...], ...]] = {
    "messages": (("messages",),),
    "prompt_completion": (("prompt", "completion"), ("question", "answer")),
    "alpaca": (("instruction", "output"),),
    "text_label": (("text", "label"), ("sentence", "label"), ("title", "description", "label")),
}
_SFT_FORMATS = ("messages", "prompt_completion", "alpaca")
_ROLES = ("system", "user", "assistant", "tool")
_COLUMNS_OF = {
    "messages": ("messages",),
    "prompt_completion": ("prompt", "completion"),
    "alpaca": ("instruction", "input", "output"),
    "text_label": ("text", "label"),
}


class RowFormat:
    """Reads rows of one format; chosen from the first row, or by name."""

    def __init__(self, name: str, fields: Mapping[str, str]) -> None:
        self.name = name
        self._fields = fields

    def read(self, row: Mapping[str, Any]) -> PromptCompletion | Messages | TextLabel:
        """Bring a row to its shape.

        Raises:
            BadRow: a field is missing, of the wrong type, or an answer is empty.
        """
        return getattr(self, f"_read_{self.name}")(row)

    def _read_prompt_completion(self, row: Mapping[str, Any]) -> PromptCompletion:
        kind = row.get("kind")
        completion = self._text(row, "completion", may_be_empty=False)
        return PromptCompletion(self._text(row, "prompt"), completion, kind if isinstance(kind, str) else None)

    def _read_alpaca(self, row: Mapping[str, Any]) -> Messages:
        instruction = self._text(row, "instruction", may_be_empty=False)
        extra = self._text(row, "input") if row.get(self._fields["input"]) is not None else ""
        question = f"{instruction}\n\n{extra}" if extra.strip() else instruction
        answer = self._text(row, "output", may_be_empty=False)
        return Messages([{"role": "user", "content": question}, {"role": "assistant", "content": answer}])

    def _read_messages(self, row: Mapping[str, Any]) -> Messages:
        turns = self._value(row, "messages")
        if not isinstance(turns, list) or not turns:
            raise BadRow(f'the field "{self._fields["messages"]}" must be a list of messages that is not empty')
        read = [_read_turn(turn, number) for number, turn in enumerate(turns, start=1)]
        if not any(turn["role"] == "assistant" for turn in read):
            raise BadRow("no message of the assistant: there is nothing to train on")
        return Messages(read, _read_tools(row.get("tools")))

    def _read_text_label(self, row: Mapping[str, Any]) -> TextLabel:
        label = self._value(row, "label")
        if isinstance(label, bool) or not isinstance(label, int | str) or label == "":
            raise BadRow(f'the field "{self._fields["label"]}" must be a whole number or a name')
        if isinstance(label, str):
            require_text(label, self._fields["label"])
        if "text" in self._fields:
            text = self._text(row, "text", may_be_empty=False)
        else:
            text = "\n".join(self._text(row, name) for name in ("title", "description"))
        return TextLabel(text, str(label))

    def _value(self, row: Mapping[str, Any], column: str) -> Any:
        name = self._fields.get(column, column)
        if name not in row:
            raise BadRow(f'no field "{name}"; fields: {", ".join(row) or "none"}{_nearest(name, row)}')
        return row[name]

    def _text(self, row: Mapping[str, Any], column: str, *, may_be_empty: bool = True) -> str:
        name = self._fields.get(column, column)
        text = require_text(self._value(row, column), name)
        if not may_be_empty and not text.strip():
            raise BadRow(f'the field "{name}" is empty')
        return text


def choose_format(
    name: FormatName, columns: Mapping[str, str | None], *, row: Mapping[str, Any], is_classification: bool
) -> RowFormat:
    """Return the format of a file from its name or, with ``auto``, from the columns mapped and its first row.

    Raises:
        UnknownFormat: the fields are not those of a known format, or of several; it says which key settles it.
    """
    mapped = {column: field for column, field in columns.items() if field is not None}
    for column, field in mapped.items():
        if field not in row:
            seen = ", ".join(row) or "none"
            raise UnknownFormat(f'no field "{field}" (dataset.columns.{column}); fields: {seen}{_nearest(field, row)}')
    candidates = ("text_label",) if is_classification else _SFT_FORMATS
    if name != "auto":
        if name not in candidates:
            raise UnknownFormat(f"dataset.format={name} does not suit this recipe; it takes {' or '.join(candidates)}")
        return RowFormat(name, _field_names(name, mapped, row))
    fits = [each for each in candidates if _fits(each, mapped, row)]
    if len(fits) > 1 and mapped:
        fits = [each for each in fits if set(mapped) <= set(_COLUMNS_OF[each])] or fits
    if len(fits) == 1:
        return RowFormat(fits[0], _field_names(fits[0], mapped, row))
    seen = ", ".join(row) or "none"
    if fits:
        raise UnknownFormat(f"fields {seen} suit several formats; choose dataset.format={' or '.join(fits)}")
    wanted = "; ".join(f"{each}: {', '.join(_COLUMNS_OF[each])}" for each in candidates)
    raise UnknownFormat(f"the fields {seen} are of no known format; name them with dataset.columns.* ({wanted})")


def _fits(name: str, mapped: Mapping[str, str], row: Mapping[str, Any]) -> bool:
    if not set(mapped) <= set(_COLUMNS_OF[name]):
        return False
    required = [column for column in _COLUMNS_OF[name] if column != "input"]
    if mapped and all(column in mapped or column in row for column in required):
        return True
    if mapped and "label" not in mapped:
        return False
    return any(all(field in row or field in mapped for field in sign) for sign in _SIGNS[name])


def _field_names(name: str, mapped: Mapping[str, str], row: Mapping[str, Any]) -> dict[str, str]:
    fields = {column: column for column in _COLUMNS_OF[name]}
    if name == "prompt_completion" and not mapped and "prompt" not in row and "question" in row:
        fields = {"prompt": "question", "completion": "answer"}
    if name == "text_label" and "text" not in mapped and "text" not in row:
        if "sentence" in row:
            fields["text"] = "sentence"
        elif "title" in row and "description" in row:
            del fields["text"]
    return fields | mapped


def _read_turn(turn: Any, number: int) -> dict[str, Any]:
    where = f"message {number}"
    if not isinstance(turn, dict):
        raise BadRow(f"{where} must be an object with role and content")
    role = turn.get("role")
    if role not in _ROLES:
        raise BadRow(f"{where} has the role {role!r}; roles: {', '.join(_ROLES)}")
    content = turn.get("content")
    if isinstance(content, list):
        content = "".join(_read_part(part, where) for part in content)
    if content is None and role == "assistant" and turn.get("tool_calls"):
        content = ""
    text = require_text(content, f"{where}: content")
    if role == "assistant" and not text.strip() and not turn.get("tool_calls"):
        raise BadRow(f"{where}: the assistant's content is empty")
    _require_usual_weight(turn, where)
    return {key: value for key, value in turn.items() if value is not None} | {"content": text}


def _require_usual_weight(turn: Mapping[str, Any], where: str) -> None:
    """Refuse a message that wants another weight than it gets: 1 for the assistant's, 0 for the others."""
    usual = 1 if turn["role"] == "assistant" else 0
    for key in ("loss_weight", "weight"):
        weight = turn.get(key)
        if weight is not None and weight != usual:
            raise BadRow(
                f"{where}: {key}={weight!r} is not supported: the assistant's messages are trained on with weight 1, "
                "the others not at all; drop the message or the field"
            )


def _read_tools(tools: Any) -> list[dict[str, Any]] | None:
    """Return the tool schemas of a row, which some data sets hold as JSON text; None: it has none."""
    if isinstance(tools, str) and tools.strip():
        try:
            tools = json.loads(tools)
        except ValueError:
            raise BadRow('the field "tools" is text, but not JSON') from None
    if not tools:
        return None
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise BadRow('the field "tools" must be a list of objects')
    return tools


def _read_part(part: Any, where: str) -> str:
    if not isinstance(part, dict):
        raise BadRow(f"{where}: every part of the content must be an object")
    if part.get("type") != "text":
        raise BadRow(f"{where}: a part of type {part.get('type')!r} is not supported; only text is")
    return require_text(part.get("text", part.get("value")), f"{where}: text")


def _nearest(name: str, row: Mapping[str, Any]) -> str:
    close = difflib.get_close_matches(name, list(row), n=1)
    return f'; did you mean "{close[0]}"?' if close else ""
