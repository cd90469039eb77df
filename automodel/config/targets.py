"""Check a section with ``_target_``: its keys against the signature of its target, then by the target itself."""

from __future__ import annotations

import inspect
import sys
import typing
from collections.abc import Iterator
from importlib import import_module
from typing import Annotated, Any, Protocol

from pydantic import ConfigDict, Field, ValidationError, create_model

from automodel.config.foreign_names import find_foreign
from automodel.config.groups import options_with
from automodel.config.messages import pydantic_problems
from automodel.config.names import did_you_mean, key_hint
from automodel.config.schema import Config, Recipe, Text

_HYDRA_KEYS = ("_target_", "_partial_", "_convert_", "_recursive_", "_args_")


class ChecksItself(Protocol):
    """What the class or function that a ``_target_`` names may offer, ours or a user's, to check its own keys.

    A single number that is too small needs none of this: the annotation says so (``rank: PositiveInt``).
    """

    @staticmethod
    def problems(section: dict[str, Any], cfg: Config, *, key: str, world_size: int) -> Iterator[str]:
        """Yield a line for each mistake: the full key, what was given, and what to do instead.

        It is called before torch is imported and before any process starts, so it must be quick and needs no torch
        in a shipped option.

        Args:
            section: the keys that fit the signature and, in a shipped option, its types; wrong ones, which are
                reported already, are left out, as are required ones that are missing.
            cfg: the whole configuration; other sections may still hold wrong keys.
            key: the section's own dotted key, such as ``validation_dataset`` or ``logger.wandb``.
            world_size: the number of ranks that the run will have.
        """
        ...


def is_ours(section: dict[str, Any]) -> bool:
    """Return whether the section's target is shipped, so that importing it is quick and free of torch."""
    return str(section.get("_target_", "")).startswith("automodel.")


def targets_in(name: str, section: Any) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield (key, section) for ``section`` and all inside it that have a ``_target_``: Hydra builds each of them."""
    if isinstance(section, list):
        section = dict(enumerate(section))
    if isinstance(section, dict):
        if "_target_" in section:
            yield name, section
        for key, value in section.items():
            yield from targets_in(f"{name}.{key}", value)


def foreign_code(name: str, section: Any) -> list[str]:
    """Return a line for each part of a section, as a file holds it, that would run code which is not ours."""
    found = [f"{key}._target_={each['_target_']}" for key, each in targets_in(name, section) if not _is_shipped(each)]
    if isinstance(section, dict) and section.get("trust_remote_code"):
        found.append(f"{name}.trust_remote_code=true")
    return found


def check_recipe(recipe: Recipe) -> list[str]:
    """Return what is wrong with ``recipe._target_`` and the keys that are handed to it."""
    problems = check_target("recipe", {"_target_": recipe.target, **recipe.own_keys})
    if problems:
        return problems
    try:
        described = resolve(recipe.target)(**recipe.own_keys)
    except Exception as error:
        return [f"recipe._target_={recipe.target}: {type(error).__name__}: {error}"]
    if not hasattr(described, "task"):
        kind = "automodel.runner.recipe.Recipe"
        return [f"recipe._target_={recipe.target} must return {kind}, not {type(described).__name__}"]
    return []


def check_launch_target(path: str) -> list[str]:
    """Return what is wrong with what ``launch._target_`` names beyond its keys."""
    target = resolve(path)
    if isinstance(target, type) and (hasattr(target, "submit") or hasattr(target, "run")):
        return []
    return [
        f"launch._target_={path} must be a class with a method submit(submission), which hands the run to a cluster, "
        "or run(module, argv), which starts its workers here"
    ]


def is_cluster(launch: dict[str, Any]) -> bool:
    """Return whether a section ``launch`` hands the run to a cluster instead of starting it here."""
    return hasattr(resolve(launch["_target_"]), "submit")


def check_target(name: str, section: dict[str, Any]) -> list[str]:
    """Return what is wrong with the keys of a section, a line each; imports its target.

    The keyword arguments must be parameters of the target; those that are required must be there. Types are
    checked for shipped targets alone, whose annotations are plain.
    """
    return _check_keys(name, section)[0]


def check_option(key: str, section: dict[str, Any], cfg: Config | None, *, world_size: int | None) -> list[str]:
    """Return what ``check_target`` finds and then what the target itself says about the keys that are right.

    Without ``cfg`` or ``world_size``, which are None where they are wrong themselves, the target is not asked.
    """
    problems, wrong_keys = _check_keys(key, section)
    if cfg is None or world_size is None or wrong_keys is None:
        return problems
    checks_itself = getattr(resolve(section["_target_"]), "problems", None)
    if checks_itself is not None:
        right = {name: value for name, value in section.items() if name not in (*_HYDRA_KEYS, *wrong_keys)}
        problems += checks_itself(right, cfg, key=key, world_size=world_size)
    return problems


def unknown_keys(section: dict[str, Any]) -> set[str]:
    """Return the keys that the section's target does not take; none where it cannot be imported."""
    try:
        target = resolve(section["_target_"])
    except Exception:  # reported by check_target
        return set()
    parameters = _parameters(target, is_partial=bool(section.get("_partial_")), has_plain_types=is_ours(section))
    return set() if parameters is None else {key for key in section if key not in (*_HYDRA_KEYS, *parameters)}


def _check_keys(name: str, section: dict[str, Any]) -> tuple[list[str], set[str] | None]:
    """Return the problems and the keys that have one; None instead of keys where the target cannot be imported."""
    path = section.get("_target_")
    if not isinstance(path, str):
        return [f"{name} has no _target_; choose one of the group's options, or name a class or function"], None
    try:
        target = resolve(path)
    except Exception as error:
        return [f"{name}._target_={path}: cannot be imported: {type(error).__name__}: {error}"], None
    given = {key: value for key, value in section.items() if key not in _HYDRA_KEYS}
    parameters = _parameters(target, is_partial=bool(section.get("_partial_")), has_plain_types=is_ours(section))
    if parameters is None:
        return [], set()
    unknown = [key for key in given if key not in parameters]
    problems = [
        f"{name}.{key} is not an option of {_short(path)}{_hint(name, key, parameters, given[key])}" for key in unknown
    ]
    missing = [key for key, (_, default) in parameters.items() if default is ... and given.get(key) in (None, "???")]
    required = [key for key in missing if key not in given or given[key] == "???"]
    problems += [f"{name}.{key} is required: set {name}.{key}=..." for key in required]
    wrong = {*unknown, *required}
    if is_ours(section):
        typed = {key: value for key, value in given.items() if key not in wrong}
        found, of_wrong_type = _type_problems(name, {key: parameters[key] for key in typed}, typed)
        return problems + found, wrong | of_wrong_type
    return problems, wrong


def _is_shipped(section: dict[str, Any]) -> bool:
    """Return whether a target is our own, and not what one of our modules has imported."""
    if not is_ours(section):
        return False
    try:
        return str(resolve(section["_target_"]).__module__).startswith("automodel.")
    except Exception:
        return True  # reported by check_target, which does not import it either


def resolve(path: str) -> Any:
    """Import what a dotted path names."""
    module_name, _, attribute = path.rpartition(".")
    return getattr(import_module(module_name), attribute)


def _parameters(target: Any, *, is_partial: bool, has_plain_types: bool) -> dict[str, tuple[Any, Any]] | None:
    """Return annotation and default (``...``: required) of every configurable parameter; None: any key goes.

    A partial gets its positional arguments at run time, so that only keyword-only ones are configured in ours,
    and all but the first in a user's.
    """
    try:
        parameters = list(inspect.signature(target).parameters.values())
    except ValueError:  # some that are written in C do not say theirs
        return None
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        return None
    if is_partial:
        ours = [parameter for parameter in parameters if parameter.kind is parameter.KEYWORD_ONLY]
        parameters = ours if has_plain_types else parameters[1:]
    names = _names_in(target) if has_plain_types else None
    return {
        parameter.name: (_annotation(parameter, names), ... if parameter.default is parameter.empty else None)
        for parameter in parameters
        if parameter.kind is not parameter.VAR_POSITIONAL
    }


def _names_in(target: Any) -> dict[str, Any]:
    """Return the names that annotations of a function, or of a class and those it extends, may use."""
    kinds = target.__mro__ if inspect.isclass(target) else (target,)
    return {name: value for kind in reversed(kinds) for name, value in vars(sys.modules[kind.__module__]).items()}


def _annotation(parameter: inspect.Parameter, names: dict[str, Any] | None) -> Any:
    """Evaluate one parameter's annotation; those of run-time arguments need torch and are left alone."""
    if names is None or not isinstance(parameter.annotation, str):
        return Any if names is None else parameter.annotation
    return eval(parameter.annotation, names)  # our own source code, written out as text by the future import


def _type_problems(
    name: str, parameters: dict[str, tuple[Any, Any]], given: dict[str, Any]
) -> tuple[list[str], set[str]]:
    """Return the problems and the keys that have one."""
    fields: dict[str, Any] = {key: (_lenient(annotation), ...) for key, (annotation, _) in parameters.items()}
    model = create_model("Options", __config__=ConfigDict(strict=True, protected_namespaces=()), **fields)
    try:
        model(**given)
    except ValidationError as error:
        return pydantic_problems(error, prefix=f"{name}."), {str(item["loc"][0]) for item in error.errors()}
    return [], set()


def _lenient(annotation: Any) -> Any:
    """Return the annotation as YAML can meet it: lists for tuples, and a number where text is meant."""
    if typing.get_origin(annotation) is tuple:
        items = typing.get_args(annotation)
        return Annotated[list[items[0]], Field(min_length=len(items), max_length=len(items))]
    if annotation is str:
        return Text
    if annotation == str | None:
        return Text | None
    return annotation


def _hint(section: str, key: str, parameters: dict[str, Any], value: Any) -> str:
    others = [f"{section}={option}" for option in options_with(section, [key])]
    if others:
        return f"; {others[0]} has it" + "".join(f", {other} too" for other in others[1:])
    if find_foreign(key) is not None and key not in parameters:
        return key_hint(
            f"{section}.{key}", [f"{section}.{each}" for each in parameters], None if value is None else str(value)
        )
    return did_you_mean(key, parameters)


def _short(path: str) -> str:
    return path.rpartition(".")[2]
