"""Report the fields of rows and the keys of messages that nothing reads."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from automodel.data.chat.markers import THOUGHT_KEYS
from automodel.data.formats.columns import is_blank
from automodel.logs import get_logger, warn_for_all

if TYPE_CHECKING:
    from automodel.data.formats.samples import Turn
    from automodel.data.prepare.prepared import RowCounts

log = get_logger(__name__)

# What says where a row is from, or sorts it; any other field may be what should have been learnt.
_ABOUT_ROWS = re.compile(
    r"(.*[_\W])?(id|idx|index|uuid|guid|hash|url|source|origin|dataset|split|timestamp|date|created|created_at|meta|"
    r"metadata|license|licence|lang|language|locale|category|topic|tags?|task|type|kind|difficulty|level|score|rating|"
    r"quality|model|annotator|author|version|num_\w+|is_\w+|__\w+__|refusal|annotations)",
    re.IGNORECASE,
)
_MEDIA = re.compile(
    r"(.*[_\W])?(images?|imgs?|pictures?|photos?|videos?|audios?|speech|pixel_values|media)([_\W].*)?", re.IGNORECASE
)
_NUMBERS = re.compile(r"(_ids?|_idx|_index|_hash|Id)$")
_LOOKED_UP = re.compile(r"\.\s*(\w+)|[\"'](\w+)[\"']")
_READ_KEYS = ("role", "content", "tool_calls", *THOUGHT_KEYS)
_MOST_NAMED = 12


def unread_keys(turns: Iterable[Turn], template: Any) -> set[str]:
    """Return the keys of messages that hold something and that a chat template does not mention."""
    keys = {key for turn in turns for key, value in turn.items() if key not in _READ_KEYS and not is_blank(value)}
    return keys - _mentioned(template) if keys and isinstance(template, str) else keys


@lru_cache(maxsize=16)
def _mentioned(template: str) -> frozenset[str]:
    """Return the names that a template may look up: ``message.name``, ``message['name']``, ``'name' in message``."""
    return frozenset(name for pair in _LOOKED_UP.findall(template) for name in pair)


def media_fields(names: Iterable[str]) -> list[str]:
    """Return the names of fields that hold images, sound or films."""
    return [name for name in names if _MEDIA.fullmatch(name) and not _NUMBERS.search(name)]


def report_unused(name: str, counts: RowCounts) -> None:
    """Say once which fields of the rows are not used: a warning where one may hold what should be learnt."""
    unused = dict(sorted(counts.unused.items(), key=lambda item: -item[1]))
    if not unused:
        return
    is_harmless = all(_ABOUT_ROWS.fullmatch(field) for field in unused)
    hint = "" if is_harmless else "; dataset.columns.* names the fields that are trained on"
    line = f"{name}: fields not used: {listed(unused, counts.num_rows_read)}{hint}"
    log.info("%s", line) if is_harmless else warn_for_all(log, "%s", line)


def listed(unused: Mapping[str, int], num_rows: int) -> str:
    """Return the names of fields with the number of rows that hold something in them."""
    shown = list(unused.items())[:_MOST_NAMED]
    first, *others = [f"{field} ({count:,}" for field, count in shown]
    more = f", and {len(unused) - len(shown)} more" if len(unused) > len(shown) else ""
    return ", ".join([f"{first} of {num_rows:,} rows)", *(f"{each})" for each in others)]) + more
