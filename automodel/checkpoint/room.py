"""How much room a checkpoint will take, before there is an optimizer state to measure."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from automodel.logs import get_logger

log = get_logger(__name__)


def expected_bytes(model: nn.Module, build_optimizer: Callable[[list[dict[str, Any]]], torch.optim.Optimizer]) -> int:
    """Return about how many bytes a checkpoint of ``model`` takes: its trained weights and their optimizer state.

    Of an optimizer that cannot be tried on a small weight, the state is not counted: an estimate stops no run.
    """
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    num_bytes = sum(parameter.numel() * parameter.element_size() for parameter in trained)
    try:
        return round(num_bytes * (1 + _states_per_weight(build_optimizer, trained[0].device)))
    except Exception as error:  # it is the user's code, which may raise anything
        log.debug("the optimizer's state is not part of the room that a checkpoint is said to take: %s", error)
        return num_bytes


def warn_of_little_room(folder: Path, num_bytes: int) -> None:
    """Log a warning where the disk of ``folder`` has no room for ``num_bytes``."""
    try:
        free, needed = free_mib(folder), -(-num_bytes // 2**20)
    except OSError:  # the first save will tell
        return
    if free < needed:
        log.warning(
            "a checkpoint takes about %d MiB, and %d MiB are free on the disk of %s: the first save will fail; make "
            "room, choose another output_dir, or set checkpoint.enabled=false",
            needed, free, folder,
        )  # fmt: skip


def free_mib(folder: Path) -> int:
    """Return how much room is left on the disk of ``folder``, or of the first folder above it that exists."""
    place = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    return shutil.disk_usage(place).free // 2**20


def free_room(folder: Path) -> str:
    """Return the same in words."""
    try:
        return f"{free_mib(folder)} MiB are free on its disk"
    except OSError as error:
        return f"its disk does not answer ({error})"


def _states_per_weight(
    build_optimizer: Callable[[list[dict[str, Any]]], torch.optim.Optimizer], device: torch.device
) -> float:
    """Return the size of the state that one step leaves behind, as a multiple of the weights.

    It is tried on the weights' own device, which may be the only one that the optimizer runs on.
    """
    probe = nn.Parameter(torch.zeros(64, 64, device=device))
    probe.grad = torch.zeros_like(probe)
    optimizer = build_optimizer([{"params": [probe]}])
    optimizer.step()
    state = (value for value in optimizer.state[probe].values() if isinstance(value, torch.Tensor))
    return sum(value.numel() * value.element_size() for value in state) / (probe.numel() * probe.element_size())
