"""Read ``metrics.jsonl``, the records that a run logs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

Kind = Literal["train", "validation"]


def read_records(path: Path, kind: Kind | None = None) -> list[dict[str, Any]]:
    """Return the records of a metrics file in the order of the file, or only those of one kind.

    A last line without its newline is left out, because a running or killed run may have written only part of it. A
    file that does not exist has no records.

    Raises:
        ValueError: a whole line is not JSON.
    """
    lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
    records = [json.loads(line) for line in lines]
    return [record for record in records if kind is None or record["kind"] == kind]
