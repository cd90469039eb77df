"""Choose the option of a group that a command line leaves no doubt about, or say what it must add."""

from __future__ import annotations

import re
import shlex
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from automodel.config.groups import exists, is_built_on, options_with
from automodel.config.paths import looks_like_hub_id, looks_like_path, looks_like_rows
from automodel.config.targets import is_ours, resolve

_CHOOSABLE = ("model", "dataset", "validation_dataset", "peft", "evaluation")
"""Groups whose default is a stand-in for what the user has, or does nothing.

An optimizer or a strategy is never exchanged for one key's sake, and a launcher would submit a job.
"""
_ROWS = ("dataset", "validation_dataset")
_HOW_ROWS = "{group}=jsonl {group}.path=FILE (a file, folder or glob), or {group}=hf {group}.path=OWNER/NAME (the hub)"


@dataclass(frozen=True)
class Choice:
    """Options that are chosen for the user, as overrides, and why."""

    lines: tuple[str, ...]
    note: str


def quoted(text: str) -> str:
    """Return ``text`` as a string of Hydra's override grammar; backslashes count before a quote alone."""
    return "'" + re.sub(r"(\\*)('|$)", lambda found: 2 * found[1] + (found[2] and "\\'"), text) + "'"


def shell_word(override: str) -> str:
    """Return an override as a shell takes it, in double quotes where these do."""
    return shlex.quote(override) if set(override) & set('"$`\\!') else f'"{override}"'


def read_as_place(group: str, value: str) -> Choice | None:
    """Return what ``model=DIR``, ``dataset=FILE`` and the like mean; None where ``value`` is no place of anything."""
    if group == "model" and (looks_like_path(value) or looks_like_hub_id(value)):
        option, key = "hf", "model.pretrained_model_name_or_path"
    elif group in _ROWS and looks_like_rows(value):
        option, key = "jsonl", f"{group}.path"
    elif group in _ROWS and looks_like_hub_id(value):
        option, key = "hf", f"{group}.path"
    else:
        return None
    return Choice(
        (f"{group}={option}", f"{key}={quoted(value)}"), f"{group}={value} is read as {group}={option} {key}={value}"
    )


def is_choosable(group: str, section: Any) -> bool:
    """Return whether an option of ``group`` may be chosen for the user in place of ``section``, or beside it."""
    return group == "logger" or (group in _CHOOSABLE and (not section or _is_stand_in(section)))


def _is_stand_in(section: dict[str, Any]) -> bool:
    """Return whether a shipped option is a stand-in for what the user has."""
    return is_ours(section) and getattr(resolve(section["_target_"]), "is_stand_in", False)


def choose_missing(
    given: Mapping[str, Any], *, base: dict[str, Any], groups: Collection[str]
) -> tuple[list[Choice], dict[str, str]]:
    """Return the options without which keys of ``given`` would not exist, and by its group what cannot be chosen.

    Args:
        given: dotted keys with their values.
        base: the plain tree as it is without them.
        groups: those of which an option may be chosen.
    """
    unknown: dict[str, list[str]] = {}
    for key in given:
        group, _, rest = key.partition(".")
        if rest and group in groups and not exists(base, key) and options_with(group, [rest]):
            unknown.setdefault(group, []).append(rest)
    choices, problems = [], {}
    for group, keys in unknown.items():
        if group == "logger":
            names = dict.fromkeys([*base["logger"], *(options_with(group, [key])[0] for key in keys)])
            line = f"logger=[{','.join(names)}]"
            choices.append(Choice((line,), f"{line} is chosen for logger.{keys[0]}"))
        elif group in _CHOOSABLE:
            found = _choose(group, keys, given.get(f"{group}.path"))
            if isinstance(found, Choice):
                choices.append(found)
            else:
                problems[group] = found
    return choices, problems


def _choose(group: str, keys: list[str], path: Any) -> Choice | str:
    options = options_with(group, keys)
    options = [each for each in options if not any(is_built_on(group, each, other) for other in options)]
    first, paths = f"{group}.{keys[0]}", path if isinstance(path, list) else [path]
    if len(options) == 1:
        return Choice((f"{group}={options[0]}",), f"{group}={options[0]} is chosen for {first}")
    if not options:
        return f"{', '.join(f'{group}.{key}' for key in keys)}: no option of {group} has all of them"
    if group not in _ROWS:
        return f"{first}: add {' or '.join(f'{group}={each}' for each in options)}"
    if not all(isinstance(each, str) for each in paths):
        return f"{first}: nothing says where the rows are; add {_HOW_ROWS.format(group=group)}"
    if all(looks_like_rows(each) for each in paths):
        return Choice((f"{group}=jsonl",), f"{group}=jsonl is chosen: {group}.path={path} is a local path")
    if all(looks_like_hub_id(each) for each in paths):
        return Choice((f"{group}=hf",), f"{group}=hf is chosen: {group}.path={path} is a name on the hub")
    return f"{group}.path={path}: there is no such file; write {_HOW_ROWS.format(group=group)}"
