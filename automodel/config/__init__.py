"""The configuration: composed, checked in full without torch, and written down."""

from importlib import import_module
from typing import Any

_HOME = {
    "Config": "schema",
    "has_help": "arguments",
    "help_text": "help",
    "hydra_command_line": "command_line",
    "hydra_flags": "arguments",
    "load_command_line": "load",
    "load_config": "load",
    "resolved_yaml": "record",
    "secret_keys": "record",
    "sweep_jobs": "sweep",
    "validate": "load",
    "without_launch": "command_line",
}
__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    # Lazily, because help needs neither Hydra nor pydantic, whose imports take longer than the help itself.
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
