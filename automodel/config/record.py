"""The resolved configuration as YAML that can be run again, without secrets."""

from __future__ import annotations

import re
from typing import Any

import yaml

from automodel.config.schema import Config

MASK = "***"
_SECRET_KEY = re.compile(r"(^|_)(token|secret|password|api_?key)$", re.IGNORECASE)
_SECRET_ARGUMENT = re.compile(r"((?:token|secret|password|api_?key)=)[^\s'\"]+", re.IGNORECASE)
_SECRET_VALUE = re.compile(r"\b(hf_[A-Za-z0-9]{20,}|[0-9a-f]{40})\b")


def resolved_yaml(cfg: Config) -> str:
    """Return ``cfg`` as YAML; values that look like secrets are masked, since they belong in the environment."""
    header = "# Run again: python -m automodel.run --config-path ABSOLUTE_FOLDER --config-name config output_dir=NEW\n"
    return header + yaml.safe_dump(masked(cfg.model_dump(by_alias=True)), sort_keys=False, allow_unicode=True)


def masked(value: Any, key: str = "") -> Any:
    """Return plain data with secrets replaced."""
    if isinstance(value, dict):
        return {name: masked(item, str(name)) for name, item in value.items()}
    if isinstance(value, list):
        return [masked(item, key) for item in value]
    if isinstance(value, str):
        return MASK if _SECRET_KEY.search(key) else masked_text(value)
    return value


def masked_text(text: str) -> str:
    """Return ``text`` without what looks like a secret in it, such as in a command line."""
    return _SECRET_ARGUMENT.sub(rf"\1{MASK}", _SECRET_VALUE.sub(MASK, text))
