"""What a run says on the screen before it trains and after."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table
from torch import nn

from automodel.distributed.parallel.handle import is_peft_model, unwrap
from automodel.logs import get_logger
from automodel.train.loop import TrainLoop

if TYPE_CHECKING:
    from automodel.runner.job import Job

log = get_logger(__name__)


def log_plan(job: Job, loop: TrainLoop, *, num_rows: int | None, num_parameters: int) -> None:
    """Say what is about to be trained, on what and for how long."""
    cfg, info, steps = job.cfg.step_scheduler, job.dist_info, loop.steps
    accumulation = cfg.global_batch_size // (cfg.local_batch_size * job.dp.size)
    trained = sum(p.numel() for p in loop.model.parameters() if p.requires_grad)
    saves = steps.count(steps.ckpt_interval) if loop.checkpointer else 0
    is_first_due = loop.is_evaluation_due and steps.step == 0
    evaluations = steps.count(steps.val_interval) + is_first_due if loop.evaluators else 0
    by_clock = ", and every minute or so" if loop.checkpointer and steps.saves_by_clock else ""
    lines = {
        "recipe": job.cfg.recipe.name,
        "devices": f"{info.world_size} x {info.device.type} ({info.backend})",
        "strategy": job.strategy.name,
        "parameters": f"{num_parameters:,}, of which {trained:,} are trained",
        "precision": str(job.precision),
        "rows": "a stream" if num_rows is None else f"{num_rows:,}",
        "global batch": f"{cfg.global_batch_size} = {cfg.local_batch_size} local x {accumulation} accumulated "
        f"x {job.dp.size} data-parallel",
        "steps": f"{steps.total_steps:,}" + (f" ({steps.steps_per_epoch:,} an epoch)" if steps.steps_per_epoch else ""),
        "evaluations": str(evaluations),
        "saves": f"{saves}{by_clock}",
        "output": str(job.run_dir.path),
    }
    table = Table(show_header=False)
    for name, value in lines.items():
        table.add_row(name, value)
    log.info("the plan\n%s", as_text(table))


def log_where_and_next(job: Job, model: nn.Module, *, next_steps: Sequence[str] = ()) -> None:
    """End the screen with where everything lies, how the trained ``model`` is loaded, and what to try next."""
    folder = job.run_dir.path
    lines = []
    if job.cfg.export.enabled:
        lines += [f"the model: {folder / 'model'}", f"  in Python: {_how_to_load(model, folder / 'model')}"]
    lines += [f"metrics: {folder / 'metrics.jsonl'}", f"everything else: {folder}"]
    if next_steps:
        lines += ["next:", *(f"  {step}" for step in next_steps)]
    log.info("done\n%s", "\n".join(lines))


def _how_to_load(model: nn.Module, folder: Path) -> str:
    """Return the Python that loads ``folder``, which holds what was exported of ``model``."""
    unwrapped = unwrap(model)
    base = unwrapped.get_base_model() if is_peft_model(unwrapped) else unwrapped
    is_classifier = type(base).__name__.endswith("ForSequenceClassification")
    auto_class = "AutoModelForSequenceClassification" if is_classifier else "AutoModelForCausalLM"
    options = ""
    if is_peft_model(unwrapped):
        auto_class = auto_class.replace("AutoModel", "AutoPeftModel")
        options = f", num_labels={unwrapped.config.num_labels}" if is_classifier else ""
    library = "peft" if is_peft_model(unwrapped) else "transformers"
    return (
        f"from {library} import {auto_class}; model = {auto_class}.from_pretrained({str(folder.resolve())!r}{options})"
    )


def as_text(table: Table) -> str:
    """Render a rich table as plain lines, for the screen and the log file alike."""
    console = Console(file=io.StringIO(), width=100)
    console.print(table)
    return console.file.getvalue().rstrip()
