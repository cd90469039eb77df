"""Read a command line word by word, to report all mistakes together; Hydra would report the first."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from hydra.core.override_parser.types import Override

from automodel.config.arguments import Arguments, DashedKey, read_arguments
from automodel.config.choices import choose_missing, is_choosable, read_as_place
from automodel.config.compose import Source
from automodel.config.foreign_names import find_foreign
from automodel.config.groups import config_groups, exists, is_named_by_user, options_with, shipped_keys
from automodel.config.names import did_you_mean, key_hint, leaf_keys
from automodel.config.overrides import choice_problems, lines_of, parse_overrides
from automodel.config.targets import check_target

_LAUNCH = re.compile(r"[+~]{0,2}launch([.=@]|$)")


@dataclass
class Composed:
    """What the command line makes.

    Attributes:
        trees: plain resolved dicts, one for each choice of a sweep.
        problems: what was wrong, a line each.
        notes: what was chosen for the user, a line each.
        argv: the command line with that written out.
        unresolved: keys whose value could not be found, which is among the problems.
    """

    trees: list[dict[str, Any]] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    argv: list[str] = field(default_factory=list)
    unresolved: set[str] = field(default_factory=set)


@dataclass
class _Parts:
    """The overrides of a command line and of its file: those that choose an option of a group, and the rest."""

    choices: list[Override]
    values: list[Override]

    def lines(self) -> list[str]:
        return [override.input_line for override in (*self.choices, *self.values)]


def without_launch(argv: list[str]) -> list[str]:
    """Return the command line without what says where to run, as the ranks of a submitted job get it."""
    overrides = read_arguments(argv).overrides
    return [arg for arg in argv if arg not in overrides or not _LAUNCH.match(arg)]


def hydra_command_line(argv: list[str]) -> list[str]:
    """Return the command line by which Hydra itself composes what ``compose_command_line`` does."""
    arguments, unheeded = read_arguments(argv), Composed()
    source = Source(arguments, [])
    parts = _parts(arguments, source, unheeded)
    _complete(parts, source, unheeded)
    return [*arguments.show, *source.flags(), *source.file_override(), *parts.lines()]


def compose_command_line(argv: list[str]) -> Composed:
    """Compose the configuration of ``argv`` from the overrides that are fine, and say what is wrong with the rest."""
    arguments, result = read_arguments(argv, is_key=_is_key), Composed()
    problems = result.problems
    problems += [*arguments.problems, *(_dashed_problem(each) for each in arguments.dashed)]
    source = Source(arguments, problems)
    parts = _parts(arguments, source, result)
    base = _complete(parts, source, result)
    if base is None:
        return result
    parts.values = [each for each in parts.values if not _noted(_value_problems(each, base, source), problems)]
    combinations = list(_one_at_a_time([*parts.choices, *parts.values]))
    if len(combinations) == 1 and not parts.values:
        result.trees.append(base)
    else:
        composed = [source.compose(lines, problems) for lines in combinations]
        result.trees += [tree for tree in composed if tree is not None]
    result.unresolved = source.unresolved
    result.argv = [*arguments.flags(), *arguments.show, *(["-m"] if arguments.is_sweep else []), *parts.lines()]
    return result


def _parts(arguments: Arguments, source: Source, result: Composed) -> _Parts:
    """Parse the overrides, with what a group was given instead of an option written out."""
    lines = [_with_plus(line) for line in arguments.overrides]
    parsed = parse_overrides(lines, result.problems, is_sweep=arguments.is_sweep)
    chosen = {override.key_or_group for override in parsed}
    of_file = [line for group, line in source.file_choices() if group not in chosen]
    parts = _Parts([], [])
    for override in [*parse_overrides(of_file, result.problems, is_sweep=False), *parsed]:
        group = override.key_or_group
        if group not in source.groups and "@" not in override.input_line.split("=")[0]:
            parts.values.append(override)
            continue
        place = _place(override, source)
        if place is not None:
            result.notes.append(place.note)
            choice, value = parse_overrides(list(place.lines), result.problems, is_sweep=False)
            parts.choices.append(choice)
            parts.values.append(value)
        elif source.is_broken and group == "experiment":
            continue  # the missing folder is reported already
        elif not _noted(choice_problems(override, source.groups), result.problems):
            _noted(source.experiment_problems(override), result.problems)
            parts.choices.append(override)
    return parts


def _place(override: Override, source: Source) -> Any:
    value = None if override.is_delete() or override.is_sweep_override() else override.value()
    group = override.key_or_group
    if not isinstance(value, str) or value in source.groups.get(group, ()):
        return None
    return read_as_place(group, value)


def _complete(parts: _Parts, source: Source, result: Composed) -> dict[str, Any] | None:
    """Choose the options that keys leave no doubt about, and return the tree without what the values change."""
    lines = [lines_of(each)[0] for each in parts.choices]
    base = source.compose(lines, result.problems, with_file=False)
    if base is None or source.has_own_root:
        return base
    given = source.file_keys() | {o.key_or_group: _first_value(o) for o in parts.values if not o.is_delete()}
    explicit = {o.key_or_group for o in parts.choices} | source.file_targets()
    open_groups = [group for group in source.groups if group not in explicit and is_choosable(group, base.get(group))]
    found, doubts = choose_missing(given, base=base, groups=open_groups)
    result.problems += doubts.values()
    parts.values = [o for o in parts.values if o.key_or_group.split(".")[0] not in doubts]
    for choice in found:
        result.notes.append(choice.note)
        parts.choices += parse_overrides(list(choice.lines), result.problems, is_sweep=False)
    if not found and source.file is None:
        return base
    return source.compose([lines_of(each)[0] for each in parts.choices], [])


def _first_value(override: Override) -> Any:
    return next(iter(override.sweep_iterator())) if override.is_sweep_override() else override.value()


def _is_key(name: str) -> bool:
    return find_foreign(name) is not None or any(key.split(".")[-1] == name for key in shipped_keys())


def _dashed_problem(each: DashedKey) -> str:
    if each.key in shipped_keys() or ("." in each.key and find_foreign(each.key) is None):
        return f"{each.text}: write {each.key}={each.value or 'VALUE'}, without dashes"
    return f"{each.text}: there is no such option{key_hint(each.key, shipped_keys(), each.value)}"


def _with_plus(line: str) -> str:
    """Add the plus with which Hydra takes a new key, where users name the keys."""
    return f"++{line}" if is_named_by_user(line.partition("=")[0]) else line


def _noted(found: list[str], problems: list[str]) -> bool:
    problems += found
    return bool(found)


def _value_problems(override: Override, base: dict[str, Any], source: Source) -> list[str]:
    """Return what is wrong with the key of ``key=value``."""
    key = override.key_or_group
    if source.has_own_root and key in config_groups() and not isinstance(_first_value(override), dict):
        return [f"{override.input_line}: a saved configuration has no groups to choose from; change its keys"]
    if key.split(".")[0] == "hydra" or exists(base, key):
        return []
    if is_named_by_user(key) and exists(base, ".".join(key.split(".")[:2])):
        return []
    parent = key.rpartition(".")[0]
    if override.is_add() and parent and _is_open(base, parent):
        return []  # the signature of the target decides
    return _unknown_key(key, base, source, value=override.input_line.partition("=")[2])


def _unknown_key(key: str, base: dict[str, Any], source: Source, *, value: str) -> list[str]:
    top, _, rest = key.partition(".")
    if rest and top in source.groups and base.get(top) in (None, {}):
        options = options_with(top, [rest]) or source.groups[top]
        return [f"{key}: nothing is chosen for {top}; add {top}={'|'.join(options)}"]
    section = base.get(top)
    first = rest.split(".")[0]
    is_elsewhere = bool(rest) and (bool(options_with(top, [first])) or find_foreign(first) is not None)
    if is_elsewhere and isinstance(section, dict) and "_target_" in section:
        found = [line for line in check_target(top, section | {first: value}) if line.startswith(f"{top}.{first} ")]
        if found and first not in section:
            return found
    known = [each for each in leaf_keys(base) if each.startswith(f"{top}.")] if top in base else leaf_keys(base)
    hint = did_you_mean(key, [*source.groups, *base]) if "." not in key and find_foreign(key) is None else ""
    hint = hint or key_hint(key, known, value) or "; python -m automodel.run --help lists the keys"
    return [f"{key} is not a known key{hint}"]


def _is_open(tree: Any, parent: str) -> bool:
    """Return whether keys may be added under ``parent``: a target's arguments, or a free table such as model.config."""
    for part in parent.split("."):
        if not isinstance(tree, dict) or part not in tree:
            return False
        tree = tree[part]
    return isinstance(tree, dict) and ("_target_" in tree or parent.count(".") > 0)


def _one_at_a_time(overrides: list[Override]) -> Iterator[list[str]]:
    """Yield the first value of everything, then each further value of a sweep with the first of all others."""
    first = [lines_of(override)[0] for override in overrides]
    yield first
    for index, override in enumerate(overrides):
        for line in lines_of(override)[1:]:
            yield [*first[:index], line, *first[index + 1 :]]
