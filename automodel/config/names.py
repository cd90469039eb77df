"""Find the nearest valid name for a misspelt one."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches
from typing import Any


def nearest(name: str, names: Iterable[str]) -> str | None:
    """Return the name most like ``name``, or None where none is near."""
    found = get_close_matches(name, list(names), n=1, cutoff=0.6)
    return found[0] if found else None


def did_you_mean(name: str, names: Iterable[str]) -> str:
    """Return words to end a message with, or an empty string."""
    found = nearest(name, names)
    return f"; did you mean {found}?" if found else ""


def nearest_key(key: str, keys: Iterable[str]) -> str | None:
    """Return the dotted key most like ``key``: by its sections, its whole spelling, or its last part anywhere."""
    keys = [each for each in keys if each != key]
    parts = key.split(".")
    last = parts[-1]
    same_end = [each for each in keys if each.split(".")[-1] == last]
    siblings = [each for each in keys if each.rpartition(".")[0] == key.rpartition(".")[0]]
    for candidates in (same_end, siblings):
        found = nearest(key, candidates) or (candidates[0] if candidates is same_end and len(candidates) == 1 else None)
        if found:
            return found
    if len(same_end) > 1 and len(parts) == 1:
        return same_end[0]
    whole = nearest(key, keys)
    if whole:
        return whole
    end = nearest(last, {each.split(".")[-1] for each in keys})
    return next((each for each in keys if each.split(".")[-1] == end), None)


def leaf_keys(tree: Any, prefix: str = "") -> list[str]:
    """Return the dotted keys of all sections and values of a plain nested dict."""
    keys = []
    for name, value in tree.items():
        key = f"{prefix}{name}"
        if not name.startswith("_"):
            keys.append(key)
        if isinstance(value, dict):
            keys += leaf_keys(value, f"{key}.")
    return keys
