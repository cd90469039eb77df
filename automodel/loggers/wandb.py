"""Metrics to Weights & Biases."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any, Literal

from automodel.loggers.rundir import RunDir
from automodel.logs import get_logger

log = get_logger(__name__)


@dataclass(frozen=True)
class WandbLogger:
    """What ``logger=[jsonl,wandb]`` configures."""

    project: str = "automodel"
    entity: str | None = None
    name: str | None = None
    mode: Literal["online", "offline", "disabled"] | None = None

    def open(self, run_dir: RunDir, *, run_id: str, config: dict[str, Any]) -> WandbSink:
        """Begin, or go on with, the wandb run of this run id; offline where nobody is logged in."""
        import wandb

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
        return WandbSink(run)


class WandbSink:
    """A running wandb run."""

    def __init__(self, run: Any) -> None:
        self._run = run

    def log(self, record: dict[str, Any]) -> None:
        """Send a record; each validation set has a prefix of its own, and ``step`` is the axis of all."""
        kind = record["kind"]
        prefix = kind if kind == "train" else f"{kind}/{record['name']}"
        left_out = ("kind", "name", "step", "timestamp")
        values = {f"{prefix}/{key}": value for key, value in record.items() if key not in left_out}
        self._run.log(values | {"step": record["step"]})

    def close(self) -> None:
        """Finish the run."""
        self._run.finish()


def _default_mode() -> str | None:
    if "WANDB_MODE" in os.environ or "WANDB_API_KEY" in os.environ:
        return None  # as the environment says
    import wandb

    if wandb.login(prompt=False, verify=False):
        return None
    log.info("wandb: nobody is logged in, so the run is kept offline (wandb sync sends it later)")
    return "offline"
