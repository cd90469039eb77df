"""Batches in an order that depends on seed, epoch and global batch size alone, never on the number of ranks."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import Any

import torch
from torch.utils.data import DataLoader

from automodel.types import UserError

Batch = dict[str, torch.Tensor]
Collate = Callable[[Sequence[dict[str, Any]]], Batch]


class TrainLoader:
    """This rank's micro-batches of every optimizer step.

    The rows of an epoch are shuffled by (seed, epoch) and cut into global batches. Micro-batch ``m`` of rank
    ``r`` takes rows ``[(m * dp_size + r) * local_batch_size : + local_batch_size]`` of its global batch. A
    short last one has as many micro-batches on every rank; where rows run out, dummies fill up.
    """

    def __init__(
        self,
        rows: Sequence[dict[str, Any]],
        *,
        collate: Collate,
        global_batch_size: int,
        local_batch_size: int,
        dp_rank: int,
        dp_size: int,
        seed: int,
        drop_last: bool = False,
        num_workers: int = 0,
        pin_memory: bool = False,
    ) -> None:
        self.rows, self.collate = rows, collate
        self.global_batch_size, self.local_batch_size = global_batch_size, local_batch_size
        self.dp_rank, self.dp_size = dp_rank, dp_size
        self.seed = seed
        self.num_workers, self.pin_memory = num_workers, pin_memory
        num_whole, rest = divmod(len(rows), global_batch_size)
        self.steps_per_epoch = num_whole + bool(rest and not drop_last)
        if not self.steps_per_epoch:
            raise UserError(
                f"{len(rows)} rows do not fill one batch of step_scheduler.global_batch_size={global_batch_size}, and "
                "dataloader.drop_last=true drops it; lower one or set the other to false"
            )

    def global_batches(self, epoch: int) -> list[list[int]]:
        """Return the row numbers of every step of ``epoch``, the same on every rank."""
        # Of every Python version the same, unlike hash(); 8 bytes are what a generator takes.
        digest = hashlib.sha256(f"{self.seed}/{epoch}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True))
        order = torch.randperm(len(self.rows), generator=generator).tolist()
        size = self.global_batch_size
        return [order[step * size : (step + 1) * size] for step in range(self.steps_per_epoch)]

    def epoch(self, epoch: int, start_step: int = 0) -> Iterator[list[Batch]]:
        """Yield, for each step from ``start_step`` on, this rank's micro-batches; skipped rows are not read."""
        steps = [self._micro_batches(rows) for rows in self.global_batches(epoch)[start_step:]]
        loader = DataLoader(
            _Rows(self.rows),
            batch_sampler=[micro_batch for step in steps for micro_batch in step],
            collate_fn=self.collate,
            num_workers=self.num_workers,
            pin_memory=self.pin_memory,
        )
        batches = iter(loader)
        for step in steps:
            yield list(islice(batches, len(step)))

    def _micro_batches(self, rows: list[int]) -> list[list[int]]:
        local, stride = self.local_batch_size, self.local_batch_size * self.dp_size
        starts = range(0, len(rows), stride)
        return [rows[start + self.dp_rank * local : start + (self.dp_rank + 1) * local] for start in starts]


def validation_batches(
    rows: Sequence[dict[str, Any]], *, collate: Collate, batch_size: int, dp_rank: int, dp_size: int
) -> Iterator[Batch]:
    """Yield this rank's share of ``rows`` in their order, as many batches on every rank; dummies fill up."""
    for start in range(0, len(rows), batch_size * dp_size):
        first = start + dp_rank * batch_size
        yield collate([rows[index] for index in range(first, min(first + batch_size, len(rows)))])


class _Rows:
    """Rows one by one for torch's loader, also for an empty list of them."""

    def __init__(self, rows: Sequence[dict[str, Any]]) -> None:
        self._rows = rows

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self._rows[index]
