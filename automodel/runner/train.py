"""Carry out a recipe: assemble it, open its run folder, train from where it left off, export."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from automodel.checkpoint.retention import Retention
from automodel.checkpoint.room import expected_bytes, warn_of_little_room
from automodel.checkpoint.training import Checkpointer, SaveError, TrainState, load_checkpoint
from automodel.config import resolved_yaml, secret_keys
from automodel.distributed.parallel.handle import unwrap
from automodel.distributed.parallel.layers import num_weights
from automodel.distributed.runtime.agreement import run_on_main
from automodel.distributed.runtime.watchdog import set_phase
from automodel.hf_export.write import export_model, write_generation_settings
from automodel.loggers.fanout import MetricSink, open_loggers
from automodel.logs import add_log_file, get_logger
from automodel.models.adapter_starts import as_plain_adapter, follow_starts, starts_of
from automodel.runner.assembly import Assembly, assemble
from automodel.runner.build import build
from automodel.runner.evaluations import score_tables, share_table
from automodel.runner.job import Job
from automodel.runner.recipe import Recipe
from automodel.runner.resume import Start, choose_start, plain_config
from automodel.runner.summary import as_text, log_plan, log_where_and_next
from automodel.runs.run_folder import RunDir, environment_record
from automodel.secrets import masked
from automodel.train.flops import training_flops
from automodel.train.loop import Timeouts, TrainLoop
from automodel.train.meter import Meter
from automodel.train.rng import set_rng_state
from automodel.train.step import StepConfig

log = get_logger(__name__)


@dataclass(frozen=True)
class Run:
    """The run that a job trains: its folder and its id."""

    folder: RunDir
    run_id: str


def dry_build(job: Job, recipe: Recipe) -> None:
    """Build everything up to the first step and print the plan; nothing is written. Every rank must call it."""
    log_plan(assemble(job, recipe), output="nothing is written (--dry-build)")


def train(job: Job, recipe: Recipe, run: Run) -> None:
    """Train, validate and export as ``job.cfg`` says; every rank must call it."""
    parts = assemble(job, recipe)
    set_phase("preparing to train")
    start = choose_start(job.cfg, run.folder, facts=parts.facts, total_steps=parts.steps.total_steps)
    saved = _load(parts, start)
    _open_folder(parts, run, start)
    if saved is not None:
        start.log_changes(parts.steps.step)
        _log_new_end(parts, ended_at=saved.progress.get("total_steps", parts.steps.total_steps))
    loop = _build_loop(parts, run, saved)
    if job.cfg.checkpoint.enabled and job.dist_info.is_main:
        warn_of_little_room(run.folder.path, expected_bytes(parts.model, build(job.cfg.optimizer)))
    log_plan(parts, output=str(run.folder.path), is_evaluation_due=loop.is_evaluation_due)
    train_set = parts.data.train_set
    if train_set is not None and (len(train_set.shares) > 1 or parts.data.pack_length):
        log.info("an epoch\n%s", as_text(share_table(train_set)))
    if saved is not None and saved.rng is not None:
        set_rng_state(saved.rng)  # last, because building draws random numbers
    _run_and_export(parts, run, loop)
    if parts.validation is not None and parts.validation.scores:
        log.info("what was learned\n%s", "\n".join(map(as_text, score_tables(parts.validation.scores))))
    log_where_and_next(parts, run.folder.path)


@dataclass(frozen=True)
class _Saved:
    """What a checkpoint held besides the weights and the optimizer's state."""

    progress: dict[str, Any]
    rng: dict[str, Any] | None


def _load(parts: Assembly, start: Start) -> _Saved | None:
    """Load the checkpoint of ``start`` into the parts; None where there is none."""
    if start.checkpoint is None:
        return None
    steps, loader = parts.steps, parts.loader
    starts = starts_of(parts.model)
    progress, rng = load_checkpoint(start.checkpoint, TrainState(parts.model, parts.optimizer))
    follow_starts(parts.model, starts)
    steps.step = progress["step"]
    loader.load_state_dict(progress["loader"])
    if loader.is_exhausted:
        steps.end_here()
    for _ in range(steps.step):  # a schedule depends on the steps alone, so a changed one applies at once
        parts.lr_scheduler.step()
    return _Saved(progress, rng)


def _build_loop(parts: Assembly, run: Run, saved: _Saved | None) -> TrainLoop:
    job, cfg, info = parts.job, parts.job.cfg, parts.job.dist_info
    is_due = parts.begins_with_evaluation if saved is None else saved.progress.get("is_evaluation_due", False)
    return TrainLoop(
        model=parts.model,
        objective=parts.objective,
        optimizer=parts.optimizer,
        lr_scheduler=parts.lr_scheduler,
        steps=parts.steps,
        loader=parts.loader,
        step_config=StepConfig(
            device=info.device,
            dp_group=job.dp.group,
            defer_grad_sync=job.strategy.defer_grad_sync,
            clip_norm=cfg.clip_grad_norm.max_norm,
            autocast=job.autocast,
        ),
        evaluators=[] if parts.validation is None else [parts.validation.evaluator()],
        checkpointer=_checkpointer(job, run),
        sink=_open_loggers(job, run),
        meter=Meter(info.device, world_size=info.world_size, flops=training_flops(parts.model)),
        timeouts=Timeouts(training=cfg.dist_env.timeout_minutes, slow_phase=cfg.dist_env.init_timeout_minutes),
        metrics_size=run.folder.metrics_size,
        resume_facts=parts.facts | {"config": plain_config(cfg)},
        on_non_finite=cfg.on_non_finite,
        dump_folder=run.folder.path,
        is_evaluation_due=is_due and parts.validation is not None,
    )


def _run_and_export(parts: Assembly, run: Run, loop: TrainLoop) -> None:
    """Run ``loop`` to its end; ``tokenizer/`` is written before it and ``model/`` after it."""
    job, folder = parts.job, run.folder
    unsaved: SaveError | None = None

    def write_tokenizer() -> None:  # an export of a checkpoint needs it
        parts.tokenizer.save_pretrained(folder.tokenizer_dir)
        write_generation_settings(unwrap(parts.model), folder.tokenizer_dir)

    try:
        run_on_main(write_tokenizer)
        if loop.steps.is_last_step:
            log.info("nothing to train: step %d is the last", loop.steps.step)
        try:
            loop.run()
        except SaveError as error:
            if job.cfg.checkpoint.on_error == "stop" or not loop.steps.is_last_step:
                raise
            unsaved = error  # the trained model is written all the same
        if job.cfg.export.enabled:
            set_phase("exporting the model")
            with job.slow_phase(), job.autocast():
                export_model(
                    parts.model,
                    parts.tokenizer,
                    folder=folder.model_dir,
                    device=job.dist_info.device,
                    autocast=job.autocast,
                    load_base=parts.load_base,
                    as_written=as_plain_adapter,
                    must_verify=job.cfg.export.verify,
                    dtype=job.precision.written,
                )
        if unsaved is not None:
            raise unsaved
    finally:
        loop.sink.close()


def _checkpointer(job: Job, run: Run) -> Checkpointer | None:
    cfg = job.cfg.checkpoint
    if not cfg.enabled:
        return None
    return Checkpointer(
        run.folder.checkpoints_dir,
        retention=Retention(cfg.keep_last, cfg.keep_every, cfg.keep_best),
        is_async=cfg.async_save,
        on_error=cfg.on_error,
        timeout_minutes=job.cfg.dist_env.init_timeout_minutes,
    )


def _log_new_end(parts: Assembly, *, ended_at: int) -> None:
    steps = parts.steps
    if steps.total_steps != ended_at:
        log.info(
            "the run now ends at step %d instead of %d; from now on the learning rate follows the schedule for %d "
            "steps: %.3e at step %d",
            steps.total_steps, ended_at, steps.total_steps, parts.lr_scheduler.get_last_lr()[0], steps.step + 1,
        )  # fmt: skip


def _open_loggers(job: Job, run: Run) -> MetricSink:
    return open_loggers(
        {name: build(section) for name, section in job.cfg.logger.items()},
        run.folder,
        run_id=run.run_id,
        config=masked(job.cfg.model_dump()),
        is_main=job.dist_info.is_main,
    )


def _open_folder(parts: Assembly, run: Run, start: Start) -> None:
    """Write what the run is into its folder: from here on the input is known to be good."""
    job, folder = parts.job, run.folder

    def write() -> None:
        folder.write_config(resolved_yaml(job.cfg))
        folder.start_record(
            run_id=run.run_id,
            **environment_record(),
            world_size=job.dist_info.world_size,
            num_threads=torch.get_num_threads(),
            device=str(job.dist_info.device),
            backend=job.dist_info.backend,
            strategy=job.strategy.name,
            dataset_fingerprints={"train": parts.data.fingerprint},
            num_parameters=num_parameters(parts.model),
            num_trained_parameters=num_parameters(parts.model, only_trained=True),
            resumed_from_step=parts.steps.step or None,
        )
        folder.cut_metrics(start.metrics_size)
        add_log_file(folder.log_path)

    run_on_main(write)
    if hidden := secret_keys(job.cfg):
        log.info("secrets are not written down; config.yaml says how to give them again: %s", ", ".join(hidden))


def num_parameters(model: nn.Module, *, only_trained: bool = False) -> int:
    """Return the number of parameters of the whole model, perhaps only of those that are trained."""
    return sum(num_weights(p) for p in model.parameters() if p.requires_grad or not only_trained)
