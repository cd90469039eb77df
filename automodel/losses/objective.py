"""What training minimises and validation measures: a function from a model and a batch to sums."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from automodel.types import UserError

if TYPE_CHECKING:
    import torch
    from torch import nn


@dataclass(frozen=True)
class Sums:
    """Sums over the examples of one micro-batch. All are divided once per step by the same count over all ranks.

    Attributes:
        loss: scalar with a graph.
        terms: further scalars by name, only logged as ``metric/NAME``: parts of the loss, margins, hits...
            Every micro-batch on every rank must have the same names.
    """

    loss: torch.Tensor
    terms: Mapping[str, torch.Tensor] = field(default_factory=dict)


class Objective(Protocol):
    """What a recipe minimises. ``as_objective`` makes one from any function ``(model, batch) -> loss sum``."""

    def __call__(self, model: nn.Module, batch: Any) -> Sums:
        """Run ``model`` forward on a Batch and return its sums; 0 for a batch without a supervised example."""

    def count(self, batch: Any) -> int:
        """Return the divisor of the sums of ``batch`` (tokens, rows, pairs), without waiting for the device."""


@dataclass(frozen=True)
class _FromFunction:
    """An objective from a loss function, which may return a scalar tensor or Sums."""

    function: Callable[[nn.Module, Any], Any]

    def __call__(self, model: nn.Module, batch: Any) -> Sums:
        result = self.function(model, batch)
        sums = result if isinstance(result, Sums) else Sums(result)
        for name, value in {"loss": sums.loss, **sums.terms}.items():
            if getattr(value, "shape", None) is None or value.numel() != 1:
                shape = list(value.shape) if hasattr(value, "shape") else type(value).__name__
                raise UserError(
                    f"loss_fn: {name} must be a scalar tensor, the SUM over the supervised examples of the batch, "
                    f"not {shape}"
                )
        return sums

    def count(self, batch: Any) -> int:
        own = getattr(self.function, "count", None)
        return batch.num_label_tokens if own is None else own(batch)


def as_objective(function: Callable[[nn.Module, Any], Any]) -> Objective:
    """Return ``function`` as an Objective.

    Args:
        function: (model, batch) -> Sums, or the loss sum as a scalar tensor; perhaps with a method ``count(batch)``.
            Without one, sums are divided by the number of supervised tokens.
    """
    return function if isinstance(function, _FromFunction) else _FromFunction(function)
