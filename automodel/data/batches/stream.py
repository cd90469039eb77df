"""Train on rows as they are read, without preparing the whole set first; resumable at any step.

The stream is read in blocks of ``buffer_rows`` rows. Each block is prepared, shuffled by (seed, epoch, block) and,
where wanted, packed by itself, so that a place in the stream is the place in the file where its block begins and a
number of items within it: to resume there, one block is read again.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.distributed as dist
from torch.utils.data import DataLoader, IterableDataset

from automodel.data.batches.batch import Batch, as_batch
from automodel.data.batches.loader import Collate, longest_first, seeded, shares_of
from automodel.data.batches.packing import PackedRows, pack
from automodel.data.prepare.bad_rows import BadRows, warn_of_skipped
from automodel.data.prepare.prepared import RowCounts
from automodel.data.prepare.unused import report_unused
from automodel.data.rows import BadRow
from automodel.logs import get_logger
from automodel.types import UserError

if TYPE_CHECKING:
    from automodel.data.prepare.options import PrepareOptions
    from automodel.data.prepare.prepare_row import Prepared

log = get_logger(__name__)

Item = dict[str, Any]
State = dict[str, Any]


class Step(NamedTuple):
    """The items of a global batch, their epoch, the place after them, and whether there are no more."""

    items: list[Item]
    epoch: int
    state: State
    is_last: bool = False


START: State = {"epoch": 0, "block": 0, "position": None, "num_rows": 0, "index": 0}
"""Where a stream begins: ``position`` and ``num_rows`` (rows read in this epoch) are those of the block's begin."""


@dataclass(frozen=True)
class Stream:
    """Everything that decides the items of a stream.

    Attributes:
        prepare: the fields of a row -> what it becomes; raises BadRow.
        pack_length: documents are packed into so many tokens; None: every row is an item.
        reported_fields: unused fields that were reported already; later ones are added.
    """

    source: Any
    prepare: Callable[[Any], Prepared]
    options: PrepareOptions
    seed: int
    global_batch_size: int
    num_epochs: int
    drop_last: bool
    pack_length: int | None = None
    reported_fields: set[str] = field(default_factory=set)

    def steps(self, state: State) -> Iterator[Step]:
        """Yield every global batch from ``state`` on.

        Raises:
            UserError: a damaged row where ``on_bad_row`` is ``stop``, or nothing at all to train on.
        """
        previous: Step | None = None
        for step in self._steps(state):
            if previous is not None:
                yield previous
            previous = step
        if previous is None and state == START:
            raise UserError(
                f"{self.source.display_name}: nothing to train on is left within {self.options.length_limit}, or rows "
                "do not fill one global batch"
            )
        if previous is not None:
            end = {**START, "epoch": self.num_epochs}  # whether or not the last batch ends where the rows do
            yield previous._replace(state=end, is_last=True)

    def _steps(self, state: State) -> Iterator[Step]:
        while state["epoch"] < self.num_epochs:
            epoch, batch = state["epoch"], []
            for item, state in self._items(state):  # noqa: B020 - the place moves on with the items
                batch.append(item)
                if len(batch) == self.global_batch_size:
                    yield Step(batch, epoch, state)
                    batch = []
            state = {**START, "epoch": epoch + 1}
            if batch and not self.drop_last:
                yield Step(batch, epoch, state)

    def _items(self, state: State) -> Iterator[tuple[Item, State]]:
        """Yield the items of the rest of an epoch, each with the place after it."""
        stream = self.source.stream(state["position"])
        rows = iter(stream)
        while True:
            examples, num_read = self._read_block(rows, state["num_rows"])
            order = torch.randperm(len(examples), generator=seeded(self.seed, state["epoch"], state["block"])).tolist()
            items = self._packed([examples[index] for index in order], state)
            after = {
                "epoch": state["epoch"],
                "block": state["block"] + 1,
                "position": stream.position,
                "num_rows": state["num_rows"] + num_read,
                "index": 0,
            }
            for index in range(state["index"], len(items)):
                is_last = index == len(items) - 1
                yield items[index], after if is_last else {**state, "index": index + 1}
            if num_read < self.source.buffer_rows:
                return
            state = after

    def _read_block(self, rows: Iterator[Any], num_before: int) -> tuple[list[Item], int]:
        most = self.options.limit - num_before if self.options.limit is not None else math.inf
        examples: list[Item] = []
        num_read = 0
        bad_rows = BadRows(self.options.on_bad_row, RowCounts())
        while num_read < min(self.source.buffer_rows, most):
            row = next(rows, None)
            if row is None:
                break
            num_read += 1
            place, fields = row
            try:
                if isinstance(fields, BadRow):
                    raise fields
                prepared = self.prepare(fields)
            except BadRow as error:
                bad_rows.add(place, error)
                if self.options.on_bad_row == "stop":
                    bad_rows.settle(place)
                continue
            bad_rows.counts.count_unused(name for name in prepared.unused if name not in self.reported_fields)
            if prepared.record is not None:
                examples.append(_example(prepared.record))
        warn_of_skipped(self.source.display_name, bad_rows.counts)
        bad_rows.counts.num_rows_read = num_read
        report_unused(self.source.display_name, bad_rows.counts)
        self.reported_fields.update(bad_rows.counts.unused)
        return examples, num_read

    def _packed(self, examples: list[Item], state: State) -> Any:
        if self.pack_length is None or not examples:
            return examples
        import numpy as np

        packs = pack(np.array([len(example["input_ids"]) for example in examples]), self.pack_length)
        items = PackedRows(examples, packs)
        order = torch.randperm(len(items), generator=seeded(self.seed, state["epoch"], state["block"], "packs"))
        return [items[index] for index in order.tolist()]


class StreamLoader:
    """This rank's micro-batches of every optimizer step, from a stream.

    One rank of each node reads the stream and hands every rank of the node its micro-batches, so that a row is read
    and tokenised once a node, and packs do not depend on the number of ranks. Every rank must iterate.

    Args:
        sort_within_step: as for ``TrainLoader``.
        node_group: the ranks of this node, of which the first reads; None for a single process.
        num_workers: 0 reads in the step's own time, more in one process beside it.
    """

    steps_per_epoch = None

    def __init__(
        self,
        stream: Stream,
        *,
        collate: Collate,
        local_batch_size: int,
        dp_rank: int,
        dp_size: int,
        sort_within_step: bool = False,
        node_group: dist.ProcessGroup | None = None,
        num_workers: int = 0,
        pin_memory: bool = False,
    ) -> None:
        self.stream, self.collate = stream, collate
        self.local_batch_size, self.dp_rank, self.dp_size = local_batch_size, dp_rank, dp_size
        self.num_workers, self.pin_memory = num_workers, pin_memory
        self.sort_within_step = sort_within_step
        self.epoch = 0
        self.is_exhausted = False
        self._state = START
        self._node_group = node_group
        self._is_reader = node_group is None or dist.get_rank(node_group) == 0
        self._dp_ranks = [dp_rank]
        if node_group is not None:
            self._dp_ranks = [0] * dist.get_world_size(node_group)
            dist.all_gather_object(self._dp_ranks, dp_rank, group=node_group)

    def state_dict(self) -> dict[str, Any]:
        return self._state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._state = state
        self.is_exhausted = state["epoch"] >= self.stream.num_epochs

    def __iter__(self) -> Iterator[list[Batch]]:
        steps = self._read() if self._is_reader else iter(())
        while not self.is_exhausted:
            micro_batches, self.epoch, self._state, self.is_exhausted = self._shared(steps)
            batches = [as_batch(self.collate(items)) for items in micro_batches]
            yield [batch.pin_memory() for batch in batches] if self.pin_memory else batches

    def _read(self) -> Iterator[Step]:
        if not self.num_workers:
            return self.stream.steps(self._state)
        generator = seeded(self.stream.seed, "workers")  # without one, the iterator draws from dropout's generator
        return iter(DataLoader(_Steps(self.stream, self._state), batch_size=None, num_workers=1, generator=generator))

    def _shared(self, steps: Iterator[Step]) -> tuple[list[list[Item]], int, State, bool]:
        """Return this rank's micro-batches of the next step and what comes with them, as the node's reader says."""
        received: list[Any] = [None]
        handed: list[Any] | None = None
        if self._is_reader:
            handed = self._hand_out(steps)
        if self._node_group is None:
            received = handed
        else:
            source = dist.get_process_group_ranks(self._node_group)[0]
            dist.scatter_object_list(received, handed, src=source, group=self._node_group)
        if isinstance(received[0], UserError):
            raise received[0]
        return received[0]

    def _hand_out(self, steps: Iterator[Step]) -> list[Any]:
        try:
            items, *rest = next(steps)
        except UserError as error:
            return [error] * len(self._dp_ranks)
        except StopIteration:
            error = UserError(
                f"{self.stream.source.display_name}: the rows end before the point where training resumes, so some "
                "were removed since the checkpoint was saved; restore them, or begin a new run with another output_dir"
            )
            return [error] * len(self._dp_ranks)
        if self.sort_within_step:
            items = longest_first(items, [len(item["input_ids"]) for item in items])
        shares = shares_of(items, self.local_batch_size, dp_size=self.dp_size)
        return [(shares[dp_rank], *rest) for dp_rank in self._dp_ranks]


class _Steps(IterableDataset):
    """The steps of a stream for torch's loader, whose process reads them ahead."""

    def __init__(self, stream: Stream, state: State) -> None:
        self._stream, self._state = stream, state

    def __iter__(self) -> Iterator[Step]:
        return self._stream.steps(self._state)


def _example(record: Item) -> Item:
    names = ("input_ids", "labels", *(["loss_weights"] if record.get("loss_weights") else []))
    return {name: record[name] for name in names}
