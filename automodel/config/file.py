"""A configuration that is run as a file of its own: keys of ours, with or without a defaults list."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf

from automodel.config.names import leaf_keys

_OURS = ("config", "_self_")


@dataclass
class ConfigFile:
    """What a file says.

    Attributes:
        choices: the options that it chooses, by group.
        values: its keys, without what chooses.
        is_whole: it is complete: the saved configuration of a run, or a defaults list that names other files.
    """

    path: Path
    choices: dict[str, Any] = field(default_factory=dict)
    values: dict[str, Any] = field(default_factory=dict)
    is_whole: bool = False

    def given(self) -> dict[str, Any]:
        """Return its keys with their values, as the command line would have them."""
        return {
            key: _at(self.values, key) for key in leaf_keys(self.values) if not isinstance(_at(self.values, key), dict)
        }


def read_config_file(path: Path, groups: dict[str, list[str]], problems: list[str]) -> ConfigFile | None:
    """Return what the file says, or None where it cannot be read, which is added to ``problems``."""
    found = ConfigFile(path)
    try:
        loaded = OmegaConf.load(path)
    except yaml.MarkedYAMLError as error:
        problems.append(yaml_problem(error))
        return None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        what = "there is no such file" if isinstance(error, FileNotFoundError) else f"cannot be read ({error})"
        problems.append(f"{path}: {what}")
        return None
    if not isinstance(loaded, DictConfig):
        problems.append(f"{path}: a configuration is made of lines key: value")
        return None
    found.values = OmegaConf.to_container(loaded, resolve=False)
    recipe = found.values.get("recipe")
    if isinstance(recipe, dict) and "_target_" in recipe:
        found.is_whole = True
        return found
    for entry in found.values.pop("defaults", None) or []:
        if isinstance(entry, dict):
            found.choices |= {_group_of(str(name)): option for name, option in entry.items()}
        elif entry not in _OURS:
            found.is_whole = True
    for group in groups:
        if group in found.values and not isinstance(found.values[group], dict):
            found.choices[group] = found.values.pop(group)
    return found


def yaml_problem(error: yaml.MarkedYAMLError) -> str:
    """Return what is wrong with a YAML file as ``file:line:column: problem``."""
    mark = error.problem_mark or error.context_mark
    where = f"{mark.name}:{mark.line + 1}:{mark.column + 1}" if mark else "YAML"
    problem = error.problem or error.context or str(error)
    if "'\\t'" in problem:
        problem = "a tab; YAML takes spaces alone"
    elif problem.startswith("found duplicate key"):
        problem = f"the key {problem.removeprefix('found duplicate key ')} is there twice"
    elif problem == "mapping values are not allowed here":
        problem += " (a colon and a space inside a text; put the text in quotes)"
    return f"{where}: {problem}"


def _group_of(name: str) -> str:
    return name.split()[-1].partition("@")[0].lstrip("/")


def _at(tree: dict[str, Any], key: str) -> Any:
    for part in key.split("."):
        tree = tree[part]
    return tree
