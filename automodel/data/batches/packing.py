"""Put several documents into one row, so that little of a batch is padding."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from automodel.data.batches.collate import Example, join_examples
from automodel.types import IGNORE_INDEX


@dataclass(frozen=True)
class Packs(Sequence):
    """Which documents share a row; two flat arrays, so that millions of documents stay small.

    Attributes:
        order: the numbers of all documents, pack after pack, int64 [num_documents].
        offsets: pack ``i`` is ``order[offsets[i]:offsets[i + 1]]``, int64 [num_packs + 1].
        max_length: the slots of a pack, in tokens.
        num_tokens: of all documents together.
    """

    order: np.ndarray
    offsets: np.ndarray
    max_length: int
    num_tokens: int

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, index: int) -> np.ndarray:
        index = range(len(self))[index]
        return self.order[self.offsets[index] : self.offsets[index + 1]]

    @property
    def efficiency(self) -> float:
        """The share of slots that hold a token, if every pack were padded to ``max_length``."""
        return self.num_tokens / max(1, len(self) * self.max_length)


def pack(lengths: np.ndarray, max_length: int) -> Packs:
    """Share documents out to packs by best fit decreasing.

    The longest document comes first (of equal ones, that of the lower number), and goes into the open pack with
    the least room that still takes it. This needs at most 11/9 of the fewest possible packs, and four (Johnson,
    Demers, Ullman, Garey, Graham: Worst-Case Performance Bounds for Simple One-Dimensional Packing Algorithms,
    SIAM J. Comput. 3, 1974). The result depends on the arguments alone.

    Args:
        lengths: tokens of every document, integers [num_documents].
        max_length: the most tokens of a pack.

    Raises:
        ValueError: a document is longer than ``max_length``, or empty.
    """
    lengths = np.asarray(lengths, dtype=np.int64)
    wrong = np.flatnonzero((lengths > max_length) | (lengths < 1))
    if len(wrong):
        raise ValueError(
            f"document {wrong[0]} has {lengths[wrong[0]]} tokens; a pack takes documents of 1 to {max_length} "
            f"({len(wrong)} of {len(lengths)} documents do not fit)"
        )
    longest_first = np.argsort(-lengths, kind="stable")
    pack_numbers = _best_fit(lengths[longest_first], max_length)
    sizes = np.bincount(pack_numbers)
    return Packs(
        order=longest_first[np.argsort(pack_numbers, kind="stable")],
        offsets=np.concatenate([np.zeros(1, np.int64), np.cumsum(sizes, dtype=np.int64)]),
        max_length=max_length,
        num_tokens=int(lengths.sum()),
    )


def _best_fit(descending: np.ndarray, max_length: int) -> np.ndarray:
    """Return the pack of each document, whose lengths descend.

    Documents of one length go together. The tightest pack stays the tightest for the next one as long as that
    fits, so it is filled up with them at once, and so are all packs of the same room.
    """
    pack_numbers = np.empty(len(descending), dtype=np.int64)
    packs_by_room: dict[int, list[int]] = {}
    occupied = 0  # bit r is set where a pack has room r; the lowest set bit is found by arithmetic
    num_packs = 0
    starts = np.flatnonzero(np.diff(descending, prepend=0))
    stops = [*starts.tolist(), len(descending)][1:]
    for start, stop, length in zip(starts.tolist(), stops, descending[starts].tolist(), strict=True):
        while start < stop:
            fitting = occupied >> length
            room = length + (fitting & -fitting).bit_length() - 1 if fitting else max_length
            num_each = room // length
            num_needed = -(-(stop - start) // num_each)
            if fitting:
                open_packs = packs_by_room[room]
                chosen = open_packs[-num_needed:]
                del open_packs[-num_needed:]
                if not open_packs:
                    occupied ^= 1 << room
            else:
                chosen = list(range(num_packs, num_packs + num_needed))
                num_packs += num_needed
            placed = min(stop - start, num_each * len(chosen))
            if len(chosen) == 1:
                pack_numbers[start : start + placed] = chosen[0]
            else:
                pack_numbers[start : start + placed] = np.repeat(chosen, num_each)[:placed]
            in_last = placed - num_each * (len(chosen) - 1)
            for packs, room_left in ((chosen[:-1], room - num_each * length), (chosen[-1:], room - in_last * length)):
                if packs and room_left:
                    packs_by_room.setdefault(room_left, []).extend(packs)
                    occupied |= 1 << room_left
            start += placed
    return pack_numbers


class PackedRows(Sequence):
    """The packs of ``examples`` as map-style rows; a pack is put together when it is asked for.

    A row has ``input_ids``, ``labels``, ``position_ids`` (from 0 on in every document, which is how attention
    tells them apart) and, where one of its documents has them, ``loss_weights`` (1.0 for the others). Every
    document's last label is -100, so that nothing is predicted across a border.
    """

    def __init__(self, examples: Sequence[Example], packs: Packs) -> None:
        self.examples, self.packs = examples, packs

    def __len__(self) -> int:
        return len(self.packs)

    def __getitem__(self, index: int) -> Example:
        documents = [self.examples[i] for i in self.packs[index].tolist()]
        for document in documents:
            assert document["labels"][-1] == IGNORE_INDEX, "labels are shifted, the last one predicts nothing"
        return join_examples([document | {"position_ids": range(len(document["input_ids"]))} for document in documents])
