"""Estimate the size of a checkpoint before there is an optimizer state to measure."""

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
    """Return the approximate size in bytes of a checkpoint of ``model``: trained weights and their optimizer state.

    The state is left out if the optimizer fails on a small probe weight: a failed estimate must not stop a run.
    """
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    num_bytes = sum(parameter.numel() * parameter.element_size() for parameter in trained)
    try:
        return round(num_bytes * (1 + _states_per_weight(build_optimizer, trained[0].device)))
    except Exception as error:  # the user's code may raise anything
        log.debug("the estimated checkpoint size leaves out the optimizer state: %s", error)
        return num_bytes


def warn_of_little_room(folder: Path, num_bytes: int) -> None:
    """Warn if the disk of ``folder`` has less than ``num_bytes`` free."""
    try:
        free, needed = free_mib(folder), -(-num_bytes // 2**20)
    except OSError:  # the first save will report it
        return
    if free < needed:
        log.warning(
            "a checkpoint takes about %d MiB, but only %d MiB are free on the disk of %s: the first save will fail; "
            "free some space, choose another output_dir, or set checkpoint.enabled=false",
            needed, free, folder,
        )  # fmt: skip


def free_mib(folder: Path) -> int:
    """Return the free MiB on the disk of ``folder``, or of its closest existing parent."""
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    return shutil.disk_usage(existing).free // 2**20


def free_room(folder: Path) -> str:
    """Return the free space as a phrase for a message."""
    try:
        return f"{free_mib(folder)} MiB are free on its disk"
    except OSError as error:
        return f"the free space on its disk is unknown ({error})"


def _states_per_weight(
    build_optimizer: Callable[[list[dict[str, Any]]], torch.optim.Optimizer], device: torch.device
) -> float:
    """Return the size of the optimizer's state after one step, as a multiple of the weights' size.

    The probe is on the weights' device, which may be the only one that the optimizer supports.
    """
    probe = nn.Parameter(torch.zeros(64, 64, device=device))
    probe.grad = torch.zeros_like(probe)
    optimizer = build_optimizer([{"params": [probe]}])
    optimizer.step()
    state = (value for value in optimizer.state[probe].values() if isinstance(value, torch.Tensor))
    return sum(value.numel() * value.element_size() for value in state) / (probe.numel() * probe.element_size())
