"""The configuration: composed, checked in full without torch, and written down."""

from __future__ import annotations

import copy
import os
import sys
from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from automodel.config.check import cross_checks, world_size_of
from automodel.config.command_line import compose_command_line
from automodel.config.compose import compose_defaults
from automodel.config.foreign_names import find_foreign
from automodel.config.messages import pydantic_problems
from automodel.config.names import key_hint, value_at
from automodel.config.schema import Config
from automodel.config.targets import check_launch_target, check_option, check_recipe, is_ours, targets_in, unknown_keys
from automodel.secrets import lost_keys
from automodel.types import UserError

_TARGETS = (
    "model", "peft", "dataset", "validation_dataset", "distributed", "optimizer", "lr_scheduler", "loss_fn",
    "evaluation", "launch",
)  # fmt: skip


def load_config(argv: list[str], *, env: Mapping[str, str] = os.environ) -> Config:
    """Compose and check the configuration of a command line (what follows ``python -m automodel.run``).

    Of a sweep, every value is checked and the first combination returned. What was chosen for the user is printed.

    Raises:
        UserError: with every problem found, a line each.
    """
    return load_command_line(argv, env=env)[0]


def load_command_line(argv: list[str], *, env: Mapping[str, str] = os.environ) -> tuple[Config, list[str]]:
    """Return the configuration as ``load_config`` does, and the command line with what was chosen written out."""
    composed = compose_command_line(argv)
    problems = list(composed.problems)
    configs = []
    for tree in composed.trees:
        config, found = validate(tree, env)
        configs.append(config)
        problems += [line for line in found if not line.startswith(tuple(composed.unresolved))]
    if env.get("RANK", env.get("SLURM_PROCID", "0")) == "0":
        for note in composed.notes:
            print(f"note: {note}", file=sys.stderr)
    if problems:
        raise UserError(*dict.fromkeys(problems))
    return configs[0], composed.argv


def validate(tree: dict[str, Any], env: Mapping[str, str]) -> tuple[Config | None, list[str]]:
    """Check a resolved tree in full; a user's own targets are imported only once nothing else is wrong."""
    problems = [
        f"{key} held a secret, which was not written down: export it in a variable and add {key}='${{oc.env:NAME}}'"
        for key in lost_keys(tree)
    ]
    try:
        config: Config | None = Config.model_validate(tree)
    except ValidationError as error:
        problems += [_with_hint(line, tree) for line in pydantic_problems(error)]
        config = _with_defaults_instead(tree, error)
    world_size = None if config is None else world_size_of(config, env)
    sections = _sections(tree)
    ours = [(key, section) for key, section in sections if is_ours(section) or "_target_" not in section]
    theirs = [each for each in sections if each not in ours]
    if config is not None:
        problems += cross_checks(config, env)
    problems += [line for each in ours for line in check_option(*each, config, world_size=world_size)]
    if not problems:
        config, theirs = _without_keys_of_the_default_loss(config, theirs)
        problems = [line for each in theirs for line in check_option(*each, config, world_size=world_size)]
    if not problems and config is not None:
        problems = check_recipe(config.recipe) + check_launch_target(config.launch["_target_"])
    return config, problems


def _without_keys_of_the_default_loss(
    config: Config, sections: list[tuple[str, dict[str, Any]]]
) -> tuple[Config, list[tuple[str, dict[str, Any]]]]:
    """Drop what a loss of the user's own has from the default option alone: untouched keys that it does not take."""
    section = config.loss_fn
    if is_ours(section):
        return config, sections
    defaults, unknown = compose_defaults()["loss_fn"], unknown_keys(section)
    dropped = {key for key in unknown if key in defaults and section[key] == defaults[key]}
    section = {key: value for key, value in section.items() if key not in dropped}
    sections = [(key, section if key == "loss_fn" else each) for key, each in sections]
    return config.model_copy(update={"loss_fn": section}), sections


def _with_defaults_instead(tree: dict[str, Any], error: ValidationError) -> Config | None:
    """Put defaults where keys are wrong, so that the rest can be checked too; None where that does not help."""
    tree, defaults = copy.deepcopy(tree), compose_defaults()
    for item in error.errors():
        place, default = tree, defaults
        *parents, last = item["loc"][:2]
        for parent in parents:
            place, default = place.get(parent), default.get(parent)
            if not isinstance(place, dict) or not isinstance(default, dict):
                return None
        if last in default:
            place[last] = default[last]
        else:
            place.pop(last, None)
    try:
        return Config.model_validate(tree)
    except ValidationError:
        return None


def _sections(tree: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    found = [(name, tree[name]) for name in _TARGETS if isinstance(tree.get(name), dict) and tree[name]]
    loggers = tree.get("logger")
    if isinstance(loggers, dict):
        found += [(f"logger.{name}", section) for name, section in loggers.items() if isinstance(section, dict)]
    inner = [each for name, section in found for each in targets_in(name, section) if each[0] != name]
    return found + inner


def _with_hint(line: str, tree: dict[str, Any]) -> str:
    """Add the nearest key to a line about an unknown one."""
    key = line.partition("=")[0]
    if line.endswith(" must be a section of keys") and (foreign := find_foreign(key)) is not None:
        return f"{line}; {foreign.hint(value_at(tree, key))}"
    key, _, rest = line.partition(" is not a known key")
    if key == line or rest:
        return line
    return f"{line}{key_hint(key, _known_keys(), value_at(tree, key))}"


def _known_keys() -> list[str]:
    keys = []
    for name, field in Config.model_fields.items():
        keys.append(name)
        inner = getattr(field.annotation, "model_fields", {})
        keys += [f"{name}.{each}" for each in inner]
    return keys
