"""Combine all loggers in one sink that never stops training."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from automodel.logs import get_logger
from automodel.runs.run_folder import RunDir
from automodel.secrets import masked_text

log = get_logger(__name__)


class MetricSink(Protocol):
    """Where metric records go."""

    def log(self, record: dict[str, Any]) -> None:
        """Log one record: ``kind``, ``step`` and numbers by name."""

    def close(self) -> None:
        """Finish writing."""


class MetricLogger(Protocol):
    """What a section of the ``logger`` group builds."""

    def open(self, run_dir: RunDir, *, run_id: str, config: dict[str, Any]) -> MetricSink:
        """Start logging a run."""


class Fanout:
    """Passes every record to every sink; a sink that fails is reported once and dropped."""

    def __init__(self, sinks: dict[str, MetricSink]) -> None:
        self._sinks = sinks

    def log(self, record: dict[str, Any]) -> None:
        """Log one record; secrets in its strings, such as the name of a validation set, are masked."""
        plain = {key: masked_text(value) if isinstance(value, str) else value for key, value in record.items()}
        self._each("log", plain)

    def close(self) -> None:
        """Close every sink."""
        self._each("close")

    def _each(self, method: str, *args: Any) -> None:
        for name, sink in list(self._sinks.items()):
            try:
                getattr(sink, method)(*args)
            except Exception as error:
                del self._sinks[name]
                _warn_of_failure(name, error)


def open_loggers(
    loggers: Mapping[str, MetricLogger], run_dir: RunDir, *, run_id: str, config: dict[str, Any], is_main: bool
) -> Fanout:
    """Open every logger on the main rank, and none on the others."""
    sinks: dict[str, MetricSink] = {}
    for name, logger in loggers.items() if is_main else ():
        try:
            sinks[name] = logger.open(run_dir, run_id=run_id, config=config)
        except Exception as error:
            _warn_of_failure(name, error)
    return Fanout(sinks)


def _warn_of_failure(name: str, error: Exception) -> None:
    log.warning("logger %s failed and is left out from now on: %s: %s", name, type(error).__name__, error)
