"""Several sources in one training set, each with the share that was asked for."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from automodel.config.names import did_you_mean
from automodel.data.sources import DemoDataset, FileDataset, HFDataset
from automodel.types import UserError

_OWN_KEYS = ("kind", "weight", "epochs")
_KINDS = {"file": FileDataset, "jsonl": FileDataset, "hf": HFDataset, "demo": DemoDataset}


@dataclass(frozen=True)
class MixtureDataset:
    """Rows of several sources; what ``dataset=mixture`` configures.

    Attributes:
        sources: by name, the keys of a data set of the given ``kind`` (``file`` by default, ``hf`` or ``demo``)
            and either ``weight`` or ``epochs``.
        temperature: shares go with the sources' sizes to the power of 1 / temperature: 1 keeps the sizes, more evens
            them out.
        max_length: for the sources that do not say it themselves; ``truncation`` likewise.
    """

    sources: dict[str, dict[str, Any]] = field(default_factory=dict)
    temperature: float | None = None
    max_length: int = 2048
    truncation: str = "right"

    streaming = False

    @staticmethod
    def problems(section: dict[str, Any], cfg: Any, *, key: str, world_size: int) -> Iterator[str]:
        """Yield what is wrong with the sources beyond their own keys."""
        for name, keys in section.get("sources", {}).items():
            if isinstance(keys, dict) and keys.get("validation_share") is not None:
                yield f"{key}.sources.{name}.validation_share: a mixture has none; choose a validation_dataset"

    def parts(self) -> dict[str, Any]:
        """Return the sources by name.

        Raises:
            UserError: there are none, or a key of one is not known.
        """
        if not self.sources:
            raise UserError("dataset=mixture has no sources: set dataset.sources.NAME.path=... for each")
        return {name: self._part(name, keys) for name, keys in self.sources.items()}

    def _part(self, name: str, keys: Mapping[str, Any]) -> Any:
        keys = {"max_length": self.max_length, "truncation": self.truncation} | dict(keys)
        kind = keys.get("kind", "file")
        keys = {key: value for key, value in keys.items() if key not in _OWN_KEYS}
        if kind not in _KINDS:
            raise UserError(f"dataset.sources.{name}.kind={kind}: there are {', '.join(_KINDS)}")
        known = [each.name for each in dataclasses.fields(_KINDS[kind])]
        wrong = [key for key in keys if key not in known]
        if wrong:
            problems = (
                f"{key} is not a key of a {kind} source{did_you_mean(key, [*known, *_OWN_KEYS])}" for key in wrong
            )
            raise UserError(*(f"dataset.sources.{name}.{each}" for each in problems))
        if "path" in known and "path" not in keys:
            raise UserError(f"dataset.sources.{name}.path is required")
        part = _KINDS[kind](**keys)
        if part.streaming:
            raise UserError(f"dataset.sources.{name}.streaming=true: a mixture draws from whole sets, not from streams")
        return part

    def num_drawn(self, sizes: Mapping[str, int]) -> dict[str, int]:
        """Return how many rows (or packs) an epoch takes of each source, of which there are ``sizes``.

        With ``epochs``, so many times its size. Else the epoch is as long as all sources together, and shares of it
        go by ``weight``, or by ``temperature``, or are the sizes themselves.
        """
        epochs = {name: keys["epochs"] for name, keys in self.sources.items() if keys.get("epochs") is not None}
        weights = {name: keys["weight"] for name, keys in self.sources.items() if keys.get("weight") is not None}
        ways = [bool(epochs), bool(weights), self.temperature is not None]
        if sum(ways) > 1:
            raise UserError("dataset.sources: give epochs, or weights, or dataset.temperature, but one kind alone")
        for what, given in (("epochs", epochs), ("weight", weights)):
            wrong = [n for n, value in given.items() if not isinstance(value, int | float) or value <= 0]
            if wrong:
                raise UserError(f"dataset.sources.{wrong[0]}.{what}={given[wrong[0]]} must be a number above 0")
        if weights and len(weights) < len(sizes):
            missing = ", ".join(sizes.keys() - weights.keys())
            raise UserError(f"dataset.sources: some have a weight, but not {missing}")
        if self.temperature is not None and self.temperature <= 0:
            raise UserError(f"dataset.temperature={self.temperature} must be above 0")
        if epochs or not (weights or self.temperature):
            return {name: max(1, round(epochs.get(name, 1) * size)) for name, size in sizes.items()}
        if self.temperature is not None:
            weights = {name: size ** (1 / self.temperature) for name, size in sizes.items()}
        return _shared_out(sum(sizes.values()), weights)


def _shared_out(total: int, weights: Mapping[str, float]) -> dict[str, int]:
    """Share ``total`` out by ``weights`` in whole numbers, at least one each, the largest remainders first."""
    whole = {name: total * weight / sum(weights.values()) for name, weight in weights.items()}
    counts = {name: max(1, int(share)) for name, share in whole.items()}
    by_rest = sorted(whole, key=lambda name: (int(whole[name]) - whole[name], name))
    for name in by_rest[: max(0, total - sum(counts.values()))]:
        counts[name] += 1
    return counts
