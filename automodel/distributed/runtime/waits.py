"""Where the host waits for a collective or the device: in this folder, the watchdog recognises a frame as a wait."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist


def wait_for(work: dist.Work) -> None:
    """Wait until a collective started earlier is done."""
    work.wait()


def wait_for_event(event: Any) -> None:
    """Wait until the device has reached ``event``."""
    event.synchronize()


def to_host(scalar: torch.Tensor) -> float:
    """Return the value of a tensor, waiting for the device that computes it."""
    return scalar.item()
