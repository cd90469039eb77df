"""How much room a checkpoint will take, before there is an optimizer state to measure."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from automodel.checkpoint.training import free_mib
from automodel.logs import get_logger

log = get_logger(__name__)


def expected_bytes(model: nn.Module, build_optimizer: Callable[[list[dict[str, Any]]], torch.optim.Optimizer]) -> int:
    """Return about how many bytes a checkpoint of ``model`` takes: its trained weights and their optimizer state."""
    trained = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
    return round(trained * (1 + _states_per_weight(build_optimizer)))


def warn_of_little_room(folder: Path, num_bytes: int) -> None:
    """Log a warning where the disk of ``folder`` has no room for ``num_bytes``."""
    free, needed = free_mib(folder), -(-num_bytes // 2**20)
    if free < needed:
        log.warning(
            "a checkpoint takes about %d MiB, and %d MiB are free on the disk of %s: the first save will fail; make "
            "room, choose another output_dir, or set checkpoint.enabled=false",
            needed, free, folder,
        )  # fmt: skip


def _states_per_weight(build_optimizer: Callable[[list[dict[str, Any]]], torch.optim.Optimizer]) -> float:
    """Return the size of the state that one step leaves behind, as a multiple of the weights."""
    probe = nn.Parameter(torch.zeros(64, 64))
    probe.grad = torch.zeros_like(probe)
    optimizer = build_optimizer([{"params": [probe]}])
    optimizer.step()
    state = (value for value in optimizer.state[probe].values() if isinstance(value, torch.Tensor))
    return sum(value.numel() * value.element_size() for value in state) / (probe.numel() * probe.element_size())
