"""Places where the host waits, for a collective or for the device, in a folder where the watchdog looks for them."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist


def wait_for(work: dist.Work) -> None:
    """Wait until a collective started earlier is done; here, so that a watchdog sees that it is a wait."""
    work.wait()


def wait_for_event(event: Any) -> None:
    """Wait until the device has come to ``event``."""
    event.synchronize()


def to_host(scalar: torch.Tensor) -> float:
    """Return the value of a tensor, waiting for the device that computes it."""
    return scalar.item()
