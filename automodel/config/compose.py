"""Compose a plain tree with Hydra, from our own configuration and from what a user has beside it."""

from __future__ import annotations

import copy
import re
from contextlib import AbstractContextManager, suppress
from functools import lru_cache
from pathlib import Path
from typing import Any

import yaml
from hydra import compose, initialize_config_dir, initialize_config_module
from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from automodel.config.arguments import Arguments
from automodel.config.choices import quoted
from automodel.config.file import ConfigFile, read_config_file, yaml_problem
from automodel.config.groups import CONFIG_ROOT, config_groups
from automodel.config.overrides import values_of

_FILE_GROUP, _FILE_NAME = "config_file", "values"
_PACKAGE = re.compile(r"^\s*#\s*@package\s", re.MULTILINE)


class Source:
    """Where the primary configuration is (ours, or a user's), and what is laid over it.

    Attributes:
        has_own_root: whether nothing of our configuration is composed: a saved one, without groups.
        file: a configuration that is run as a file of its own, and is not the primary one.
        unresolved: keys of trees whose value could not be found, already reported.
    """

    def __init__(self, arguments: Arguments, problems: list[str]) -> None:
        self._path, self._name, self._dir = (
            arguments.config_path,
            arguments.config_name or "config",
            arguments.config_dir,
        )
        self.unresolved: set[str] = set()
        self.file = self._read_file(arguments, problems)
        found = [*self._problems()]
        problems += found
        if found:
            self._path, self._name, self._dir = None, "config", None
        self.is_broken = bool(found)
        self.has_own_root = self._path is not None
        self.groups = {} if self.has_own_root else config_groups(self._dir)

    def _read_file(self, arguments: Arguments, problems: list[str]) -> ConfigFile | None:
        if arguments.file is None:
            return None
        if arguments.config_path or arguments.config_name:
            problems.append(f"{arguments.file}: leave out --config-path and --config-name, which name another file")
        file = Path(arguments.file).expanduser()
        found = read_config_file(file, config_groups(self._dir), problems)
        if found is None or not found.is_whole:
            return found
        self._name = file.stem
        if found.choices or "defaults" in found.values:
            self._dir = str(file.parent)
        else:
            self._path = str(file.parent)
        return None

    def _problems(self) -> list[str]:
        found = []
        for option, path in (("--config-path", self._path), ("--config-dir", self._dir)):
            if path is not None and not Path(path).is_dir():
                found.append(f"{option}={path} is not a folder")
        if not found:
            folders = [self._path or self._dir, None if self._path else CONFIG_ROOT]
            if not any(folder and (Path(folder) / f"{self._name}.yaml").is_file() for folder in folders):
                found.append(f"--config-name={self._name}: there is no {self._name}.yaml in {folders[0] or 'conf'}")
        return found

    def flags(self) -> list[str]:
        """Return the flags by which Hydra finds the primary configuration."""
        named = {"--config-path": self._path and str(Path(self._path).resolve()), "--config-dir": self._dir}
        flags = [f"{flag}={value}" for flag, value in named.items() if value is not None]
        return [*flags, f"--config-name={self._name}"] if self._name != "config" else flags

    def open(self) -> AbstractContextManager:
        root = self._path or (self._dir if self._is_primary_in_dir() else None)
        if root is not None:
            return initialize_config_dir(str(Path(root).resolve()), version_base="1.3")
        return initialize_config_module("automodel.conf", version_base="1.3")

    def file_override(self) -> list[str]:
        """Return the override by which Hydra lays the keys of the file over the rest."""
        if self.file is None:
            return []
        store = ConfigStore.instance()
        store.store(name=_FILE_NAME, group=_FILE_GROUP, node=self.file.values, package="_global_")
        return [f"+{_FILE_GROUP}={_FILE_NAME}"]

    def file_choices(self) -> list[tuple[str, str]]:
        """Return every group of which the file chooses an option, with the override that does the same."""
        return [(group, f"{group}={_as_override(option)}") for group, option in self._of_file("choices").items()]

    def file_keys(self) -> dict[str, Any]:
        """Return the keys of the file with their values, but those of sections that name their own target."""
        targets = self.file_targets()
        keys = self.file.given() if self.file is not None else {}
        return {key: value for key, value in keys.items() if key.split(".")[0] not in targets}

    def file_targets(self) -> set[str]:
        """Return the sections that the file gives a target of its own."""
        sections = self._of_file("values").items()
        return {name for name, section in sections if isinstance(section, dict) and "_target_" in section}

    def _of_file(self, what: str) -> dict[str, Any]:
        return getattr(self.file, what) if self.file is not None else {}

    def compose(self, overrides: list[str], problems: list[str], *, with_file: bool = True) -> dict[str, Any] | None:
        """Return the plain tree, or None where it cannot be composed; values that cannot be resolved are null."""
        over_it = self.file_override() if with_file else []
        if self._path is None and self._dir is None and not over_it and not any("${" in line for line in overrides):
            with suppress(HydraException, OmegaConfBaseException):  # reported below
                return copy.deepcopy(_compose_ours(tuple(overrides)))
        try:
            with self.open():
                cfg = compose(self._name, overrides=[*self._searchpath(), *over_it, *overrides])
        except yaml.MarkedYAMLError as error:
            problems.append(yaml_problem(error))
            return None
        except (HydraException, OmegaConfBaseException, OSError, ValueError, yaml.YAMLError) as error:
            lines = [line.strip() for line in str(error).splitlines() if line.strip()]
            problems.append(f"the configuration cannot be composed: {' '.join(lines[:2])}")
            return None
        self.unresolved |= _mark_unresolved(cfg, problems)
        tree = OmegaConf.to_container(cfg, resolve=True, throw_on_missing=False)
        return {key: value for key, value in tree.items() if key != "hydra"}

    def _searchpath(self) -> list[str]:
        """Return the override by which Hydra looks in the other place too."""
        if self._dir is None:
            return []
        other = "pkg://automodel.conf" if self._is_primary_in_dir() else f"file://{Path(self._dir).resolve()}"
        return [f"hydra.searchpath=[{other}]"]

    def experiment_problems(self, override: Override) -> list[str]:
        """Return what is wrong with the first line of an experiment of the user's."""
        if override.key_or_group != "experiment" or override.is_delete():
            return []
        files = [root / "experiment" / f"{name}.yaml" for name in values_of(override) for root in self._roots()]
        return [
            f"{file}:1: the first line must be '# @package _global_'; without it the keys lie under experiment."
            for file in files
            if file.is_file() and not _PACKAGE.search(file.read_text(errors="replace"))
        ]

    def _roots(self) -> list[Path]:
        return [Path(self._dir), CONFIG_ROOT] if self._dir else [CONFIG_ROOT]

    def _is_primary_in_dir(self) -> bool:
        return self._dir is not None and (Path(self._dir) / f"{self._name}.yaml").is_file()


@lru_cache(maxsize=64)
def _compose_ours(overrides: tuple[str, ...]) -> dict[str, Any]:
    """Compose what needs our own files alone, which do not change; a tenth of a second or more each time."""
    with initialize_config_module("automodel.conf", version_base="1.3"):
        return OmegaConf.to_container(compose("config", overrides=list(overrides)), resolve=True)


def compose_defaults() -> dict[str, Any]:
    """Return the plain tree of our own defaults."""
    problems: list[str] = []
    tree = Source(Arguments(), problems).compose([], problems)
    assert tree is not None, f"the shipped configuration does not compose: {problems}"
    return tree


def _mark_unresolved(cfg: DictConfig, problems: list[str]) -> set[str]:
    """Tell every value that cannot be resolved, such as an environment variable that is not set; return their keys."""
    found = set()
    for key, text in _interpolated(OmegaConf.to_container(cfg, resolve=False)):
        try:
            OmegaConf.select(cfg, key)
        except OmegaConfBaseException as error:
            variable = re.search(r"Environment variable '(.+?)' not found", str(error))
            reason = (
                f"the environment variable {variable[1]} is not set; export it, or give {key}=..."
                if variable
                else f"cannot be resolved ({str(error).splitlines()[0]})"
            )
            problems.append(f"{key}={text}: {reason}")
            OmegaConf.update(cfg, key, None)
            found.add(key)
    return found


def _interpolated(tree: Any, prefix: str = "") -> list[tuple[str, str]]:
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    found = []
    for name, value in items:
        key = f"{prefix}[{name}]" if isinstance(tree, list) else f"{prefix}.{name}" if prefix else str(name)
        if isinstance(value, str) and "${" in value:
            found.append((key, value))
        found += _interpolated(value, key)
    return found


def _as_override(option: Any) -> str:
    """Return the value of a defaults list as an override has it."""
    if option is None:
        return "none"
    return f"[{','.join(map(str, option))}]" if isinstance(option, list) else quoted(str(option))
