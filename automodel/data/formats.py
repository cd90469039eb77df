"""Recognise what a row holds, and bring it to one of three shapes: prompt with completion, messages, text with label."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

from automodel.data.readers import BadRow, require_text

FormatName = Literal["auto", "prompt_completion", "alpaca", "messages", "text_label"]


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
        tools = row.get("tools")
        return Messages(read, tools if isinstance(tools, list) and tools else None)

    def _read_text_label(self, row: Mapping[str, Any]) -> TextLabel:
        label = self._value(row, "label")
        if isinstance(label, bool) or not isinstance(label, int | str) or label == "":
            raise BadRow(f'the field "{self._fields["label"]}" must be a whole number or a name')
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
        BadRow: the fields are not those of a known format, or of several; it says which key settles it.
    """
    mapped = {column: field for column, field in columns.items() if field is not None}
    for column, field in mapped.items():
        if field not in row:
            raise BadRow(
                f'no field "{field}" (dataset.columns.{column}); fields: {", ".join(row)}{_nearest(field, row)}'
            )
    candidates = ("text_label",) if is_classification else _SFT_FORMATS
    if name != "auto":
        if name not in candidates:
            raise BadRow(f"dataset.format={name} does not suit this recipe; it takes {' or '.join(candidates)}")
        return RowFormat(name, _field_names(name, mapped, row))
    fits = [each for each in candidates if _fits(each, mapped, row)]
    if len(fits) > 1 and mapped:
        fits = [each for each in fits if set(mapped) <= set(_COLUMNS_OF[each])] or fits
    if len(fits) == 1:
        return RowFormat(fits[0], _field_names(fits[0], mapped, row))
    seen = ", ".join(row) or "none"
    if fits:
        raise BadRow(f"fields {seen} suit several formats; choose dataset.format={' or '.join(fits)}")
    wanted = "; ".join(f"{each}: {', '.join(_COLUMNS_OF[each])}" for each in candidates)
    raise BadRow(f"the fields {seen} are of no known format; name them with dataset.columns.* ({wanted})")


def _fits(name: str, mapped: Mapping[str, str], row: Mapping[str, Any]) -> bool:
    required = [column for column in _COLUMNS_OF[name] if column != "input"]
    if mapped and set(mapped) <= set(_COLUMNS_OF[name]) and all(c in mapped or c in row for c in required):
        return True
    return not mapped and any(all(field in row for field in sign) for sign in _SIGNS[name])


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
        raise BadRow(f'{where} has the role {role!r}; roles: {", ".join(_ROLES)}')
    content = turn.get("content")
    if isinstance(content, list):
        content = "".join(_read_part(part, where) for part in content)
    if content is None and role == "assistant" and turn.get("tool_calls"):
        content = ""
    text = require_text(content, f"{where}: content")
    if role == "assistant" and not text.strip() and not turn.get("tool_calls"):
        raise BadRow(f"{where}: the assistant's content is empty")
    return {key: value for key, value in turn.items() if value is not None} | {"content": text}


def _read_part(part: Any, where: str) -> str:
    if not isinstance(part, dict):
        raise BadRow(f"{where}: every part of the content must be an object")
    if part.get("type") not in ("text", "reasoning"):
        raise BadRow(f'{where}: a part of type {part.get("type")!r} is not supported; only text is')
    return require_text(part.get("text", part.get("value")), f"{where}: text")


def _nearest(name: str, row: Mapping[str, Any]) -> str:
    close = difflib.get_close_matches(name, list(row), n=1)
    return f'; did you mean "{close[0]}"?' if close else ""
