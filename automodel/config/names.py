"""Find the valid name closest to a misspelt one; every message that proposes a name uses this module."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches
from typing import Any

from automodel.config.foreign_names import find_foreign


def nearest(name: str, names: Iterable[str]) -> str | None:
    """Return the name most like ``name``, or None if none is close."""
    found = get_close_matches(name, list(names), n=1)
    return found[0] if found else None


def sorted_by_likeness(name: str, names: Iterable[str]) -> list[str]:
    """Return all of ``names``, the one most like ``name`` first."""
    names = list(names)
    return get_close_matches(name, names, n=max(1, len(names)), cutoff=0.0)


def did_you_mean(name: str, names: Iterable[str], *, quote: str = "") -> str:
    """Return the end of a message that proposes the closest name, or an empty string.

    Args:
        quote: put around the name, for names that may hold spaces.
    """
    found = nearest(name, names)
    return f"; did you mean {quote}{found}{quote}?" if found else ""


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


def key_hint(key: str, known: Iterable[str], value: str | None = None) -> str:
    """Return words about an unknown key: what another tool's name is called here, else the nearest key."""
    foreign, last = find_foreign(key), key.split(".")[-1]
    if foreign is not None and not foreign.ours.partition("=")[0].endswith(f".{last}"):
        return f"; {foreign.hint(value)}"
    found = nearest_key(key, known)
    return f"; did you mean {found}?" if found else ""


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


def value_at(tree: Any, key: str) -> str | None:
    """Return the value of a dotted key of a plain nested dict as text, or None where there is none but a section."""
    for part in key.split("."):
        if not isinstance(tree, dict) or part not in tree:
            return None
        tree = tree[part]
    if isinstance(tree, bool):
        return str(tree).lower()
    return None if tree is None or isinstance(tree, dict) else str(tree)
