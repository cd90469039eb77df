"""Where a run starts: at nothing, at the newest checkpoint of its own folder, or at another run's."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from automodel.checkpoint.training import newest_checkpoint, read_progress, require_whole
from automodel.config import Config
from automodel.config.resume_policy import Change, judge
from automodel.distributed.runtime.agreement import run_on_main
from automodel.logs import get_logger, warn_for_all
from automodel.runs.run_folder import RunDir
from automodel.secrets import masked
from automodel.types import UserError

log = get_logger(__name__)


@dataclass(frozen=True)
class Start:
    """Where a run starts.

    Attributes:
        checkpoint: None: at nothing.
        metrics_size: the length in bytes to which the metrics file is cut.
        applied: the changes of the configuration that take effect, to be logged.
    """

    checkpoint: Path | None = None
    metrics_size: int = 0
    applied: list[Change] = field(default_factory=list)

    def log_changes(self, step: int) -> None:
        """Log where the run resumes, and which changes apply from there on."""
        log.info("resumed from %s, at step %d", self.checkpoint, step)
        for change in self.applied:
            log.info("%s; used from step %d on", change, step + 1)


def plain_config(cfg: Config) -> dict[str, Any]:
    """Return the configuration as a checkpoint keeps it: plain data without secrets."""
    return masked(cfg.model_dump(by_alias=True))


def choose_start(cfg: Config, run_dir: RunDir, *, facts: dict[str, Any], total_steps: int) -> Start:
    """Return the checkpoint to continue from; every rank must call it, and nothing is changed yet.

    Raises:
        UserError: the folder's run, or the checkpoint's, had another configuration, and the table of
            ``resume_policy`` does not apply the change.
    """
    resume = cfg.checkpoint.resume
    if resume == "never":
        if run_on_main(run_dir.holds_run):
            raise UserError(
                f"output_dir={run_dir.path} already holds a run and checkpoint.resume=never: "
                "choose another output_dir, or checkpoint.resume=auto to continue"
            )
        return Start()
    folder = newest_checkpoint(run_dir.checkpoints_dir)
    if resume != "auto":
        folder = _newer_of(Path(resume), folder)
    if folder is None:
        run_on_main(lambda: _refuse_other_finished_run(cfg, run_dir))
        return Start()
    saved = run_on_main(lambda: read_progress(folder))
    applied = _require_fitting(cfg, saved, facts=facts, folder=folder, total_steps=total_steps)
    is_own = folder.resolve().parent == run_dir.checkpoints_dir.resolve()
    return Start(folder, saved["metrics_size"] if is_own else 0, applied)


def _newer_of(seed: Path, own: Path | None) -> Path:
    """Return the checkpoint ``seed``, from which the run was to start, unless it has come further since."""
    seed_step, own_step = run_on_main(lambda: (_step_of(seed), None if own is None else _step_of(own)))
    if own is None or (seed_step is not None and own_step <= seed_step):
        require_whole(seed)
        return seed
    log.info(
        "checkpoint.resume=%s is where the run began; it continues from its own newer checkpoint %s. To begin there "
        "again choose another output_dir", seed, own,
    )  # fmt: skip
    return own


def _step_of(folder: Path) -> int | None:
    """Return the step of a checkpoint, or None where it cannot be read any more."""
    try:
        return read_progress(folder)["step"]
    except UserError:
        return None


def _require_fitting(
    cfg: Config, saved: dict[str, Any], *, facts: dict[str, Any], folder: Path, total_steps: int
) -> list[Change]:
    verdict = judge(saved, config=plain_config(cfg), facts=facts, folder=folder)
    problems = list(verdict.refused)
    if not cfg.checkpoint.allow_changes:
        problems += verdict.unless_allowed
    if saved["step"] > total_steps:
        problems.append(
            f"step_scheduler.max_steps or num_epochs end the run at step {total_steps}, but {folder} is of step "
            f"{saved['step']} already; raise them, or begin a new run with another output_dir"
        )
    elif saved["step"] == total_steps and verdict.pointless():
        problems.append(
            f"the run in {folder.parent.parent} is finished at step {total_steps}, so nothing would be trained with "
            f"what has changed ({'; '.join(map(str, verdict.pointless()))}); begin a new run with another output_dir, "
            "or raise step_scheduler.max_steps or num_epochs to train on"
        )
    if problems:
        raise UserError(*problems)
    for text in verdict.unless_allowed:
        warn_for_all(log, "checkpoint.allow_changes=true: %s", text.partition(";")[0])
    if "config" not in saved:
        warn_for_all(
            log,
            "%s does not hold its configuration, because an earlier version made it: only seed, batch and rows were "
            "compared with it", folder,
        )  # fmt: skip
    return verdict.applied


def _refuse_other_finished_run(cfg: Config, run_dir: RunDir) -> None:
    """Keep the model of a run that is finished, and left no checkpoint to continue from, unless this one repeats it."""
    try:
        ended = json.loads(run_dir.run_json_path.read_text())["ended"]
        before = yaml.safe_load(run_dir.config_path.read_text())
    except (OSError, ValueError, KeyError, yaml.YAMLError):
        return
    if not ended or ended["status"] != "done":
        return
    verdict = judge({"config": before}, config=plain_config(cfg), facts={}, folder=run_dir.path)
    problems = verdict.refused + verdict.unless_allowed + [str(change) for change in verdict.applied]
    if problems:
        changed = "; ".join(problem.partition(", but the checkpoint")[0] for problem in problems)
        raise UserError(
            f"output_dir={run_dir.path} holds a finished run with another configuration ({changed}) and no checkpoint "
            "to continue from; choose another output_dir"
        )
