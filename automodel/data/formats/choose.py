"""Recognise what a row holds, from its fields or by name, and bring it to one of a few shapes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

from automodel.data.formats.columns import Pattern, fields_seen, nearest, read_pattern, whole_field
from automodel.data.formats.preference import Preference, read_preference
from automodel.data.formats.row_format import RowFormat
from automodel.data.formats.turns import Turn, read_tools, read_turns, with_system
from automodel.data.rows import BadRow, require_text

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
    "prompt_completion": ("input", "system"),
    "preference": ("prompt", "messages", "conversations", "tools", "system"),
}
# Other names under which the fields of a format are known, tried where the usual ones are not there.
_ALIASES: dict[str, tuple[dict[str, str], ...]] = {
    "prompt_completion": ({"prompt": "question", "completion": "answer"},),
    "alpaca": ({"output": "response"},),
    "text_label": ({"text": "sentence"}, {"text": "{title}\n{description}"}),
    "preference": ({"chosen": "chosen_messages", "rejected": "rejected_messages"},),
}
# Fields that often are a column under a name which alone does not say so.
_LIKELY = {
    "prompt_completion": {
        "prompt": ("query", "question", "prompt", "problem", "instruction", "input", "source"),
        "completion": ("response", "answer", "completion", "solution", "output", "target", "summary"),
    },
    "text_label": {
        "text": ("text", "sentence", "content", "review", "question", "document", "body"),
        "label": ("label", "labels", "class", "category", "target", "sentiment", "intent"),
    },
}
_CLASSIFIED = ("text_label",)
_SFT_FORMATS = ("messages", "sharegpt", "prompt_completion", "alpaca", "text")
# Beside a text these say where it is from; any other field may be what should be learnt.
_PROVENANCE = {"id", "url", "source", "timestamp", "date", "meta", "metadata"}


def choose_format(
    name: FormatName,
    columns: Mapping[str, str | None],
    *,
    row: Mapping[str, Any],
    candidates: Sequence[str],
) -> RowFormat:
    """Return the format of a file from its name or, with ``auto``, from the columns mapped and its first row.

    Args:
        columns: for a column of a format the field that holds it, or a pattern over fields such as
            ``{context}\\n\\n{question}`` or ``{answers[text][0]}``.
        candidates: names of the formats that the recipe's task takes.

    Raises:
        UnknownFormat: the fields are not those of a known format, or of several; it says which key settles it.
    """
    mapped = {column: _mapped(column, field, row) for column, field in columns.items() if field is not None}
    candidates = tuple(candidates)
    if name not in ("auto", *candidates):
        does = f"dataset.format={name} does not suit this recipe; it takes {' or '.join(candidates)}"
        raise UnknownFormat(f"{does}; {_recipe_for(name)}")
    if name == "auto":
        if candidates == _SFT_FORMATS and not mapped:
            _refuse_preferences(row)
        name = _detected(candidates, mapped, row)
    return RowFormat(name, _fields_of(name, mapped, row), mapped=mapped, reader=_READERS[name])


def _recipe_for(name: str) -> str:
    """Return which recipe trains on rows of a format."""
    if name == "preference":
        return _PAIRS
    return f"recipe={'llm_seq_cls' if name in _CLASSIFIED else 'llm_sft'} trains on rows of this format ({name})"


_PAIRS = (
    "the rows are preference pairs (chosen, rejected), which no recipe trains on yet; to train on the chosen answers "
    "alone with recipe=llm_sft, map them: dataset.columns.prompt with dataset.columns.completion, or "
    "dataset.columns.messages"
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


def missing_fields(columns: Mapping[str, str | None], row: Mapping[str, Any]) -> set[str]:
    """Return the fields that ``columns`` refers to and a row does not have."""
    named = {column: field for column, field in columns.items() if field is not None}
    return {each for column, field in named.items() for each in _pattern(column, field, row).fields if each not in row}


def _mapped(column: str, field: str, row: Mapping[str, Any]) -> str | Pattern:
    pattern = _pattern(column, field, row)
    for each in pattern.fields:
        if each not in row:
            named = f"dataset.columns.{column}" + ("" if each == field else f"={field}")
            raise UnknownFormat(f'no field "{each}" ({named}); {fields_seen(row)}{nearest(each, row)}')
    return field if pattern.fields == [field] else pattern


def _pattern(column: str, field: str, row: Mapping[str, Any]) -> Pattern:
    """Return the pattern that a user's ``field`` is; the name of a field may hold braces."""
    if field in row or not any(brace in field for brace in "{}"):
        return whole_field(field)
    try:
        return read_pattern(field)
    except ValueError as error:
        raise UnknownFormat(f"dataset.columns.{column}={field} is no pattern: {error}") from None


def _detected(candidates: tuple[str, ...], mapped: Mapping[str, Any], row: Mapping[str, Any]) -> str:
    fits = [each for each in candidates if _has_sign(each, mapped, row)]
    if len(fits) == 1:
        return fits[0]
    if fits:
        raise UnknownFormat(f"the {fields_seen(row)} suit several formats; choose dataset.format={' or '.join(fits)}")
    others = [each for each in _REQUIRED if each not in candidates and _has_sign(each, mapped, row)]
    if others:
        raise UnknownFormat(
            f"the {fields_seen(row)} do not suit this recipe; {_recipe_for(others[0])}; or name "
            "the fields to train on here with dataset.columns.*"
        )
    wanted = "; ".join(f"{each}: {', '.join(_columns_of(each))}" for each in candidates)
    raise UnknownFormat(
        f"the {fields_seen(row)} are of no known format; name them with dataset.columns.* ({wanted})"
        f"{_likely_columns(candidates, row)}"
    )


def _likely_columns(candidates: tuple[str, ...], row: Mapping[str, Any]) -> str:
    """Return the keys that probably name the fields of a row, as the end of a message."""
    for name, columns in _LIKELY.items():
        found = {column: next((field for field in fields if field in row), None) for column, fields in columns.items()}
        if name in candidates and all(found.values()):
            keys = " ".join(f"dataset.columns.{column}={field}" for column, field in found.items())
            return f"; perhaps {keys}"
    return ""


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
    prompt = fields.text(row, "prompt")
    before = [_beside_prompt(fields, row, column) for column in ("system", "input")]
    prompt = "\n\n".join([*(text for text in before if text and text.strip() not in prompt), prompt])
    return PromptCompletion(prompt, completion, kind if isinstance(kind, str) else None)


def _beside_prompt(fields: RowFormat, row: Mapping[str, Any], column: str) -> str:
    """Return what stands beside a prompt and belongs to it; where the user names the prompt, what he names alone."""
    if fields.is_mapped(column):
        return fields.text(row, column) if fields.has(row, column) else ""
    return fields.text(row, column) if not fields.is_mapped("prompt") and fields.has_text(row, column) else ""


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
    label = _label(fields.value(row, "label"), f'the field "{fields.title("label")}"')
    return TextLabel(fields.text(row, "text", may_be_empty=False), require_text(label, fields.title("label")))


def _label(label: Any, what: str) -> str:
    """Return the name of a class: text as it is, true and false in lower case, a whole number without a fraction."""
    if isinstance(label, list):
        raise BadRow(
            f"{what} is a list of labels; a classifier learns one label a row, several (multi-label) are not read"
        )
    if label is None or label == "" or label != label:
        raise BadRow(f"{what} is empty: the row has no label; leave such rows out")
    if isinstance(label, bool):
        return str(label).lower()
    if isinstance(label, float):
        if not label.is_integer():
            raise BadRow(f"{what} is {label:g}: a score is not a class; give each class a whole number or a name")
        return str(int(label))
    if not isinstance(label, int | str):
        raise BadRow(f"{what} must be a whole number, true or false, or a name")
    return str(label)


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
