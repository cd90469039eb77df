"""The resolved configuration as YAML that can be run again, without secrets."""

from __future__ import annotations

import yaml

from automodel.config.schema import Config
from automodel.secrets import masked, masked_keys

_RUN_AGAIN = "# Run again: python -m automodel.run --config-path ABSOLUTE_FOLDER --config-name config output_dir=NEW\n"


def resolved_yaml(cfg: Config) -> str:
    """Return ``cfg`` as YAML without its secrets; its first lines say how to give them again."""
    tree = masked(cfg.model_dump(by_alias=True))
    header = _RUN_AGAIN
    if hidden := secret_keys(cfg):
        header += "# Secrets are not written down. Those that are *** must be given again, each from a variable:\n"
        header += "".join(f"#   {key}='${{oc.env:NAME}}'\n" for key in hidden)
    return header + yaml.safe_dump(tree, sort_keys=False, allow_unicode=True)


def secret_keys(cfg: Config) -> list[str]:
    """Return the keys whose values are not written down as they are."""
    return masked_keys(cfg.model_dump(by_alias=True))
