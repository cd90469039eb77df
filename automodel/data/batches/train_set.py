"""What an epoch draws from: the rows of one or several sources, one by one or packed."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from automodel.data.batches.loader import EpochRows
from automodel.data.batches.mixture import MixtureDataset
from automodel.data.batches.packing import PackedRows, Packs, pack
from automodel.data.prepare.cache import build_once, hash_of
from automodel.data.prepare.prepared import PreparedRows


@dataclass(frozen=True)
class SourceShare:
    """What one source gives to an epoch.

    Attributes:
        num_items: the rows, or packs, that there are; ``num_drawn`` of them an epoch takes.
        num_tokens: in those that an epoch takes, on average.
        efficiency: the share of a pack's slots that hold a token; None without packing.
    """

    name: str
    num_rows: int
    num_items: int
    num_drawn: int
    num_tokens: float
    efficiency: float | None


@dataclass(frozen=True)
class TrainSet:
    """The items that training draws from, map-style, with their lengths in tokens [N].

    Attributes:
        draw: (epoch) -> numbers of the items that it takes, ``num_drawn`` of them; None: each once.
        fingerprint: of the rows, the packing and the shares.
    """

    items: Sequence[Any]
    lengths: np.ndarray
    draw: Callable[[int], np.ndarray] | None
    num_drawn: int
    fingerprint: str
    shares: list[SourceShare]


def build_train_set(
    sources: Mapping[str, PreparedRows], *, pack_length: int | None, mixture: MixtureDataset | None, seed: int
) -> TrainSet:
    """Return what an epoch draws from; every source is packed by itself.

    Args:
        pack_length: the tokens of a pack; None: every row is an item.
        mixture: how much of each source an epoch takes; None where there is one, which it takes whole.
    """
    parts: list[Sequence[Any]] = []
    lengths: list[np.ndarray] = []
    efficiencies: list[float | None] = []
    for rows in sources.values():
        if pack_length is None:
            parts.append(rows.examples)
            lengths.append(rows.stats.lengths)
            efficiencies.append(None)
            continue
        packs = _packs(rows, pack_length)
        parts.append(PackedRows(rows.examples, packs))
        lengths.append(np.add.reduceat(rows.stats.lengths[packs.order], packs.offsets[:-1]))
        efficiencies.append(packs.efficiency)
    sizes = {name: len(part) for name, part in zip(sources, parts, strict=True)}
    counts = sizes if mixture is None else mixture.num_drawn(sizes)
    is_whole = counts == sizes
    draw = None if is_whole else EpochRows(list(sizes.values()), list(counts.values()), seed)
    shares = [
        SourceShare(
            name=name,
            num_rows=len(rows.examples),
            num_items=sizes[name],
            num_drawn=counts[name],
            num_tokens=counts[name] * float(part.mean()),
            efficiency=efficiency,
        )
        for (name, rows), part, efficiency in zip(sources.items(), lengths, efficiencies, strict=True)
    ]
    prints = [rows.fingerprint for rows in sources.values()]
    facts = {"rows": prints, "pack_length": pack_length, "counts": None if is_whole else counts}
    return TrainSet(
        items=parts[0] if len(parts) == 1 else _Joined(parts),
        lengths=np.concatenate(lengths),
        draw=draw,
        num_drawn=sum(counts.values()),
        fingerprint=prints[0] if len(parts) == 1 and pack_length is None and is_whole else hash_of(facts)[:16],
        shares=shares,
    )


def _packs(rows: PreparedRows, pack_length: int) -> Packs:
    lengths = rows.stats.lengths

    def build(folder: Any) -> None:
        packs = pack(lengths, pack_length)
        np.save(folder / "order.npy", packs.order)
        np.save(folder / "offsets.npy", packs.offsets)

    of = hashlib.sha256(lengths.tobytes()).hexdigest()
    folder = build_once({"packs of lengths": of, "pack_length": pack_length, "packed as": 1}, build)
    order, offsets = (np.load(folder / f"{name}.npy", mmap_mode="r") for name in ("order", "offsets"))
    return Packs(order, offsets, pack_length, int(lengths.sum()))


class _Joined(Sequence):
    """Several map-style sets, one after the other."""

    def __init__(self, parts: Sequence[Sequence[Any]]) -> None:
        self._parts = parts
        self._ends = np.cumsum([len(part) for part in parts])

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, index: int) -> Any:
        part = int(np.searchsorted(self._ends, index, side="right"))
        start = int(self._ends[part - 1]) if part else 0
        return self._parts[part][index - start]
