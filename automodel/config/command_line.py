"""Look at the overrides one by one, so that all that is wrong is told at once and not Hydra's first find alone."""

from __future__ import annotations

import hashlib
import itertools
import os
import re
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir, initialize_config_module
from hydra._internal.utils import get_args_parser
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from automodel import conf
from automodel.capabilities import LATER_KEYS, LATER_OPTIONS, NAMED_BY_USER
from automodel.config.names import did_you_mean, leaf_keys, nearest, nearest_key
from automodel.config.targets import check_target
from automodel.types import UserError

_SWEEP_FLAGS = ("-m", "--multirun")
_HYDRA_FLAGS = ("--cfg", "-c", "--info", "-i", "--hydra-help", "--version", "-sc",
                "--shell-completion", "--resolve", "--package", "-p")  # fmt: skip
_LAUNCH = re.compile(r"[+~]{0,2}launch([.=@]|$)")
CONFIG_ROOT = Path(conf.__file__).parent


@dataclass
class Composed:
    """What the command line makes: plain resolved dicts (one for each choice of a sweep), and what was wrong."""

    trees: list[dict[str, Any]] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


def has_help(argv: list[str]) -> bool:
    """Return whether our help is asked for."""
    return any(arg in ("-h", "--help") for arg in argv)


def hydra_flags(argv: list[str]) -> bool:
    """Return whether the command line asks for something that Hydra itself must do."""
    return any(arg.split("=")[0] in _HYDRA_FLAGS for arg in argv)


def sweep_jobs(argv: list[str]) -> list[list[str]] | None:
    """Return the command line of every job of a sweep, or None where the command line is no sweep.

    Jobs that would write to the same ``output_dir`` get a folder each below it, named after the swept values and not
    numbered, so that a job finds its own folder again when values are added.

    Raises:
        UserError: two jobs are the same.
    """
    if not any(arg in _SWEEP_FLAGS for arg in argv):
        return None
    overrides = get_args_parser().parse_known_args(argv)[0].overrides
    options = [arg for arg in argv if arg not in overrides and arg not in _SWEEP_FLAGS]
    parsed = list(_parse(overrides, []))
    combinations = list(itertools.product(*(_lines(override) for override in parsed)))
    jobs = [[*options, *lines] for lines in combinations]
    folders = [_output_dir(job) for job in jobs]
    given = [os.path.abspath(folder) for folder in folders if folder is not None]
    if len(set(given)) == len(given):
        return jobs
    swept = [index for index, override in enumerate(parsed) if override.is_sweep_override()]
    names = ["_".join(_folder_name(lines[index]) for index in swept) for lines in combinations]
    own = [os.path.join(folder, name) if folder else None for folder, name in zip(folders, names, strict=True)]
    if twice := [folder for number, folder in enumerate(own) if folder and folder in own[:number]]:
        raise UserError(
            f"-m: two jobs of the sweep are the same, and both would write to {twice[0]}; give a value once"
        )
    return [[*job, f"output_dir={quoted(folder)}"] if folder else job for job, folder in zip(jobs, own, strict=True)]


def without_launch(argv: list[str]) -> list[str]:
    """Return the command line without what says where to run, as the ranks of a submitted job get it."""
    overrides = get_args_parser().parse_known_args(argv)[0].overrides
    return [arg for arg in argv if arg not in overrides or not _LAUNCH.match(arg)]


def quoted(text: str) -> str:
    """Return ``text`` as a string of Hydra's override grammar; backslashes count before a quote alone."""
    return "'" + re.sub(r"(\\*)('|$)", lambda found: 2 * found[1] + (found[2] and "\\'"), text) + "'"


def config_groups(extra_dir: str | None = None) -> dict[str, list[str]]:
    """Return the options of every group; those that a combination chooses by itself (with ``-``) left out."""
    groups: dict[str, list[str]] = {}
    for root in filter(None, (CONFIG_ROOT, extra_dir and Path(extra_dir))):
        for file in sorted(Path(root).glob("*/*.yaml")):
            if "-" not in file.stem or root is not CONFIG_ROOT:
                groups.setdefault(file.parent.name, []).append(file.stem)
    groups.setdefault("experiment", [])
    return groups


def compose_defaults() -> dict[str, Any]:
    """Return the plain tree of our own defaults."""
    tree = _compose(_Source(None, None, None), [], [])
    assert tree is not None, "the shipped configuration does not compose"
    return tree


def compose_command_line(argv: list[str]) -> Composed:
    """Compose the configuration of ``argv`` from the overrides that are fine, and say what is wrong with the rest."""
    result = Composed()
    overrides_argv = [arg for arg in argv if not _is_foreign_option(arg, argv, result.problems)]
    args, unknown = get_args_parser().parse_known_args(overrides_argv)
    result.problems += [f"{option} is not an option; write key=value" for option in unknown]
    source = _Source(args.config_path, args.config_name, args.config_dir)
    source_problems = source.problems()
    result.problems += source_problems
    if source_problems:
        return result

    parsed = list(_parse([_with_plus(line) for line in args.overrides], result.problems))
    is_group = {id(o): o.key_or_group in source.groups or "@" in o.input_line.split("=")[0] for o in parsed}
    choices = [o for o in parsed if is_group[id(o)] and _is_known_choice(o, source, result.problems)]
    values = [o for o in parsed if not is_group[id(o)]]
    base = _compose(source, [_first_line(o) for o in choices], result.problems)
    if base is None:
        return result
    values = [o for o in values if _is_known_value(o, base, source, result.problems)]
    for lines in _one_at_a_time([*choices, *values]):
        tree = _compose(source, lines, result.problems)
        if tree is not None:
            result.trees.append(tree)
    return result


@dataclass
class _Source:
    """Where the primary configuration is: ours, or a folder of the user's."""

    config_path: str | None
    config_name: str | None
    config_dir: str | None

    def __post_init__(self) -> None:
        self.name = self.config_name or "config"
        self.has_own_root = self.config_path is not None
        self.groups = {} if self.has_own_root else config_groups(self.config_dir)

    def problems(self) -> list[str]:
        found = []
        for option, path in (("--config-path", self.config_path), ("--config-dir", self.config_dir)):
            if path is not None and not Path(path).is_dir():
                found.append(f"{option}={path} is not a folder")
        if not found:
            folders = [self.config_path or self.config_dir, None if self.has_own_root else CONFIG_ROOT]
            if not any(folder and (Path(folder) / f"{self.name}.yaml").is_file() for folder in folders):
                found.append(f"--config-name={self.name}: there is no {self.name}.yaml in {folders[0] or 'conf'}")
        return found

    def open(self) -> AbstractContextManager:
        root = self.config_path or (self.config_dir if self._is_primary_in_dir() else None)
        if root is not None:
            return initialize_config_dir(str(Path(root).resolve()), version_base="1.3")
        return initialize_config_module("automodel.conf", version_base="1.3")

    def extra(self) -> list[str]:
        """Return the override by which Hydra looks in the other place too."""
        if self.config_dir is None:
            return []
        other = "pkg://automodel.conf" if self._is_primary_in_dir() else f"file://{Path(self.config_dir).resolve()}"
        return [f"hydra.searchpath=[{other}]"]

    def _is_primary_in_dir(self) -> bool:
        return self.config_dir is not None and (Path(self.config_dir) / f"{self.name}.yaml").is_file()


def _output_dir(job: list[str]) -> str | None:
    trees = compose_command_line(job).trees
    return trees[0].get("output_dir") if trees else None


def _folder_name(line: str) -> str:
    """Return an override as the name of a folder, in characters that an override and a shell take unquoted."""
    exact = line.lstrip("+~").replace("=", "-", 1)
    plain = re.sub(r"[^A-Za-z0-9._@+-]+", "-", exact)[:80]
    return plain if plain == exact else f"{plain.strip('-')}-{hashlib.sha256(line.encode()).hexdigest()[:6]}"


def _is_foreign_option(arg: str, argv: list[str], problems: list[str]) -> bool:
    """Note options in the style of other tools, ``--a.b=3`` or ``--a.b 3``, which are no options here."""
    before = argv[argv.index(arg) - 1] if argv.index(arg) else ""
    if arg.startswith("--") and "." in arg.split("=")[0]:
        key, _, value = arg[2:].partition("=")
        problems.append(f"{arg}: write {key}={value or 'VALUE'}, without dashes")
        return True
    return before.startswith("--") and "." in before and "=" not in before and "=" not in arg


def _with_plus(line: str) -> str:
    is_named = line.startswith(tuple(f"{table}{sign}" for table in NAMED_BY_USER for sign in ".="))
    return f"++{line}" if is_named else line


def _parse(lines: list[str], problems: list[str]) -> Iterator[Override]:
    parser = OverridesParser.create()
    for line in lines:
        if "=" not in line and not line.startswith("~"):
            problems.append(f"{line}: write key=value")
            continue
        try:
            yield parser.parse_override(line)
        except HydraException as error:
            reason = str(error).splitlines()[0]
            problems.append(f"{line}: cannot be read ({reason}); quote special characters: 'key=\"value\"'")


def _is_known_choice(override: Override, source: _Source, problems: list[str]) -> bool:
    group = override.key_or_group
    if group not in source.groups:
        problems.append(f"{override.input_line}: there is no group {group}{did_you_mean(group, source.groups)}")
        return False
    if override.is_delete():
        return True
    options = source.groups[group]
    ok = True
    for value in _values(override):
        for name in value if isinstance(value, list) else [value]:
            if (name is None and group == "experiment") or str(name) in options:
                continue
            ok = False
            if str(name) in LATER_OPTIONS.get(group, ()):
                problems.append(f"{group}={name} is not available in this version; there are: {', '.join(options)}")
            else:
                hint = did_you_mean(str(name), options)
                problems.append(f"{group}={name}: no such option; there are: {', '.join(options) or 'none'}{hint}")
    return ok


def _is_known_value(override: Override, base: dict[str, Any], source: _Source, problems: list[str]) -> bool:
    key = override.key_or_group
    if source.has_own_root and key in config_groups() and not isinstance(override.value(), dict):
        problems.append(f"{override.input_line}: a saved configuration has no groups to choose from; change its keys")
        return False
    if key.split(".")[0] == "hydra" or _exists(base, key):
        return True
    if any(key.startswith(f"{table}.") and _exists(base, table) for table in NAMED_BY_USER):
        return True
    if any(key == later or key.startswith(f"{later}.") for later in LATER_KEYS):
        problems.append(f"{key} is not available in this version")
        return False
    parent = key.rpartition(".")[0]
    if override.is_add() and parent and _is_open(base, parent):
        return True  # the signature of the target decides
    top = key.split(".")[0]
    if top in source.groups and base.get(top) in (None, {}):
        problems.append(f"{key}: nothing is chosen for {top}; add {top}={'|'.join(source.groups[top])}")
        return False
    if top == "distributed" and "." in key:
        told = check_target("distributed", base["distributed"] | {key.split(".")[1]: None})
        problems += [line for line in told if line.startswith(f"{key} ")]
        return False
    known = [each for each in leaf_keys(base) if each.startswith(f"{top}.")] if top in base else leaf_keys(base)
    found = nearest_key(key, known)
    if "." not in key:
        found = nearest(key, [*source.groups, *base]) or found
    hint = f"; did you mean {found}?" if found else "; python -m automodel.run --help lists the keys"
    problems.append(f"{key} is not a known key{hint}")
    return False


def _exists(tree: Any, key: str) -> bool:
    for part in key.split("."):
        if isinstance(tree, list) and part.isdecimal() and int(part) < len(tree):
            tree = tree[int(part)]
        elif isinstance(tree, dict) and part in tree:
            tree = tree[part]
        else:
            return False
    return True


def _is_open(tree: Any, parent: str) -> bool:
    """Return whether keys may be added under ``parent``: a target's arguments, or a free table such as model.config."""
    for part in parent.split("."):
        if not isinstance(tree, dict) or part not in tree:
            return False
        tree = tree[part]
    return isinstance(tree, dict) and ("_target_" in tree or parent.count(".") > 0)


def _values(override: Override) -> list[Any]:
    if override.is_sweep_override():
        return list(override.sweep_iterator())
    return [override.value()]


def _first_line(override: Override) -> str:
    return _lines(override)[0]


def _lines(override: Override) -> list[str]:
    """Return the override as plain lines, one for each value of a sweep."""
    if not override.is_sweep_override():
        return [override.input_line]
    key = override.get_key_element()
    return [f"{key}={value}" for value in override.sweep_string_iterator()]


def _one_at_a_time(overrides: list[Override]) -> Iterator[list[str]]:
    """Yield the first value of everything, then each further value of a sweep with the first of all others."""
    first = [_first_line(override) for override in overrides]
    yield first
    for index, override in enumerate(overrides):
        for line in _lines(override)[1:]:
            yield [*first[:index], line, *first[index + 1 :]]


def _compose(source: _Source, overrides: list[str], problems: list[str]) -> dict[str, Any] | None:
    try:
        with source.open():
            cfg = compose(source.name, overrides=[*source.extra(), *overrides])
            tree = OmegaConf.to_container(cfg, resolve=True, throw_on_missing=False)
    except (HydraException, OmegaConfBaseException, OSError, ValueError) as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        problems.append(f"the configuration cannot be composed: {' '.join(lines[:2])}")
        return None
    return {key: value for key, value in tree.items() if key != "hydra"}
