"""Set a random part of a source's rows aside for validation."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from array import array
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from typing import Any

from automodel.data.prepare.options import PrepareOptions
from automodel.data.rows import BadRow, ReadRow
from automodel.types import UserError


@dataclass(frozen=True)
class _ValidationShare:
    """Which rows of a source are validated on: those with the smallest hashes of their content and a seed.

    Equal rows are on the same side, also after their file is reordered.
    """

    source: Any
    share: float
    seed: int

    def rows(self, *, samples: Collection[type] = ()) -> Iterator[ReadRow]:
        limit = self.source.options(None).limit
        return islice(self.source.rows(samples=samples), limit)

    def holds(self, fields: Any) -> bool:
        return not isinstance(fields, BadRow) and self._hash(fields) <= self._largest

    @cached_property
    def _largest(self) -> int:
        rows = self.rows()
        hashes = array("Q", (self._hash(fields) for _, fields in rows if not isinstance(fields, BadRow)))
        num_chosen = max(1, round(self.share * len(hashes)))
        if len(hashes) <= num_chosen:
            raise UserError(
                f"dataset.validation_share={self.share:g} of {len(hashes)} rows leaves none to train on"
                f" ({self.source.display_name})"
            )
        return sorted(hashes)[num_chosen - 1]

    def _hash(self, fields: dict[str, Any]) -> int:
        content = json.dumps([self.seed, fields], sort_keys=True, default=str).encode()
        return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little")


@dataclass(frozen=True)
class PartOfSource:
    """The rows of a source that are trained on, or those that are set aside; a source itself."""

    division: _ValidationShare
    is_validation: bool

    streaming = False

    @property
    def display_name(self) -> str:
        name = self.division.source.display_name
        return f"{name} (validation share)" if self.is_validation else name

    def rows(self, *, samples: Collection[type] = ()) -> Iterator[ReadRow]:
        for row in self.division.rows(samples=samples):
            if self.division.holds(row[1]) == self.is_validation:
                yield row

    def identity(self) -> Any:
        part = self.division
        return [part.source.identity(), part.source.options(None).limit, part.share, part.seed, self.is_validation]

    def num_bytes(self) -> int | None:
        return self.division.source.num_bytes()

    def options(self, model_max_length: int | None) -> PrepareOptions:
        return dataclasses.replace(self.division.source.options(model_max_length), limit=None)


def split_off(source: Any, share: float | None, *, seed: int) -> tuple[Any, PartOfSource | None]:
    """Return what of ``source`` is trained on and what is validated on: all of it and nothing without a share.

    The parts depend on the rows, the share and the seed, and on nothing else, so every rank and layout has the same.
    """
    if share is None:
        return source, None
    division = _ValidationShare(source, share, seed)
    return PartOfSource(division, is_validation=False), PartOfSource(division, is_validation=True)
