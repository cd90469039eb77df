"""The groups of the configuration tree: their options, and the keys that each option brings."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from automodel import conf
from automodel.config.names import leaf_keys

CONFIG_ROOT = Path(conf.__file__).parent


def config_groups(extra_dir: str | None = None) -> dict[str, list[str]]:
    """Return the options of every group; those that a combination chooses by itself (with ``-``) left out."""
    groups: dict[str, list[str]] = {}
    for root in filter(None, (CONFIG_ROOT, extra_dir and Path(extra_dir))):
        for file in sorted(Path(root).glob("*/*.yaml")):
            if "-" not in file.stem or root is not CONFIG_ROOT:
                groups.setdefault(file.parent.name, []).append(file.stem)
    groups.setdefault("experiment", [])
    return groups


@cache
def option_tree(group: str, option: str) -> dict[str, Any]:
    """Return the section that a shipped option makes, with those of the options that it is built on."""
    own = OmegaConf.to_container(OmegaConf.load(CONFIG_ROOT / group / f"{option}.yaml"), resolve=False) or {}
    own.pop("defaults", None)
    tree: dict[str, Any] = {}
    for base in bases(group, option):
        tree |= option_tree(*base)
    return tree | own


def is_built_on(group: str, option: str, other: str) -> bool:
    """Return whether a shipped option begins with all that ``other`` of the same group holds."""
    return (group, other) in bases(group, option)


@cache
def shipped_keys() -> tuple[str, ...]:
    """Return every dotted key of the fixed sections and of every option."""
    fixed = OmegaConf.to_container(OmegaConf.load(CONFIG_ROOT / "config.yaml"), resolve=False)
    keys = leaf_keys({name: value for name, value in fixed.items() if name not in ("defaults", "hydra")})
    for group, options in config_groups().items():
        if group not in ("recipe", "tuned", "tuned_optimizer"):
            keys += [key for option in options for key in leaf_keys(option_tree(group, option), f"{group}.")]
    return tuple(dict.fromkeys(keys))


def exists(tree: Any, key: str) -> bool:
    """Return whether a dotted key leads somewhere in a plain tree."""
    for part in key.split("."):
        if isinstance(tree, list) and part.isdecimal() and int(part) < len(tree):
            tree = tree[int(part)]
        elif isinstance(tree, dict) and part in tree:
            tree = tree[part]
        else:
            return False
    return True


def is_named_by_user(key: str) -> bool:
    """Return whether a dotted key is, or lies in, a table that a shipped option leaves empty for users to fill."""
    group, *rest = key.split(".")
    return bool(rest) and any(
        option_tree(group, option).get(rest[0]) == {} for option in config_groups().get(group, ())
    )


def options_with(group: str, keys: list[str]) -> list[str]:
    """Return the shipped options of ``group`` that have all of ``keys``, which are dotted and begin below the group."""
    return [
        option
        for option in config_groups().get(group, [])
        if all(_takes(option_tree(group, option), key) for key in keys)
    ]


def _takes(tree: dict[str, Any], key: str) -> bool:
    """Return whether ``key`` is there, or lies in a table that the option leaves to the user."""
    parents = [key.rpartition(".")[0]] if "." in key else []
    while parents and "." in parents[-1]:
        parents.append(parents[-1].rpartition(".")[0])
    open_tables = ("config", "sources")
    return exists(tree, key) or any(each in open_tables and exists(tree, each) for each in parents)


@cache
def bases(group: str, option: str) -> tuple[tuple[str, str], ...]:
    """Return the options that a shipped option is built on, as (group, option)."""
    found = []
    for entry in OmegaConf.load(CONFIG_ROOT / group / f"{option}.yaml").get("defaults", []):
        if isinstance(entry, str):
            if entry != "_self_":
                found.append((group, entry))
            continue
        for name, option in entry.items():
            found.append((str(name).partition("@")[0].lstrip("/"), str(option)))
    return tuple(found)
