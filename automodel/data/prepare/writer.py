"""Write the prepared rows of a source into a folder, with several processes where that is worth it."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import multiprocessing
from array import array
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import closing
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from automodel.data.chat.stops import Stops
from automodel.data.prepare.bad_rows import BadRows
from automodel.data.prepare.cache import canonical
from automodel.data.prepare.options import PrepareOptions
from automodel.data.prepare.prepare_row import Prepared
from automodel.data.prepare.prepared import RowCounts
from automodel.data.rows import BadRow, ReadRow
from automodel.screen import progress

if TYPE_CHECKING:
    from automodel.data.sources import Source

_CHUNK = 256
"""Rows that a process prepares at a time."""
_CHUNKS_AHEAD = 4
"""Chunks for each process that are read before their results are taken: rows in memory do not grow with the input."""
_WORTH_PROCESSES = 64 * 2**20
"""Bytes of input from which several processes are quicker than the start of them is slow."""


class RowWriter:
    """Writes the prepared rows of a source into a folder.

    Args:
        samples: the types of sample that are wanted, for a source that can give several.
        columns: of a prepared row, each with its kind: ``ids``, ``weights``, ``text``, ``int`` or ``float``.
    """

    def __init__(
        self,
        source: Source,
        options: PrepareOptions,
        folder: Path,
        *,
        samples: Collection[type],
        columns: Mapping[str, str],
    ) -> None:
        self.source, self.options, self.folder, self.samples, self.columns = source, options, folder, samples, columns
        self.counts = RowCounts()
        self.bad_rows = BadRows(options.on_bad_row, self.counts)
        self.stops = Stops()
        self.hash = hashlib.sha256(canonical(options.deciding_tokens()))

    def write(self, preparer: Callable[[Mapping[str, Any]], Prepared] | None) -> None:
        """Prepare and write every row.

        Args:
            preparer: None where every row is damaged.

        Raises:
            UserError: rows are damaged, and ``on_bad_row`` is ``stop``.
        """
        from datasets.arrow_writer import ArrowWriter

        stats = {"lengths": array("i"), "num_supervised": array("i"), "has_end": array("b"), "hashes": array("q")}
        has_weights = False
        with (
            closing(ArrowWriter(path=str(self.folder / "rows.arrow"), features=self._features())) as writer,
            progress(self.options.limit, description=f"preparing {self.source.display_name}") as bar,
        ):
            for num_rows, (place, prepared) in enumerate(self._prepared(preparer), start=1):
                record = self._counted(place, prepared)
                if record is None:
                    continue
                has_weights |= bool(record.get("loss_weights"))
                stats["lengths"].append(len(record["input_ids"]))
                for key, column in (("num_supervised",) * 2, ("has_end",) * 2, ("hashes", "hash")):
                    stats[key].append(record[column])
                writer.write({name: record[name] for name in self.columns})
                bar.update(num_rows, "")
            writer.finalize()
        self.bad_rows.settle(self.source.display_name)
        self._write_stats(stats)
        meta = {
            "fingerprint": self.hash.hexdigest()[:16],
            "has_weights": has_weights,
            "stops": {"ids": sorted(self.stops.ids), "texts": sorted(self.stops.texts)},
            "counts": dataclasses.asdict(self.counts),
        }
        (self.folder / "meta.json").write_text(json.dumps(meta))

    def _prepared(self, preparer: Any) -> Iterator[tuple[str, Prepared | BadRow]]:
        rows = islice(self.source.rows(samples=self.samples), self.options.limit)
        num_proc = self._num_proc()
        if num_proc == 1:
            for row in self._hashed(rows):
                yield _prepare_row(preparer, row)
            return
        # Started afresh: a fork would copy the threads' locks of whoever has a process group.
        context = multiprocessing.get_context("spawn")
        with context.Pool(num_proc, initializer=_start_worker, initargs=(preparer,)) as pool:
            pending: deque[Any] = deque()
            for chunk in _chunks(self._hashed(rows), _CHUNK):
                pending.append(pool.apply_async(_prepare_chunk, (chunk,)))
                if len(pending) >= num_proc * _CHUNKS_AHEAD:
                    yield from pending.popleft().get()
            while pending:
                yield from pending.popleft().get()

    def _num_proc(self) -> int:
        if self.options.num_proc is not None:
            return self.options.num_proc
        if self.options.limit is not None or (self.source.num_bytes() or 0) < _WORTH_PROCESSES:
            return 1
        return min(multiprocessing.cpu_count(), 16)

    def _hashed(self, rows: Iterable[ReadRow]) -> Iterator[ReadRow]:
        for place, fields in rows:
            if not isinstance(fields, BadRow):
                self.hash.update(canonical(fields))
            yield place, fields

    def _counted(self, place: str, prepared: Prepared | BadRow) -> dict[str, Any] | None:
        self.counts.num_rows_read += 1
        if isinstance(prepared, BadRow):
            self.bad_rows.add(place, prepared)
            return None
        self.counts.count_unused(prepared.unused)
        if prepared.record is None:
            self.counts.num_dropped += 1
            self.counts.num_unsupervised += not prepared.is_too_long
            return None
        self.stops = Stops.union([self.stops, prepared.stops])
        for note in prepared.notes:
            self.counts.notes[note] = self.counts.notes.get(note, 0) + 1
        self.counts.num_truncated += prepared.is_truncated
        self.counts.num_label_tokens += prepared.record["num_supervised"]
        self.counts.largest_id = max(self.counts.largest_id, max(prepared.record["input_ids"], default=-1))
        return prepared.record

    def _write_stats(self, stats: Mapping[str, array]) -> None:
        import numpy as np

        dtypes = {"lengths": np.int32, "num_supervised": np.int32, "has_end": np.bool_, "hashes": np.int64}
        np.savez(self.folder / "stats.npz", **{name: np.array(stats[name], dtype=dtypes[name]) for name in dtypes})

    def _features(self) -> Any:
        from datasets import Features, List, Value

        kinds = {"ids": List(Value("int32")), "weights": List(Value("float32")), "text": Value("string"),
                 "int": Value("int64"), "float": Value("float32")}  # fmt: skip
        return Features({name: kinds[kind] for name, kind in self.columns.items()})


_worker_preparer: Any = None


def _start_worker(preparer: Any) -> None:
    global _worker_preparer
    _worker_preparer = preparer


def _prepare_chunk(rows: list[ReadRow]) -> list[tuple[str, Prepared | BadRow]]:
    return [_prepare_row(_worker_preparer, row) for row in rows]


def _prepare_row(preparer: Any, row: ReadRow) -> tuple[str, Prepared | BadRow]:
    place, fields = row
    if isinstance(fields, BadRow):
        return place, fields
    try:
        return place, preparer(fields)
    except BadRow as error:
        return place, error


def _chunks(rows: Iterable[ReadRow], size: int) -> Iterator[list[ReadRow]]:
    rows = iter(rows)
    while chunk := list(islice(rows, size)):
        yield chunk
