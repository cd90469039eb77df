"""The computing precision that ``distributed.mixed_precision`` names."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    import torch

MixedPrecision = Literal["auto", "bf16", "float32"]


def compute_dtype(mixed_precision: MixedPrecision, device: torch.device) -> torch.dtype | None:
    """Return the type to compute in, or None to compute in the type of the weights."""
    import torch

    if mixed_precision == "bf16" or (mixed_precision == "auto" and device.type == "cuda"):
        return torch.bfloat16
    return None
