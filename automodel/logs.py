"""Logging: rank 0 logs everything, other ranks only warnings."""

from __future__ import annotations

import logging
import os
import re
import sys
import warnings
from pathlib import Path

from rich.console import Console

from automodel.secrets import masked_text

_ROOT = "automodel"
_is_main = True  # until setup_logging says otherwise
console = Console(stderr=True, soft_wrap=True, highlight=False)


class _ConsoleHandler(logging.Handler):
    """Prints through the console that also draws the progress bar, so they do not garble each other."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            style = "yellow" if record.levelno >= logging.WARNING else None
            console.print(self.format(record), style=style, markup=False)
        except Exception:
            self.handleError(record)


class _MaskingFormatter(logging.Formatter):
    """Masks secrets in the finished line."""

    def format(self, record: logging.LogRecord) -> str:
        return masked_text(super().format(record))


def get_logger(name: str) -> logging.Logger:
    """Return the logger of one of our modules."""
    return logging.getLogger(name)


def warn_for_all(logger: logging.Logger, message: str, *args: object) -> None:
    """Log, on rank 0, a warning that is the same on every rank."""
    if _is_main:
        logger.warning(message, *args)


def speaks_for_all() -> bool:
    """Return whether this process is the one that shows what all ranks do."""
    return _is_main


def setup_logging(rank: int) -> None:
    """Send our log lines to the screen; calling it again replaces the handlers."""
    global _is_main
    _is_main = rank == 0
    root = logging.getLogger(_ROOT)
    for handler in list(root.handlers):
        root.removeHandler(handler)
        handler.close()
    handler = _ConsoleHandler()
    prefix = "" if rank == 0 else f"[rank {rank}] "
    handler.setFormatter(_MaskingFormatter(f"%(asctime)s {prefix}%(message)s", datefmt="%H:%M:%S"))
    root.addHandler(handler)
    root.setLevel(logging.INFO if rank == 0 else logging.WARNING)
    root.propagate = False
    _quieten_libraries()


def add_log_file(path: Path) -> None:
    """Write our log lines to ``path`` too, appending."""
    handler = logging.FileHandler(path, encoding="utf-8")
    handler.setFormatter(_MaskingFormatter("%(asctime)s %(levelname)s %(message)s"))
    logging.getLogger(_ROOT).addHandler(handler)


_CHATTER = (
    "`is_gradient_checkpointing` is deprecated",  # peft asks transformers by the old name
    "Input and output embeddings are no longer tied after merging",  # as the merged config.json says too
    "torch.distributed is disabled, unavailable or uninitialized",  # one process saves without collectives
)
"""The first words of library warnings that a user cannot act on."""


def _quieten_libraries() -> None:
    """Hide library output, and the warnings in ``_CHATTER``; all other warnings are shown."""
    for beginning in _CHATTER:
        warnings.filterwarnings("ignore", message=re.escape(beginning))
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "warning")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    for name in ("transformers", "datasets", "httpx", "filelock", "torch.distributed"):
        logging.getLogger(name).setLevel(logging.WARNING)
    if "transformers" in sys.modules:
        sys.modules["transformers"].utils.logging.disable_progress_bar()
