"""Batches in an order that depends on seed, epoch and global batch size alone, never on the number of ranks."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, Protocol

import numpy as np
import torch
from torch.utils.data import DataLoader

from automodel.data.batches.batch import Batch, as_batch
from automodel.types import UserError

Collate = Callable[[Sequence[dict[str, Any]]], Batch | Mapping[str, torch.Tensor]]
"""Makes a micro-batch of rows; of no rows, a dummy that supervises nothing."""

_GROUPED_STEPS = 50
"""Steps whose rows are sorted by length together: enough for little padding, few enough to stay shuffled."""


class Loader(Protocol):
    """What the training loop takes its micro-batches from."""

    steps_per_epoch: int | None
    """None where the end of a stream is not known before it comes."""
    epoch: int
    """The epoch of the step yielded last, from 0."""
    is_exhausted: bool
    """Whether the step yielded last is the last of all."""

    def __iter__(self) -> Iterator[list[Batch]]:
        """Yield this rank's micro-batches of every step still to come, as many on every rank."""

    def state_dict(self) -> dict[str, Any]:
        """Return where the steps yielded so far have come to, for JSON; the same on every rank."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from where ``state`` was taken, on any number of ranks."""


class TrainLoader:
    """This rank's micro-batches of every optimizer step, from rows that can be read by number.

    The rows of an epoch are shuffled by (seed, epoch) and cut into global batches. Micro-batch ``m`` of rank
    ``r`` takes rows ``[(m * dp_size + r) * local_batch_size : + local_batch_size]`` of its global batch. A
    short last one has as many micro-batches on every rank; where rows run out, dummies fill up.

    Args:
        rows: map-style; ``lengths`` [N] are their numbers of tokens, which the next three options need.
        sort_within_step: deal the rows of a step to ranks and micro-batches by length, the longest first. The step
            stays the same, because it depends only on its set of rows, but little is padded and ranks wait less.
        length_grouped: put rows of about one length into a step, so that little is padded.
        max_tokens_per_batch: instead of ``local_batch_size`` rows, a micro-batch takes as many of its step's rows,
            sorted by length, as fit into so many tokens, padding included.
        draw: (epoch) -> the numbers of the rows that it takes, ``num_drawn`` of them; None: every row once.
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
        num_epochs: int = 1,
        drop_last: bool = False,
        num_workers: int = 0,
        pin_memory: bool = False,
        lengths: np.ndarray | None = None,
        sort_within_step: bool = False,
        length_grouped: bool = False,
        max_tokens_per_batch: int | None = None,
        draw: Callable[[int], np.ndarray] | None = None,
        num_drawn: int | None = None,
    ) -> None:
        self.rows, self.collate = rows, collate
        self.global_batch_size, self.local_batch_size = global_batch_size, local_batch_size
        self.dp_rank, self.dp_size = dp_rank, dp_size
        self.seed, self.num_epochs = seed, num_epochs
        self.num_workers, self.pin_memory = num_workers, pin_memory
        self.lengths, self.length_grouped, self.max_tokens_per_batch = lengths, length_grouped, max_tokens_per_batch
        self.sort_within_step, self.draw = sort_within_step, draw
        self.num_rows = len(rows) if num_drawn is None else num_drawn
        num_whole, rest = divmod(self.num_rows, global_batch_size)
        self.steps_per_epoch = num_whole + bool(rest and not drop_last)
        self._num_steps = 0
        if not self.steps_per_epoch:
            raise UserError(
                f"{self.num_rows} rows do not fill one batch of step_scheduler.global_batch_size={global_batch_size}, "
                "and dataloader.drop_last=true drops it; lower one or set the other to false"
            )

    @property
    def epoch(self) -> int:
        return max(0, self._num_steps - 1) // self.steps_per_epoch

    @property
    def is_exhausted(self) -> bool:
        return self._num_steps >= self.num_epochs * self.steps_per_epoch

    def __iter__(self) -> Iterator[list[Batch]]:
        while not self.is_exhausted:
            for micro_batches in self.steps_of(*divmod(self._num_steps, self.steps_per_epoch)):
                self._num_steps += 1
                yield micro_batches

    def state_dict(self) -> dict[str, Any]:
        """Return the global position: epochs done, and rows of the next one that are done."""
        epoch, steps = divmod(self._num_steps, self.steps_per_epoch)
        return {"epoch": epoch, "num_rows": min(steps * self.global_batch_size, self.num_rows)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._num_steps = state["epoch"] * self.steps_per_epoch + state["num_rows"] // self.global_batch_size

    def global_batches(self, epoch: int, start_step: int = 0) -> Iterator[list[int]]:
        """Yield the row numbers of every step of ``epoch``, the same on every rank."""
        order, size = self._order(epoch), self.global_batch_size
        for step in range(start_step, self.steps_per_epoch):
            yield order[step * size : (step + 1) * size].tolist()

    def steps_of(self, epoch: int, start_step: int = 0) -> Iterator[list[Batch]]:
        """Yield, for each step from ``start_step`` on, this rank's micro-batches; skipped rows are not read."""
        loader = DataLoader(
            _Rows(self.rows),
            batch_sampler=_Lazily(lambda: self._all_micro_batches(epoch, start_step)),
            collate_fn=self.collate,
            num_workers=self.num_workers,
            pin_memory=self.pin_memory,
            # Every new iterator draws a seed for its workers; dropout's generator must not be what gives it.
            generator=seeded(self.seed, "workers", epoch),
        )
        batches = iter(loader)
        for rows in self.global_batches(epoch, start_step):
            yield [as_batch(batch) for batch in islice(batches, len(self._micro_batches(rows)))]

    def _all_micro_batches(self, epoch: int, start_step: int) -> Iterator[list[int]]:
        for rows in self.global_batches(epoch, start_step):
            yield from self._micro_batches(rows)

    def _order(self, epoch: int) -> np.ndarray:
        generator = seeded(self.seed, epoch)
        order = torch.randperm(self.num_rows, generator=generator).numpy()
        if self.draw is not None:
            order = self.draw(epoch)[order]
        return self._grouped(order, generator) if self.length_grouped else order

    def _grouped(self, order: np.ndarray, generator: torch.Generator) -> np.ndarray:
        """Sort ``order`` by length within groups of steps, then shuffle the whole steps."""
        size = self.global_batch_size
        group = _GROUPED_STEPS * size
        for start in range(0, len(order), group):
            part = order[start : start + group]
            order[start : start + group] = part[np.argsort(self.lengths[part], kind="stable")]
        num_whole = len(order) // size
        shuffled = torch.randperm(num_whole, generator=generator).numpy()
        whole = order[: num_whole * size].reshape(num_whole, size)[shuffled].reshape(-1)
        return np.concatenate([whole, order[num_whole * size :]])

    def _micro_batches(self, rows: list[int]) -> list[list[int]]:
        if self.max_tokens_per_batch is not None:
            everyones = _by_tokens(rows, self.lengths[rows], self.max_tokens_per_batch)
            everyones += [[] for _ in range(-len(everyones) % self.dp_size)]
            return everyones[self.dp_rank :: self.dp_size]
        if self.sort_within_step:
            rows = longest_first(rows, self.lengths[rows])
        return shares_of(rows, self.local_batch_size, dp_size=self.dp_size)[self.dp_rank]


@dataclass(frozen=True)
class EpochRows:
    """Which rows of several sources, standing one after the other, each epoch takes.

    Every source is gone through in one endless run of shuffled passes, so that over the epochs all of its rows come
    equally often, give or take one.
    """

    sizes: Sequence[int]
    counts: Sequence[int]
    seed: int

    def __len__(self) -> int:
        return sum(self.counts)

    def __call__(self, epoch: int) -> np.ndarray:
        """Return the row numbers of ``epoch``, source by source; int64 [len]."""
        starts = np.cumsum([0, *self.sizes[:-1]])
        parts = [
            start + self._of_source(index, size, epoch * count, (epoch + 1) * count)
            for index, (start, size, count) in enumerate(zip(starts, self.sizes, self.counts, strict=True))
        ]
        return np.concatenate(parts)

    def _of_source(self, index: int, size: int, begin: int, end: int) -> np.ndarray:
        passes = range(begin // size, -(-end // size))
        shuffled = [torch.randperm(size, generator=seeded(self.seed, "source", index, each)).numpy() for each in passes]
        first = passes.start * size
        return np.concatenate(shuffled)[begin - first : end - first]


def shares_of(rows: list[Any], local_batch_size: int, *, dp_size: int) -> list[list[list[Any]]]:
    """Return every rank's micro-batches of a global batch, as many for each; where rows run out they are empty."""
    local, starts = local_batch_size, range(0, len(rows), local_batch_size * dp_size)
    return [[rows[start + rank * local : start + (rank + 1) * local] for start in starts] for rank in range(dp_size)]


def longest_first(items: list[Any], lengths: Sequence[int] | np.ndarray) -> list[Any]:
    """Return ``items`` sorted by their ``lengths``; equal ones keep their order."""
    return [items[index] for index in np.argsort(-np.asarray(lengths), kind="stable")]


def _by_tokens(rows: list[int], lengths: np.ndarray, max_tokens: int) -> list[list[int]]:
    """Cut ``rows``, the longest first, into batches of at most ``max_tokens`` with padding; one row always fits."""
    batches: list[list[int]] = []
    longest = 0
    for index in np.argsort(-lengths, kind="stable"):
        if not batches or (len(batches[-1]) + 1) * longest > max_tokens:
            batches.append([])
            longest = int(lengths[index])
        batches[-1].append(rows[index])
    return batches


def seeded(*parts: Any) -> torch.Generator:
    """Return a generator seeded by ``parts``, the same in every process and version of Python."""
    digest = hashlib.sha256("/".join(map(str, parts)).encode()).digest()  # unlike hash()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True))


@dataclass(frozen=True)
class ValidationBatches:
    """This rank's share of ``rows`` in their order, as many batches on every rank; dummies fill up.

    Iterating over it makes the batches; its length is their number.
    """

    rows: Sequence[dict[str, Any]]
    collate: Collate
    batch_size: int
    dp_rank: int
    dp_size: int

    def __len__(self) -> int:
        return -(-len(self.rows) // (self.batch_size * self.dp_size))

    def __iter__(self) -> Iterator[Batch]:
        for start in range(0, len(self.rows), self.batch_size * self.dp_size):
            first = start + self.dp_rank * self.batch_size
            chosen = range(first, min(first + self.batch_size, len(self.rows)))
            yield as_batch(self.collate([self.rows[index] for index in chosen]))


class _Rows:
    """Rows one by one for torch's loader, also for an empty list of them."""

    def __init__(self, rows: Sequence[dict[str, Any]]) -> None:
        self._rows = rows

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self._rows[index]


class _Lazily:
    """A batch sampler made again for each iteration."""

    def __init__(self, make: Callable[[], Iterator[list[int]]]) -> None:
        self._make = make

    def __iter__(self) -> Iterator[list[int]]:
        return self._make()
