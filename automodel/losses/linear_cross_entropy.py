"""Cross entropy with the output layer applied to the supervised positions alone, a chunk of them at a time."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from pydantic import PositiveInt

from automodel.losses.cross_entropy import CrossEntropy

if TYPE_CHECKING:
    import torch
    from torch import nn

    from automodel.losses.cross_entropy import Batch


@dataclass(frozen=True)
class LinearCrossEntropy(CrossEntropy):
    """What ``loss_fn=linear_cross_entropy`` configures: ``cross_entropy`` in less time and memory.

    The hidden states of the supervised positions are gathered before the output layer, and logits exist for one chunk
    of them at a time, forward and backward. A model without an output layer over a vocabulary, such as a classifier,
    gets the plain loss.

    Attributes:
        chunk_size: supervised positions in a chunk; None: as many as keep its logits small.
    """

    chunk_size: PositiveInt | None = None

    def __call__(self, model: nn.Module, batch: Batch) -> torch.Tensor:
        """Return what ``CrossEntropy`` returns."""
        from automodel.losses.output_layer import output_layer

        layer = output_layer(model)
        if layer is None:
            return super().__call__(model, batch)
        return layer.loss_sum(model, batch, self)
