"""Overrides as Hydra parses them, and what is wrong with each by itself."""

from __future__ import annotations

from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException

from automodel.config.choices import quoted, shell_word
from automodel.config.names import did_you_mean
from automodel.config.paths import path_exists

_ON_HUB = {
    "model": "model.pretrained_model_name_or_path", "dataset": "dataset.path",
    "validation_dataset": "validation_dataset.path",
}  # fmt: skip


def parse_overrides(lines: list[str], problems: list[str], *, is_sweep: bool) -> list[Override]:
    """Return the overrides that can be read, and report the rest.

    The name of something that exists is taken as it stands, and so is text that Hydra's grammar cannot read and that
    no quote or bracket at its beginning gives a meaning.
    """
    parser, found = OverridesParser.create(), []
    for line in lines:
        try:
            override = parser.parse_override(line)
            reason = ""
        except HydraException as error:
            override, reason = None, str(error).splitlines()[0]
        key, _, text = line.partition("=")
        is_plain = override is not None and not override.is_sweep_override()
        is_list = is_plain and isinstance(override.value(), list | dict)
        if ((not is_plain or is_list) and path_exists(text)) or (override is None and _is_literal(text, is_sweep)):
            override = parser.parse_override(f"{key}={quoted(text)}")
        if override is None:
            example = shell_word(f"{key}={quoted(text)}")
            problems.append(f"{line}: cannot be read ({reason}); as plain text it is written {example}")
        elif override.is_sweep_override() and not is_sweep:
            problems.append(
                f"{line}: several values are a sweep, a run for each, and need -m; a text with a comma is written "
                f"{shell_word(f'{key}={quoted(text)}')}, and a list {shell_word(f'{key}=[{text}]')}"
            )
        else:
            found.append(override)
    return found


def _is_literal(text: str, is_sweep: bool) -> bool:
    return bool(text) and text[0] not in "{[(" and not set(text) & set("'\"\\$") and not (is_sweep and "," in text)


def choice_problems(override: Override, groups: dict[str, list[str]]) -> list[str]:
    """Return what is wrong with ``group=option``."""
    group = override.key_or_group
    if group not in groups:
        return [f"{override.input_line}: there is no group {group}{did_you_mean(group, groups)}"]
    if override.is_delete():
        return []
    options, problems = groups[group], []
    for value in values_of(override):
        for name in value if isinstance(value, list) else [value]:
            if (name is None and group == "experiment") or str(name) in options:
                continue
            hint = did_you_mean(str(name), options)
            if group == "experiment" and str(name).endswith((".yaml", ".yml")):
                hint = f"; a file is given by itself: {name}"
            elif not hint and group in _ON_HUB:
                hint = f"; one of the hub is {group}=hf {_ON_HUB[group]}={name}"
            problems.append(f"{group}={name}: no such option; there are: {', '.join(options) or 'none'}{hint}")
    return problems


def values_of(override: Override) -> list[Any]:
    """Return the value, or those of a sweep."""
    if override.is_sweep_override():
        return list(override.sweep_iterator())
    return [override.value()]


def lines_of(override: Override) -> list[str]:
    """Return the override as plain lines, one for each value of a sweep."""
    if not override.is_sweep_override():
        return [override.input_line]
    key = override.get_key_element()
    return [f"{key}={value}" for value in override.sweep_string_iterator()]
