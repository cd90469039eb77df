"""Validation metrics besides the loss, computed from the logits of every batch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from automodel.types import IGNORE_INDEX


class Metrics(Protocol):
    """Metrics computed from sums, which are added over batches and ranks before any division."""

    def update(self, logits: torch.Tensor, batch: Any) -> dict[str, torch.Tensor]:
        """Return the sums of one batch, with the same names and shapes for every batch; dummy rows add nothing."""

    def summarize(self, sums: Mapping[str, torch.Tensor]) -> dict[str, float]:
        """Return the metrics by name from the sums over the whole set, float64 on the CPU."""


@dataclass(frozen=True)
class ConfusionMatrix:
    """Accuracy and macro F1 of a classifier, from the counts [label, prediction]."""

    num_labels: int

    def update(self, logits: torch.Tensor, batch: Any) -> dict[str, torch.Tensor]:
        """Count the rows of a batch: logits [B, num_labels], labels [B]."""
        labels = batch.labels
        # Dummy rows go to an extra cell: selecting the others would wait for the device.
        is_real = labels != IGNORE_INDEX
        cells = torch.where(is_real, labels * self.num_labels + logits.argmax(dim=-1), self.num_labels**2)
        counts = torch.zeros(self.num_labels**2 + 1, dtype=torch.int64, device=labels.device)
        counts.index_add_(0, cells, torch.ones_like(cells))
        return {"confusion": counts[:-1].reshape(self.num_labels, self.num_labels)}

    def summarize(self, sums: Mapping[str, torch.Tensor]) -> dict[str, float]:
        """Return accuracy and macro F1.

        Macro F1 is the plain mean over the labels that occur as a truth or a prediction, as scikit-learn's
        ``f1_score(average="macro")`` defines it.
        """
        confusion = sums["confusion"]
        hits, truths, predictions = confusion.diag(), confusion.sum(dim=1), confusion.sum(dim=0)
        occurs = (truths + predictions) > 0
        f1 = 2 * hits[occurs] / (truths + predictions)[occurs]
        return {"accuracy": float(hits.sum() / confusion.sum().clamp(min=1)), "macro_f1": float(f1.mean())}
