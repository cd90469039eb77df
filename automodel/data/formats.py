"""Recognise what a row holds, from its fields or by name, and bring it to one of a few shapes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

from automodel.data.columns import Pattern, fields_seen, nearest, read_pattern
from automodel.data.preference import Preference, read_preference
from automodel.data.readers import BadRow, require_text
from automodel.data.turns import Turn, read_tools, read_turns, with_system

FormatName = Literal["auto", "prompt_completion", "alpaca", "messages", "sharegpt", "text", "text_label", "preference"]


class UnknownFormat(BadRow):
    """The format of a whole file cannot be told; naming every row would say the same again and again."""


class PromptCompletion(NamedTuple):
    """Plain text of which the completion alone is supervised."""

    prompt: str
    completion: str
    kind: str | None = None


class Messages(NamedTuple):
    """A conversation.

    Attributes:
        weights: a loss weight for each turn; None, there or for all: 1 for the assistant's turns, 0 for others.
    """

    turns: list[Turn]
    tools: list[dict[str, Any]] | None = None
    weights: list[float | None] | None = None


class PlainText(NamedTuple):
    """Text for continued pre-training, all of it supervised."""

    text: str


class TextLabel(NamedTuple):
    """A text and the name of its class."""

    text: str
    label: str


Shape = PromptCompletion | Messages | PlainText | TextLabel | Preference

_REQUIRED = {
    "messages": ("messages",),
    "sharegpt": ("conversations",),
    "prompt_completion": ("prompt", "completion"),
    "alpaca": ("instruction", "output"),
    "text": ("text",),
    "text_label": ("text", "label"),
    "preference": ("chosen", "rejected"),
}
_OPTIONAL = {
    "messages": ("tools", "system"),
    "sharegpt": ("tools", "system"),
    "alpaca": ("input", "system"),
    "preference": ("prompt", "messages", "conversations", "tools", "system"),
}
# Other names under which the fields of a format are known, tried where the usual ones are not there.
_ALIASES: dict[str, tuple[dict[str, str], ...]] = {
    "prompt_completion": ({"prompt": "question", "completion": "answer"},),
    "text_label": ({"text": "sentence"}, {"text": "{title}\n{description}"}),
    "preference": ({"chosen": "chosen_messages", "rejected": "rejected_messages"},),
}
_SFT_FORMATS = ("messages", "sharegpt", "prompt_completion", "alpaca", "text")
# Beside a text these say where it is from; any other field may be what should be learnt.
_PROVENANCE = {"id", "url", "source", "timestamp", "date", "meta", "metadata"}


class RowFormat:
    """Reads rows of one format; chosen from the first row, or by name."""

    def __init__(self, name: str, fields: Mapping[str, str | Pattern]) -> None:
        self.name = name
        self._fields = fields

    def read(self, row: Mapping[str, Any]) -> Shape:
        """Bring a row to its shape.

        Raises:
            BadRow: a field is missing, of the wrong type, or an answer is empty.
        """
        return _READERS[self.name](self, row)

    def has(self, row: Mapping[str, Any], column: str) -> bool:
        """Return whether the row holds something in a column that may be left out."""
        field = self._fields.get(column, column)
        return isinstance(field, Pattern) or row.get(field) is not None

    def title(self, column: str) -> str:
        """Return what the user calls a column: its field, or the pattern for it."""
        field = self._fields.get(column, column)
        return field.text if isinstance(field, Pattern) else field

    def value(self, row: Mapping[str, Any], column: str) -> Any:
        """Return what a column holds, of any type.

        Raises:
            BadRow: the field, or a key of a pattern, is missing.
        """
        field = self._fields.get(column, column)
        if isinstance(field, Pattern):
            return field.fill(row)
        if field not in row:
            raise BadRow(f'no field "{field}"; {fields_seen(row)}{nearest(field, row)}')
        return row[field]

    def text(self, row: Mapping[str, Any], column: str, *, may_be_empty: bool = True) -> str:
        """Return the text of a column.

        Raises:
            BadRow: it is missing, not text, or empty where it must not be.
        """
        value = self.value(row, column)
        if isinstance(self._fields.get(column), Pattern) and isinstance(value, int | float):
            value = value if isinstance(value, bool) else str(value)
        text = require_text(value, self.title(column))
        if not may_be_empty and not text.strip():
            raise BadRow(f'the field "{self.title(column)}" is empty')
        return text


def choose_format(
    name: FormatName,
    columns: Mapping[str, str | None],
    *,
    row: Mapping[str, Any],
    is_classification: bool,
    is_preference: bool = False,
) -> RowFormat:
    """Return the format of a file from its name or, with ``auto``, from the columns mapped and its first row.

    Args:
        columns: for a column of a format the field that holds it, or a pattern over fields such as
            ``{context}\\n\\n{question}`` or ``{answers[text][0]}``.
        is_classification: text with a label is wanted.
        is_preference: pairs of a chosen and a rejected answer are wanted.

    Raises:
        UnknownFormat: the fields are not those of a known format, or of several; it says which key settles it.
    """
    mapped = {column: _mapped(column, field, row) for column, field in columns.items() if field is not None}
    candidates = ("text_label",) if is_classification else ("preference",) if is_preference else _SFT_FORMATS
    if name not in ("auto", *candidates):
        if name == "preference":
            raise UnknownFormat(_PAIRS)
        raise UnknownFormat(f"dataset.format={name} does not suit this recipe; it takes {' or '.join(candidates)}")
    if name == "auto":
        if candidates == _SFT_FORMATS and not mapped:
            _refuse_preferences(row)
        name = _detected(candidates, mapped, row)
    return RowFormat(name, _fields_of(name, mapped, row))


_PAIRS = (
    "the rows are preference pairs (chosen, rejected), which this recipe does not train on; to train on the chosen "
    "answers alone, map them: dataset.columns.prompt with dataset.columns.completion, or dataset.columns.messages"
)


def _refuse_preferences(row: Mapping[str, Any]) -> None:
    if _has_sign("preference", {}, row):
        raise UnknownFormat(_PAIRS)
    if ("messages" in row or "conversations" in row) and isinstance(row.get("label"), bool):
        name = "messages" if "messages" in row else "sharegpt"
        raise UnknownFormat(
            f"messages with a boolean label, which says whether the answer is a good one; {fields_seen(row)}; choose "
            f"dataset.format={name} to train on all of them, the bad ones too"
        )


def _mapped(column: str, field: str, row: Mapping[str, Any]) -> str | Pattern:
    if field in row or not any(brace in field for brace in "{}"):
        if field not in row:
            message = f'no field "{field}" (dataset.columns.{column}); {fields_seen(row)}{nearest(field, row)}'
            raise UnknownFormat(message)
        return field
    try:
        pattern = read_pattern(field)
    except ValueError as error:
        raise UnknownFormat(f"dataset.columns.{column}={field} is no pattern: {error}") from None
    for _, reference in pattern.parts:
        if reference is not None and reference.field not in row:
            hint = f"{fields_seen(row)}{nearest(reference.field, row)}"
            raise UnknownFormat(f'no field "{reference.field}" (dataset.columns.{column}={field}); {hint}')
    return pattern


def _detected(candidates: tuple[str, ...], mapped: Mapping[str, Any], row: Mapping[str, Any]) -> str:
    fits = [each for each in candidates if _has_sign(each, mapped, row)]
    if len(fits) == 1:
        return fits[0]
    if fits:
        raise UnknownFormat(f"the {fields_seen(row)} suit several formats; choose dataset.format={' or '.join(fits)}")
    wanted = "; ".join(f"{each}: {', '.join(_columns_of(each))}" for each in candidates)
    raise UnknownFormat(f"the {fields_seen(row)} are of no known format; name them with dataset.columns.* ({wanted})")


def _has_sign(name: str, mapped: Mapping[str, Any], row: Mapping[str, Any]) -> bool:
    """Return whether a row, with the columns that the user maps, has all that a format needs."""
    if not set(mapped) <= set(_columns_of(name)):
        return False
    if name == "text" and not mapped:
        return "text" in row and set(row) <= {"text"} | _PROVENANCE
    fields = _fields_of(name, mapped, row)
    return all(isinstance(fields[each], Pattern) or fields[each] in row for each in _REQUIRED[name])


def _columns_of(name: str) -> tuple[str, ...]:
    return _REQUIRED[name] + _OPTIONAL.get(name, ())


def _fields_of(name: str, mapped: Mapping[str, Any], row: Mapping[str, Any]) -> dict[str, str | Pattern]:
    fields = {column: column for column in _columns_of(name)} | dict(mapped)
    for alias in _ALIASES.get(name, ()):
        is_usual = all(fields[column] in row for column in alias if column not in mapped)
        read = {column: read_pattern(field) if "{" in field else field for column, field in alias.items()}
        if not is_usual and all(_is_there(field, row) for column, field in read.items() if column not in mapped):
            return fields | read | dict(mapped)
    return fields


def _is_there(field: str | Pattern, row: Mapping[str, Any]) -> bool:
    if isinstance(field, Pattern):
        return all(reference is None or reference.field in row for _, reference in field.parts)
    return field in row


def _read_prompt_completion(fields: RowFormat, row: Mapping[str, Any]) -> PromptCompletion:
    kind = row.get("kind")
    completion = fields.text(row, "completion", may_be_empty=False)
    return PromptCompletion(fields.text(row, "prompt"), completion, kind if isinstance(kind, str) else None)


def _read_alpaca(fields: RowFormat, row: Mapping[str, Any]) -> Messages:
    if row.get("history"):
        raise BadRow('the field "history" is not supported; give the turns before as messages')
    instruction = fields.text(row, "instruction", may_be_empty=False)
    extra = fields.text(row, "input") if fields.has(row, "input") else ""
    question = f"{instruction}\n\n{extra}" if extra.strip() else instruction
    answer = fields.text(row, "output", may_be_empty=False)
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return Messages(with_system(turns, None, _system(fields, row))[0])


def _read_messages(fields: RowFormat, row: Mapping[str, Any]) -> Messages:
    column = _REQUIRED[fields.name][0]
    turns, weights = read_turns(fields.value(row, column), fields.title(column))
    if not any(turn["role"] == "assistant" for turn in turns):
        raise BadRow("no message of the assistant: there is nothing to train on")
    turns, weights = with_system(turns, weights, _system(fields, row))
    return Messages(turns, read_tools(fields.value(row, "tools") if fields.has(row, "tools") else None), weights)


def _read_text(fields: RowFormat, row: Mapping[str, Any]) -> PlainText:
    return PlainText(fields.text(row, "text", may_be_empty=False))


def _read_text_label(fields: RowFormat, row: Mapping[str, Any]) -> TextLabel:
    label = fields.value(row, "label")
    if isinstance(label, bool) or not isinstance(label, int | str) or label == "":
        raise BadRow(f'the field "{fields.title("label")}" must be a whole number or a name')
    if isinstance(label, str):
        require_text(label, fields.title("label"))
    return TextLabel(fields.text(row, "text", may_be_empty=False), str(label))


def _system(fields: RowFormat, row: Mapping[str, Any]) -> str:
    return fields.text(row, "system") if fields.has(row, "system") else ""


_READERS: dict[str, Callable[[RowFormat, Mapping[str, Any]], Shape]] = {
    "prompt_completion": _read_prompt_completion,
    "alpaca": _read_alpaca,
    "messages": _read_messages,
    "sharegpt": _read_messages,
    "text": _read_text,
    "text_label": _read_text_label,
    "preference": read_preference,
}
