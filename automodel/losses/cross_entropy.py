"""Cross entropy summed over the supervised positions of a micro-batch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from automodel.types import IGNORE_INDEX

if TYPE_CHECKING:
    import torch
    from torch import nn


NOT_FOR_THE_MODEL = {"labels", "loss_weights", "num_tokens"}


@dataclass(frozen=True)
class CrossEntropy:
    """What ``loss_fn=cross_entropy`` configures."""

    def __call__(self, model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """Run ``model`` forward and return its loss SUM, a float32 scalar; 0 where nothing is supervised.

        ``loss_weights`` weigh the terms of the sum. What the sum is divided by stays the number of supervised
        positions: with weights below 1 the loss shrinks, as the user asked, and is not brought back up.

        Args:
            model: a causal language model or a sequence classifier of transformers, perhaps wrapped.
            batch: what a collator made: the model's inputs, ``labels`` already aligned with the logits ([B, T] for
                a language model, [B] for a classifier; -100 is not supervised), and perhaps ``loss_weights`` of
                the same shape.
        """
        loss_sum, _ = self.with_logits(model, batch)
        return loss_sum

    def with_logits(self, model: nn.Module, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the loss sum and the logits, [B, T, V] or [B, num_labels]."""
        logits = forward_logits(model, batch)
        return cross_entropy_sum(logits, batch["labels"], loss_weights=batch.get("loss_weights")), logits


def forward_logits(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Return the model's logits for ``batch``, without its own loss (which would shift the labels again).

    No cache is made: beside one, transformers does not look for packed documents in ``position_ids``.
    """
    inputs = {name: tensor for name, tensor in batch.items() if name not in NOT_FOR_THE_MODEL}
    if "cu_seq_lens" in inputs:
        # transformers.FlashAttentionKwargs; the kernels take the length as a number of the host.
        borders, longest = inputs.pop("cu_seq_lens"), inputs.pop("max_length").shape[0]
        inputs |= {"cu_seq_lens_q": borders, "cu_seq_lens_k": borders, "max_length_q": longest, "max_length_k": longest}
    return model(**inputs, use_cache=False).logits


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
