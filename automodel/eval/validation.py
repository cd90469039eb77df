"""Validation over rows split over the data-parallel ranks; the result does not depend on the number of ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import nn

from automodel.data.batches.batch import Batch
from automodel.distributed.parallel.reduce import sum_on_host
from automodel.distributed.runtime.agreement import StopPoll
from automodel.eval.metrics import Metrics
from automodel.losses.cross_entropy import forward_logits
from automodel.losses.objective import Objective
from automodel.screen import progress

_TERM = "term/"


class Batches(Protocol):
    """A sized collection of batches that can be iterated many times."""

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[Batch]: ...


@dataclass(frozen=True)
class Validation:
    """One named validation set and what is measured on it.

    Attributes:
        batches: this rank's; every rank has the same number of them.
        objective: the objective of training; its loss and terms are measured.
        metrics: further metrics, computed from the logits.
    """

    name: str
    batches: Batches
    objective: Objective
    metrics: Metrics | None = None


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
        CutShort: on every rank, if ``poll`` says that one of them was asked to stop.
    """
    was_training = model.training
    model.eval()
    objective, total, count, num_label_tokens = validation.objective, {}, 0, 0
    sums_device = torch.device("cpu") if device.type == "mps" else device  # mps has no double precision
    try:
        for batch in _shown(validation):
            if poll is not None:
                poll.raise_if_agreed()
            with autocast():
                sums = _measure(model, batch, device=device, validation=validation)
            for name, value in sums.items():
                # In double precision, so the order of batches does not show, and on the device: copying a value to
                # the host would wait for the device after every batch.
                value = value.detach().to(sums_device).double()
                total[name] = total[name] + value if name in total else value
            count, num_label_tokens = count + objective.count(batch), num_label_tokens + batch.num_label_tokens
    finally:
        model.train(was_training)
    counts = {"count": count, "num_label_tokens": num_label_tokens}
    total |= {name: torch.tensor(value, dtype=torch.float64) for name, value in counts.items()}
    total = sum_on_host(total, dp_group)
    count = max(1.0, float(total.pop("count")))
    record = {"loss": float(total.pop("loss")) / count, "num_label_tokens": int(total.pop("num_label_tokens"))}
    terms = {name.removeprefix(_TERM): float(total.pop(name)) / count for name in list(total) if name.startswith(_TERM)}
    metrics = {} if validation.metrics is None else validation.metrics.summarize(total)
    return record | {f"metric/{name}": value for name, value in (terms | metrics).items()}


def _measure(
    model: nn.Module, batch: Batch, *, device: torch.device, validation: Validation
) -> dict[str, torch.Tensor]:
    """Return the sums of one batch by name, from the objective and the metrics."""
    metrics = validation.metrics
    batch = batch.to(device)
    with _last_logits(model) as seen:
        result = validation.objective(model, batch)
    sums = {"loss": result.loss} | {f"{_TERM}{name}": value for name, value in result.terms.items()}
    if metrics is None:
        return sums
    # A loss may call the model on something else than the batch, or not at all.
    is_usable = bool(seen) and seen[-1].shape[0] == batch.labels.shape[0]
    return sums | metrics.update(seen[-1] if is_usable else forward_logits(model, batch), batch)


@contextmanager
def _last_logits(model: nn.Module) -> Iterator[list[torch.Tensor]]:
    """Collect the logits that ``model`` computes in the block, so that metrics need no forward of their own."""
    seen: list[torch.Tensor] = []

    def note(_: nn.Module, __: Any, output: Any) -> None:
        if isinstance(getattr(output, "logits", None), torch.Tensor):
            seen[:] = [output.logits]

    hook = model.register_forward_hook(note)
    try:
        yield seen
    finally:
        hook.remove()


def _shown(validation: Validation) -> Iterator[Batch]:
    """Yield the batches and show the progress."""
    with progress(len(validation.batches), description=validation.name) as bar:
        for done, batch in enumerate(validation.batches, start=1):
            yield batch
            bar.update(done)
