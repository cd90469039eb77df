"""What a run says on the screen before it trains and after."""

from __future__ import annotations

import io
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from automodel.distributed.parallel.layers import num_weights
from automodel.logs import get_logger
from automodel.models.adapters import is_adapted

if TYPE_CHECKING:
    from automodel.runner.assembly import Assembly

log = get_logger(__name__)

_NEXT_AFTER_DEMO = (
    "python -m automodel.run model=hf model.pretrained_model_name_or_path=DIR_OR_HUB_ID dataset=jsonl "
    "dataset.path=YOUR_ROWS.jsonl",
    "python -m automodel.run launch.nproc_per_node=2 distributed=fsdp2 step_scheduler.local_batch_size=16",
    "python -m automodel.run --help",
)


def log_plan(parts: Assembly, *, output: str, is_evaluation_due: bool | None = None) -> None:
    """Print what will be trained, on what and for how long.

    Args:
        output: where the run is written.
        is_evaluation_due: whether an evaluation comes before the first step; None: as in a fresh run.
    """
    job, steps, num_rows = parts.job, parts.steps, parts.data.num_rows
    cfg, info, has_checkpoints = job.cfg.step_scheduler, job.dist_info, job.cfg.checkpoint.enabled
    accumulation = cfg.global_batch_size // (cfg.local_batch_size * job.dp.size)
    all_parameters, trained = (
        sum(num_weights(p) for p in parts.model.parameters() if p.requires_grad or not only) for only in (False, True)
    )
    is_due = parts.begins_with_evaluation if is_evaluation_due is None else is_evaluation_due
    is_first_due = is_due and steps.step == 0
    evaluations = steps.count(steps.val_interval) + is_first_due if parts.validation is not None else 0
    saves = steps.count(steps.ckpt_interval) if has_checkpoints else 0
    by_clock = ", and every minute or so" if has_checkpoints and steps.saves_by_clock else ""
    lines = {
        "recipe": job.cfg.recipe.name,
        "devices": f"{info.world_size} x {info.device.type} ({info.backend})",
        "strategy": job.strategy.name,
        "parameters": f"{all_parameters:,}, of which {trained:,} are trained",
        "precision": str(job.precision),
        "rows": "a stream" if num_rows is None else f"{num_rows:,}",
        "global batch": f"{cfg.global_batch_size} = {cfg.local_batch_size} local x {accumulation} accumulated "
        f"x {job.dp.size} data-parallel",
        "steps": f"{steps.total_steps:,}" + (f" ({steps.steps_per_epoch:,} an epoch)" if steps.steps_per_epoch else ""),
        "evaluations": str(evaluations),
        "saves": f"{saves}{by_clock}",
        "output": output,
    }
    table = Table(show_header=False)
    for name, value in lines.items():
        table.add_row(name, value)
    log.info("the plan\n%s", as_text(table))


def log_where_and_next(parts: Assembly, folder: Path) -> None:
    """End the screen with where the files are, how the model is loaded, and what to try next."""
    lines = []
    if parts.job.cfg.export.enabled:
        code = parts.data.task.loading_code((folder / "model").resolve(), is_adapter=is_adapted(parts.model))
        lines += [f"the model: {folder / 'model'}", f"  in Python: {code}"]
    lines += [f"metrics: {folder / 'metrics.jsonl'}", f"everything else: {folder}"]
    if parts.source.name == "demo":
        lines += ["next:", *(f"  {step}" for step in _NEXT_AFTER_DEMO)]
    log.info("done\n%s", "\n".join(lines))


def as_text(table: Table) -> str:
    """Render a rich table as plain lines, for both the screen and the log file."""
    console = Console(file=io.StringIO(), width=100)
    console.print(table)
    return console.file.getvalue().rstrip()
