"""Metrics as JSON lines, one object a line, flushed after each."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import Any

from automodel.runs.run_folder import RunDir


@dataclass(frozen=True)
class JsonlLogger:
    """What ``logger=jsonl`` configures."""

    def open(self, run_dir: RunDir, *, run_id: str, config: dict[str, Any]) -> JsonlSink:
        """Append to the run's ``metrics.jsonl``."""
        return JsonlSink(run_dir)


class JsonlSink:
    """An open ``metrics.jsonl``."""

    def __init__(self, run_dir: RunDir) -> None:
        self._file = run_dir.metrics_path.open("a", encoding="utf-8")

    def log(self, record: dict[str, Any]) -> None:
        """Write a line; a number that JSON cannot hold (NaN, infinity) becomes null."""
        self._file.write(json.dumps({key: _json_value(value) for key, value in record.items()}) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def _json_value(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
