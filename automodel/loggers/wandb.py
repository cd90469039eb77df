"""Metrics to Weights & Biases."""

from __future__ import annotations

import json
import os
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from automodel.logs import get_logger
from automodel.runs.run_folder import RunDir, write_whole
from automodel.secrets import masked_text

log = get_logger(__name__)


@dataclass(frozen=True)
class WandbLogger:
    """What ``logger=[jsonl,wandb]`` configures."""

    project: str = "automodel"
    entity: str | None = None
    name: str | None = None
    mode: Literal["online", "offline", "disabled"] | None = None

    def open(self, run_dir: RunDir, *, run_id: str, config: dict[str, Any]) -> WandbSink:
        """Start or resume the wandb run with this run id; offline if nobody is logged in.

        Each start of an offline run leaves a folder; ``wandb sync`` merges them by the run id.
        """
        import wandb

        with _masked_command():
            run = wandb.init(
                project=self.project,
                entity=self.entity,
                name=self.name or run_id,
                id=run_id,
                resume="allow",
                mode=self.mode or _default_mode(),
                dir=str(run_dir.path),
                config=config,
                settings=wandb.Settings(silent=True, console="off"),
            )
        run.define_metric("*", step_metric="step")
        if not run.offline:
            return WandbSink(run, sent=_sent_before(run))
        note = run_dir.path / "wandb" / f"sent-{run_id}.json"
        return WandbSink(run, sent=json.loads(note.read_text()) if note.exists() else {}, note=note)


class WandbSink:
    """A running wandb run.

    Args:
        sent: the last step that earlier starts sent, by prefix. A killed run repeats the steps after its checkpoint;
            W&B cannot delete rows, so these steps are not sent again.
        note: the file that keeps ``sent`` of an offline run, which cannot ask W&B for it.
    """

    def __init__(self, run: Any, *, sent: dict[str, int], note: Path | None = None) -> None:
        self._run, self._sent, self._note = run, sent, note
        self._has_reported_repeats = False

    def log(self, record: dict[str, Any]) -> None:
        """Send a record; each validation set has its own prefix, and ``step`` is the axis of all."""
        kind = record["kind"]
        prefix = kind if kind == "train" else f"{kind}/{record['name']}"
        step = record["step"]
        if step <= self._sent.get(prefix, -1):
            self._report_repeats(step)
            return
        left_out = ("kind", "name", "step", "timestamp")
        values = {f"{prefix}/{key}": value for key, value in record.items() if key not in left_out}
        self._run.log(values | {"step": step, f"{prefix}/step": step})
        self._sent[prefix] = step
        if self._note is not None:
            write_whole(self._note, json.dumps(self._sent))

    def close(self) -> None:
        """Finish the run; if it was kept offline, log how to send it."""
        self._run.finish()
        if self._note is not None:
            starts = f"{shlex.quote(str(self._note.parent.resolve()))}/offline-run-*"
            log.info("wandb: kept offline; send it with: wandb sync %s", starts)

    def _report_repeats(self, step: int) -> None:
        if not self._has_reported_repeats:
            log.info("wandb: has step %d already; steps up to %d are not sent again", step, max(self._sent.values()))
            self._has_reported_repeats = True


@contextmanager
def _masked_command() -> Iterator[None]:
    """Mask secrets in the command line, which wandb records."""
    before = sys.argv
    sys.argv = [masked_text(argument) for argument in before]
    try:
        yield
    finally:
        sys.argv = before


def _sent_before(run: Any) -> dict[str, int]:
    """Return the last step that W&B has from earlier starts of ``run``, by prefix."""
    if not run.resumed:
        return {}
    return {key.removesuffix("/step"): int(step) for key, step in run.summary.items() if key.endswith("/step")}


def _default_mode() -> str | None:
    if "WANDB_MODE" in os.environ or "WANDB_API_KEY" in os.environ:
        return None  # wandb reads the environment itself
    import wandb

    if wandb.login(prompt=False, verify=False):
        return None
    log.info("wandb: nobody is logged in, so the run is kept offline")
    return "offline"
