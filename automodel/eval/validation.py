"""Validation over rows shared out to the data-parallel ranks, with a result that does not depend on their number."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.distributed as dist
from torch import nn

from automodel.distributed.parallel.reduce import sum_on_host
from automodel.distributed.runtime.agreement import StopPoll
from automodel.losses.cross_entropy import CrossEntropy
from automodel.screen import progress
from automodel.types import IGNORE_INDEX

Batch = dict[str, torch.Tensor]
Sums = dict[str, torch.Tensor]


class Batches(Protocol):
    """Batches that can be gone through many times, and whose number is known."""

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[Batch]: ...


@dataclass(frozen=True)
class Validation:
    """One named validation set and what is measured on it.

    Attributes:
        batches: this rank's; every rank has as many of them.
        measure: (model, batch) -> sums over the batch's supervised positions, of the same names and shapes on
            every rank; ``loss_sum`` and ``num_label_tokens`` among them.
        summarize: all sums over every rank (float64, on the CPU) -> metrics by name.
    """

    name: str
    batches: Batches
    measure: Callable[[nn.Module, Batch], Sums]
    summarize: Callable[[Sums], dict[str, float]] = lambda sums: {}


@torch.no_grad()
def validate(
    model: nn.Module,
    validation: Validation,
    *,
    device: torch.device,
    dp_group: dist.ProcessGroup,
    autocast: Callable[[], AbstractContextManager],
    poll: StopPoll | None = None,
) -> dict[str, float | int]:
    """Return ``loss``, ``num_label_tokens`` and ``metric/NAME`` over the whole set; every rank must call it.

    Raises:
        CutShort: on every rank, where ``poll`` says that one of them was asked to stop.
    """
    was_training = model.training
    model.eval()
    total: Sums = {}
    sums_device = torch.device("cpu") if device.type == "mps" else device  # mps has no double precision
    try:
        for batch in _shown(validation):
            if poll is not None:
                poll.raise_if_agreed()
            batch = {name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()}
            with autocast():
                sums = validation.measure(model, batch)
            for name, value in sums.items():
                # In double precision, since the order of the batches must not show, and where they are: a value for
                # the host would wait for the device after every batch.
                value = value.detach().to(sums_device).double()
                total[name] = total[name] + value if name in total else value
    finally:
        model.train(was_training)
    total = sum_on_host(total, dp_group)
    num_label_tokens = int(total["num_label_tokens"])
    loss = float(total["loss_sum"]) / max(1, num_label_tokens)
    metrics = {f"metric/{name}": value for name, value in validation.summarize(total).items()}
    return {"loss": loss, "num_label_tokens": num_label_tokens, **metrics}


def _shown(validation: Validation) -> Iterator[Batch]:
    """Yield the batches, and show how far they are."""
    with progress(len(validation.batches), description=validation.name) as bar:
        for done, batch in enumerate(validation.batches, start=1):
            yield batch
            bar.update(done)


def measure_loss(loss_fn: CrossEntropy) -> Callable[[nn.Module, Batch], Sums]:
    """Return the measure of a language model's validation: its loss alone."""

    def measure(model: nn.Module, batch: Batch) -> Sums:
        return {"loss_sum": loss_fn(model, batch), "num_label_tokens": (batch["labels"] != IGNORE_INDEX).sum()}

    return measure


def measure_classification(loss_fn: CrossEntropy, num_labels: int) -> Callable[[nn.Module, Batch], Sums]:
    """Return the measure of a classifier's validation: its loss and the confusion matrix [label, prediction]."""

    def measure(model: nn.Module, batch: Batch) -> Sums:
        loss_sum, logits = loss_fn.with_logits(model, batch)
        labels = batch["labels"]
        is_real = labels != IGNORE_INDEX
        # Rows that do not count go to a cell of their own: picking the others would wait for the device.
        cells = torch.where(is_real, labels * num_labels + logits.argmax(dim=-1), num_labels**2)
        counts = torch.zeros(num_labels**2 + 1, dtype=torch.int64, device=labels.device)
        counts.index_add_(0, cells, torch.ones_like(cells))
        confusion = counts[:-1].reshape(num_labels, num_labels)
        return {"loss_sum": loss_sum, "num_label_tokens": is_real.sum(), "confusion": confusion}

    return measure


def summarize_classification(sums: Sums) -> dict[str, float]:
    """Return accuracy and macro F1 from the confusion matrix.

    Macro F1 is the plain mean over the labels that occur as a truth or a prediction, as scikit-learn's
    ``f1_score(average="macro")`` defines it.
    """
    confusion = sums["confusion"]
    hits, truths, predictions = confusion.diag(), confusion.sum(dim=1), confusion.sum(dim=0)
    occurs = (truths + predictions) > 0
    f1 = 2 * hits[occurs] / (truths + predictions)[occurs]
    return {"accuracy": float(hits.sum() / confusion.sum().clamp(min=1)), "macro_f1": float(f1.mean())}
