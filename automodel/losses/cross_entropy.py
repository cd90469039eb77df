"""Cross entropy summed over the supervised positions of a micro-batch, from all of its logits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

from pydantic import Field, NonNegativeFloat

from automodel.types import IGNORE_INDEX

if TYPE_CHECKING:
    from typing import Any

    import torch
    from torch import nn

    Batch = Any  # that of data/batches, which this room does not import


@dataclass(frozen=True)
class CrossEntropy:
    """What ``loss_fn=cross_entropy`` configures.

    Attributes:
        label_smoothing: the target is 1 - label_smoothing for the label and the rest is spread evenly over all classes
            (Szegedy et al. 2016).
        z_loss: adds z_loss times the squared logarithm of the softmax's denominator, which keeps logits from drifting
            (Chowdhery et al. 2022).
    """

    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0
    z_loss: NonNegativeFloat = 0.0

    def __call__(self, model: nn.Module, batch: Batch) -> torch.Tensor:
        """Run ``model`` forward and return its loss SUM, a float32 scalar; 0 where nothing is supervised.

        ``loss_weights`` multiply the terms of the sum. The sum is still divided by the number of supervised
        positions: with weights below 1 the loss shrinks, as the user asked.

        Args:
            model: a causal language model or a sequence classifier of transformers, perhaps wrapped.
        """
        return self.sum_of(forward_logits(model, batch), batch.labels, batch.loss_weights)

    def sum_of(self, logits: torch.Tensor, labels: torch.Tensor, loss_weights: torch.Tensor | None) -> torch.Tensor:
        """Return the loss sum for ``logits``; the other shapes are those of ``logits`` without its last dim."""
        loss_sum = cross_entropy_sum(
            logits, labels, loss_weights=loss_weights, label_smoothing=self.label_smoothing
        )  # fmt: skip
        if self.z_loss:
            weights = (labels != IGNORE_INDEX) if loss_weights is None else loss_weights * (labels != IGNORE_INDEX)
            loss_sum = loss_sum + self.z_loss * (logits.float().logsumexp(dim=-1).square() * weights).sum()
        return loss_sum


def forward_logits(model: nn.Module, batch: Batch) -> torch.Tensor:
    """Return the model's logits for ``batch``, without its own loss (which would shift the labels again).

    Without a cache, because with one transformers ignores packed documents in ``position_ids``.
    """
    return model(**batch.inputs, use_cache=False).logits


def cross_entropy_sum(
    logits: torch.Tensor,
    labels: torch.Tensor,
    *,
    loss_weights: torch.Tensor | None = None,
    label_smoothing: float = 0.0,
) -> torch.Tensor:
    """Return the summed cross entropy in float32, each term times its weight where weights are given.

    ``labels`` and ``loss_weights`` have the shape of ``logits`` without its last dim.
    """
    from torch.nn import functional as F

    flat_logits, flat_labels = logits.reshape(-1, logits.shape[-1]).float(), labels.reshape(-1)
    options = {"ignore_index": IGNORE_INDEX, "label_smoothing": label_smoothing}
    if loss_weights is None:
        return F.cross_entropy(flat_logits, flat_labels, reduction="sum", **options)
    terms = F.cross_entropy(flat_logits, flat_labels, reduction="none", **options)
    return (terms * loss_weights.reshape(-1)).sum()
