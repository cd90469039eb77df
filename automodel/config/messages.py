"""Words for what pydantic finds wrong."""

from __future__ import annotations

from typing import Any

from pydantic import ValidationError

from automodel.config.names import did_you_mean

_EXPECTED = {
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "bool_type": "true or false",
    "string_type": "text",
    "dict_type": "a section of keys",
    "model_type": "a section of keys",
    "list_type": "a list",
    "none_required": "null",
}


def pydantic_problems(error: ValidationError, *, prefix: str = "") -> list[str]:
    """Return a line for each key that is wrong: the key, what was given, what is expected."""
    by_key: dict[str, list[Any]] = {}
    for item in error.errors():
        path = [str(part) for part in item["loc"] if not _is_union_tag(part)]
        by_key.setdefault(prefix + ".".join(path), []).append(item)
    return [_line(key, items) for key, items in by_key.items()]


def _line(key: str, items: list[Any]) -> str:
    kinds = [item["type"] for item in items]
    given = items[0]["input"]
    if "extra_forbidden" in kinds:
        return f"{key} is not a known key"
    if "missing" in kinds:
        return f"{key} is missing"
    if given == "???":
        return f"{key} is required: set {key}=..."
    expected = " or ".join(dict.fromkeys(_expected(item) for item in items if item["type"] != "none_required"))
    hint = ""
    for item in items:
        if item["type"] == "literal_error" and isinstance(given, str):
            hint = did_you_mean(given, item["ctx"]["expected"].replace("'", "").replace(" or ", ", ").split(", "))
    return f"{key}={as_yaml(given)} must be {expected}{hint or _reading_hint(given, kinds)}"


def _reading_hint(given: Any, kinds: list[str]) -> str:
    """Say how YAML reads what was given, where that is likely not what was meant."""
    if isinstance(given, str) and given.lower() in ("none", "nil", "nan"):
        return "; YAML writes null"
    if isinstance(given, str) and is_number(given) and "string_type" not in kinds:
        return f"; it is text here: leave out the quotes, {given}"
    if isinstance(given, str) and given.lower() in ("true", "false") and "bool_type" in kinds:
        return f"; it is text here: leave out the quotes, {given.lower()}"
    if isinstance(given, bool) and "string_type" in kinds:
        return "; YAML reads yes, no, on and off as true and false: put the word in quotes"
    if isinstance(given, float) and given.is_integer() and {"int_type", "int_from_float"} & set(kinds):
        return f"; write {given:.0f}"
    return ""


def is_number(text: str) -> bool:
    """Return whether text is that of a number."""
    try:
        float(text)
    except ValueError:
        return False
    return True


def _expected(item: Any) -> str:
    kind, context = item["type"], item.get("ctx", {})
    if kind in _EXPECTED:
        return _EXPECTED[kind]
    if kind == "literal_error":
        return f"one of {context['expected']}".replace("'", "")
    bounds = {"greater_than": "gt", "greater_than_equal": "ge", "less_than": "lt", "less_than_equal": "le"}
    if kind in bounds:
        bound = context[bounds[kind]]
        if kind == "greater_than" and isinstance(bound, int):
            return f"at least {bound + 1}"
        words = {"gt": "more than", "ge": "at least", "lt": "less than", "le": "at most"}[bounds[kind]]
        return f"{words} {bound:g}"
    if kind in ("too_short", "too_long"):
        return f"a list of {context.get('min_length', context.get('max_length'))} items"
    return item["msg"].removeprefix("Input should be ")


def as_yaml(value: Any) -> str:
    """Return a value as YAML writes it."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return str(value)


def _is_union_tag(part: Any) -> bool:
    """Return whether pydantic put the member of a union that it tried into the path: no key is called so."""
    return isinstance(part, str) and (
        "[" in part or part.removeprefix("constrained-") in ("bool", "int", "float", "str")
    )
