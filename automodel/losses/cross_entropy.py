"""Cross entropy summed over the supervised positions of a micro-batch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from automodel.types import IGNORE_INDEX

if TYPE_CHECKING:
    from typing import Any

    import torch
    from torch import nn

    Batch = Any  # that of data/batches, which this room does not import


@dataclass(frozen=True)
class CrossEntropy:
    """What ``loss_fn=cross_entropy`` configures."""

    def __call__(self, model: nn.Module, batch: Batch) -> torch.Tensor:
        """Run ``model`` forward and return its loss SUM, a float32 scalar; 0 where nothing is supervised.

        ``loss_weights`` multiply the terms of the sum. The sum is still divided by the number of supervised
        positions: with weights below 1 the loss shrinks, as the user asked.

        Args:
            model: a causal language model or a sequence classifier of transformers, perhaps wrapped.
        """
        return cross_entropy_sum(forward_logits(model, batch), batch.labels, loss_weights=batch.loss_weights)


def forward_logits(model: nn.Module, batch: Batch) -> torch.Tensor:
    """Return the model's logits for ``batch``, without its own loss (which would shift the labels again).

    Without a cache, because with one transformers ignores packed documents in ``position_ids``.
    """
    return model(**batch.inputs, use_cache=False).logits


def cross_entropy_sum(
    logits: torch.Tensor, labels: torch.Tensor, *, loss_weights: torch.Tensor | None = None
) -> torch.Tensor:
    """Return the summed cross entropy in float32, each term times its weight where weights are given.

    ``labels`` and ``loss_weights`` have the shape of ``logits`` without its last dim.
    """
    from torch.nn import functional as F

    flat_logits = logits.reshape(-1, logits.shape[-1]).float()
    if loss_weights is None:
        return F.cross_entropy(flat_logits, labels.reshape(-1), ignore_index=IGNORE_INDEX, reduction="sum")
    terms = F.cross_entropy(flat_logits, labels.reshape(-1), ignore_index=IGNORE_INDEX, reduction="none")
    return (terms * loss_weights.reshape(-1)).sum()
