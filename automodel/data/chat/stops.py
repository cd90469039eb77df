"""Where answers end: what generation stops at."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Stops:
    """The ends that are supervised.

    Attributes:
        ids: tokens that mean an end and nothing else.
        texts: ends that are spelt in ordinary tokens, at which generation cannot stop, but its text can be cut.
    """

    ids: frozenset[int] = frozenset()
    texts: frozenset[str] = frozenset()

    @staticmethod
    def union(stops: Iterable[Stops]) -> Stops:
        """Return the ends of all of ``stops``."""
        several = list(stops)
        return Stops(frozenset().union(*(s.ids for s in several)), frozenset().union(*(s.texts for s in several)))

    def cut(self, text: str) -> str:
        """Return ``text`` up to the first of the ends that are spelt in it."""
        return text[: min((text.index(end) for end in self.texts if end in text), default=len(text))]


NO_STOPS = Stops()
