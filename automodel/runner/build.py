"""Build the objects that sections of the configuration name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def build(section: Mapping[str, Any] | None) -> Any:
    """Instantiate a section with a ``_target_``; None for no section."""
    from hydra.utils import instantiate
    from omegaconf import OmegaConf

    return instantiate(OmegaConf.create(dict(section)), _convert_="all") if section else None
