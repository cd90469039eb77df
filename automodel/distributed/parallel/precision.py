"""In which types a run holds, trains, computes with and writes weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from automodel.logs import get_logger, warn_for_all

if TYPE_CHECKING:
    import torch
    from torch import nn

    from automodel.config import Config

log = get_logger(__name__)

MixedPrecision = Literal["auto", "bf16", "float32"]
MixedOrPurePrecision = Literal["auto", "bf16", "float32", "pure_bf16"]


@dataclass(frozen=True)
class Precision:
    """What ``model.dtype`` and ``distributed.mixed_precision`` come to on a device.

    Attributes:
        of_strategy: the keys of ``distributed`` that follow from it.
        held: the type in which weights are loaded, and frozen ones stay.
        trained: the type of trained weights, their gradients and their optimizer state.
        computed: the type in which layers compute.
        written: the type of the weights in ``model/``; adapters keep that in which they are trained.
    """

    of_strategy: dict[str, Any]
    held: torch.dtype
    trained: torch.dtype
    computed: torch.dtype
    written: torch.dtype

    def __str__(self) -> str:
        held, trained, computed, written = (
            str(dtype).removeprefix("torch.") for dtype in (self.held, self.trained, self.computed, self.written)
        )
        frozen = f", frozen weights {held}" if self.held is not self.trained else ""
        return f"trained weights {trained}{frozen}, computing {computed}, model/ {written}"


def precision_problems(section: dict[str, Any], cfg: Config) -> Iterator[str]:
    """Yield a line for each way in which ``distributed.mixed_precision`` does not fit the model or its adapters."""
    precision, dtype = section.get("mixed_precision"), cfg.model.get("dtype")
    if precision == "pure_bf16" and cfg.peft is not None:
        yield "distributed.mixed_precision=pure_bf16: adapters are trained in float32; choose bf16 with peft"
    if precision == "pure_bf16" and dtype == "float32":
        yield "distributed.mixed_precision=pure_bf16 trains bf16 weights, not model.dtype=float32: choose bf16"
    if precision == "float32" and dtype == "bfloat16" and cfg.peft is not None:
        yield (
            "distributed.mixed_precision=float32 cannot compute in float32 with the frozen weights of "
            "model.dtype=bfloat16: leave one of them at auto"
        )


def resolve_precision(
    model: Mapping[str, Any], distributed: Mapping[str, Any], *, is_frozen: bool, device: torch.device
) -> Precision:
    """Return the types for the sections ``model`` and ``distributed``.

    Trained weights are float32 for any ``model.dtype``, since at usual learning rates most updates are smaller
    than the distance to the next bf16 number: rounded to bf16 after each step, the weights would stay as they are.

    Args:
        is_frozen: whether the model's own weights are frozen, and adapters trained.
    """
    import torch

    mixed_precision, asked = distributed.get("mixed_precision", "auto"), model.get("dtype", "auto")
    if mixed_precision == "auto" and asked == "bfloat16":
        mixed_precision = "bf16"
    computed = compute_dtype(mixed_precision, device) or torch.float32
    trained = torch.float32
    if mixed_precision == "pure_bf16":
        trained = torch.bfloat16
        warn_for_all(
            log,
            "distributed.mixed_precision=pure_bf16: weights, optimizer state and sums of gradients are rounded to "
            "bf16, and a step that moves a weight by less than 1/256 of its size often leaves it unchanged; "
            "mixed_precision=bf16 keeps float32 weights and computes just as fast",
        )
    wanted = None if asked == "auto" else getattr(torch, asked)
    return Precision(
        {"mixed_precision": mixed_precision} if "mixed_precision" in distributed else {},
        held=wanted or computed if is_frozen else trained,
        trained=trained,
        computed=computed,
        written=wanted or trained,
    )


def compute_dtype(mixed_precision: MixedOrPurePrecision, device: torch.device) -> torch.dtype | None:
    """Return the type to compute in, or None to compute in the type of the weights."""
    import torch

    if mixed_precision in ("bf16", "pure_bf16") or (mixed_precision == "auto" and device.type == "cuda"):
        return torch.bfloat16
    return None


def convert_weights_(model: nn.Module, dtype: torch.dtype, *, only_trained: bool = False) -> None:
    """Convert the weights of ``model`` in place, which may be on the meta device.

    Buffers stay: rotary frequencies in bf16 would put far positions in the wrong place.
    """
    for parameter in model.parameters():
        if parameter.is_floating_point() and (parameter.requires_grad or not only_trained):
            parameter.data = parameter.data.to(dtype)
