"""Cross entropy summed over the supervised positions of a micro-batch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from automodel.types import IGNORE_INDEX

if TYPE_CHECKING:
    import torch
    from torch import nn


@dataclass(frozen=True)
class CrossEntropy:
    """What ``loss_fn=cross_entropy`` configures."""

    def __call__(self, model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """Run ``model`` forward and return its loss SUM, a float32 scalar; 0 where nothing is supervised.

        Args:
            model: a causal language model or a sequence classifier of transformers, perhaps wrapped.
            batch: ``input_ids`` and ``attention_mask`` [B, T], and ``labels`` already aligned with the logits:
                [B, T] for a language model, [B] for a classifier; -100 is not supervised.
        """
        loss_sum, _ = self.with_logits(model, batch)
        return loss_sum

    def with_logits(self, model: nn.Module, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the loss sum and the logits, [B, T, V] or [B, num_labels]."""
        logits = forward_logits(model, batch)
        return cross_entropy_sum(logits, batch["labels"]), logits


def forward_logits(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Return the model's logits for ``batch``, without its own loss (which would shift the labels again)."""
    inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
    return model(**inputs, use_cache=False).logits


def cross_entropy_sum(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Return the summed cross entropy in float32; ``labels`` has the shape of ``logits`` without its last dim."""
    from torch.nn import functional as F

    flat_logits = logits.reshape(-1, logits.shape[-1]).float()
    return F.cross_entropy(flat_logits, labels.reshape(-1), ignore_index=IGNORE_INDEX, reduction="sum")
