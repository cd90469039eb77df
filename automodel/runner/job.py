"""What every recipe builds from the configuration in the same way; the only other reader of the tree."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from hydra.utils import instantiate as hydra_instantiate
from omegaconf import OmegaConf
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.optim.lr_scheduler import LRScheduler
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from automodel.checkpoint.retention import Retention
from automodel.checkpoint.room import expected_bytes, warn_of_little_room
from automodel.checkpoint.training import (
    Checkpointer,
    SaveError,
    TrainState,
    load_checkpoint,
)
from automodel.config import Config, masked, resolved_yaml, secret_keys
from automodel.data.batches.loader import Collate, Loader, TrainLoader
from automodel.distributed.parallel.handle import unwrap
from automodel.distributed.parallel.precision import Precision, convert_weights_, resolve_precision
from automodel.distributed.parallel.strategy import DataParallel, Strategy, data_parallel
from automodel.distributed.runtime.agreement import (
    collective_timeout,
    run_on_all_ranks,
    run_on_main,
    set_collective_timeout,
)
from automodel.distributed.runtime.dist_info import DistInfo
from automodel.distributed.runtime.first_rank import FirstRankPerNode
from automodel.distributed.runtime.watchdog import set_phase
from automodel.hf_export.write import export_model, write_generation_settings
from automodel.loggers.fanout import MetricSink, open_loggers
from automodel.logs import add_log_file, get_logger, warn_for_all
from automodel.models.adapters import Task, described, merge_problem
from automodel.models.embeddings import new_token_ids
from automodel.models.hf import HFModel, held_in
from automodel.models.sharded_loading import unfilled_model
from automodel.optim.optimizers import parameter_groups
from automodel.runner.resume import choose_start, plain_config
from automodel.runner.summary import log_plan
from automodel.runs.run_folder import RunDir, environment_record
from automodel.train.flops import training_flops
from automodel.train.loop import Evaluator, Timeouts, TrainLoop
from automodel.train.meter import Meter
from automodel.train.rng import seed_everything, set_rng_state
from automodel.train.step import LossFn, StepConfig
from automodel.train.step_scheduler import StepScheduler
from automodel.types import UserError

log = get_logger(__name__)


@dataclass
class Job:
    """The run that a recipe works in."""

    cfg: Config
    dist_info: DistInfo
    run_dir: RunDir
    run_id: str
    precision: Precision = field(init=False)
    strategy: Strategy = field(init=False)
    mesh: DeviceMesh = field(init=False)
    dp: DataParallel = field(init=False)
    load_base: Callable[[], PreTrainedModel] = field(init=False)
    base_weights: str | None = field(default=None, init=False)
    """The fingerprint of the pretrained weights; None for fresh ones."""

    def __post_init__(self) -> None:
        cfg, device = self.cfg, self.dist_info.device
        attention = str(cfg.model.get("attn_implementation"))
        if attention.startswith("flash_attention") and device.type == "cpu":
            raise UserError(
                f"model.attn_implementation={attention} computes on a GPU alone, and this run has none; choose sdpa"
            )
        self.precision = resolve_precision(cfg.model, cfg.distributed, is_frozen=cfg.peft is not None, device=device)
        self.strategy = build(cfg.distributed | self.precision.of_strategy)
        self.mesh = self.strategy.build_mesh(self.dist_info)
        self.dp = data_parallel(self.mesh)
        set_collective_timeout(self.cfg.dist_env.init_timeout_minutes)  # of the groups of the mesh too

    @property
    def autocast(self) -> Callable[[], Any]:
        return partial(self.strategy.autocast, self.dist_info.device)

    def load_tokenizer(self, source: Any) -> PreTrainedTokenizerBase:
        """Download what the ``model`` section builds, once per node, and load its tokenizer on every rank."""
        with FirstRankPerNode() as is_first:
            if is_first:
                source.download()
            return source.load_tokenizer()

    def loader(self, rows: Sequence[dict[str, Any]], *, collate: Collate, **options: Any) -> TrainLoader:
        """Return this rank's loader of map-style ``rows``; ``options`` as those of TrainLoader."""
        cfg = self.cfg
        return TrainLoader(
            rows,
            collate=collate,
            global_batch_size=cfg.step_scheduler.global_batch_size,
            local_batch_size=cfg.step_scheduler.local_batch_size,
            dp_rank=self.dp.rank,
            dp_size=self.dp.size,
            seed=cfg.rng.seed,
            num_epochs=cfg.step_scheduler.num_epochs,
            pin_memory=self.dist_info.device.type == "cuda",
            **cfg.dataloader.model_dump(),
            **options,
        )

    def build_model(
        self,
        source: Any,
        tokenizer: PreTrainedTokenizerBase,
        *,
        task: Task,
        label_names: Sequence[str] | None = None,
    ) -> nn.Module:
        """Load what ``source`` builds, add the adapters of ``peft``, and wrap or shard it on its device.

        Where a strategy shards pretrained weights, each rank reads its own shards alone, after sharding; otherwise
        every rank loads the whole model first. Then data-parallel ranks draw random numbers of their own.
        """
        set_phase("loading the model")
        info, adapters = self.dist_info, build(self.cfg.peft)
        source = held_in(source, self.precision.held)
        self.load_base = partial(source.build, tokenizer, label_names=label_names)
        if isinstance(source, HFModel):
            self.base_weights = run_on_main(source.weights_fingerprint)
        device, unfilled = self.strategy.device_of_shards(info), None
        if device is not None and info.world_size > 1:
            unfilled = unfilled_model(source, tokenizer, label_names=label_names, adapters=adapters)
        seed_everything(self.cfg.rng.seed)

        def load() -> nn.Module:
            if unfilled is not None:
                model = unfilled.adapted(adapters, task=task)
            else:
                model = self.load_base()
                if adapters is not None:
                    model = adapters.apply(model, task=task, new_token_ids=new_token_ids(source, tokenizer))
            convert_weights_(model, self.precision.trained, only_trained=True)
            return model

        model = run_on_all_ranks(load)
        if adapters is not None:
            log.info("%s", described(model))
            problem = merge_problem(model)
            if problem is not None:
                warn_for_all(log, "%s", problem)
        model = self.strategy.parallelize(model, dist_info=info, mesh=self.mesh)
        if unfilled is not None:
            run_on_all_ranks(lambda: unfilled.fill(model, device))
        seed_everything(self.cfg.rng.seed, rank=self.dp.rank)
        return model


def build(section: dict[str, Any] | None) -> Any:
    """Instantiate a section with a ``_target_``; None where there is no section."""
    return hydra_instantiate(OmegaConf.create(section), _convert_="all") if section else None


def build_loop(
    job: Job,
    model: nn.Module,
    *,
    loader: Loader,
    num_rows: int | None,
    loss_fn: LossFn,
    evaluators: Sequence[Evaluator],
    fingerprint: str,
    resume_facts: dict[str, Any] | None = None,
) -> TrainLoop:
    """Build the loop over ``loader``, resumed from the run's newest checkpoint where the configuration says so.

    Writes ``config.yaml`` and ``run.json``, opens the loggers and prints the plan: from here on the input is
    known to be good. Every rank must call it.
    """
    set_phase("preparing to train")
    cfg, info = job.cfg, job.dist_info
    steps = StepScheduler(
        steps_per_epoch=loader.steps_per_epoch,
        **cfg.step_scheduler.model_dump(exclude={"global_batch_size", "local_batch_size"}),
        keeps_best=cfg.checkpoint.keep_best is not None,
    )
    if not evaluators:
        steps.val_every_steps = None
    optimizer = build(cfg.optimizer)(parameter_groups(model))
    job.strategy.prepare_optimizer(optimizer, model)
    lr_scheduler = build(cfg.lr_scheduler)(optimizer, steps.total_steps)
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    facts = {"dataset fingerprint": fingerprint} | (resume_facts or {})
    if job.base_weights is not None:
        facts["base weights"] = job.base_weights
    start = choose_start(cfg, job.run_dir, facts=facts, total_steps=steps.total_steps)
    rng, is_evaluation_due = None, bool(cfg.evaluation) or steps.val_every_steps == "auto"
    if start.checkpoint is not None:
        saved, rng = load_checkpoint(start.checkpoint, TrainState(model, optimizer))
        steps.step = saved["step"]
        is_evaluation_due = saved.get("is_evaluation_due", False)
        loader.load_state_dict(saved["loader"])
        if loader.is_exhausted:
            steps.end_here()
        for _ in range(steps.step):  # a schedule depends on the steps alone, so a changed one applies at once
            lr_scheduler.step()
    _open_run(
        job, model=model, fingerprint=fingerprint, metrics_size=start.metrics_size, resumed_step=steps.step or None
    )
    if start.checkpoint is not None:
        start.tell(steps.step)
        _tell_new_end(lr_scheduler, steps=steps, ended_at=saved.get("total_steps", steps.total_steps))
    loop = TrainLoop(
        model=model,
        loss_fn=loss_fn,
        optimizer=optimizer,
        lr_scheduler=lr_scheduler,
        steps=steps,
        loader=loader,
        step_config=StepConfig(
            device=info.device,
            dp_group=job.dp.group,
            defer_grad_sync=job.strategy.defer_grad_sync,
            clip_norm=cfg.clip_grad_norm.max_norm,
            autocast=job.autocast,
        ),
        evaluators=evaluators,
        checkpointer=_checkpointer(job),
        sink=_open_loggers(job),
        meter=Meter(info.device, world_size=info.world_size, flops=training_flops(model)),
        timeouts=Timeouts(training=cfg.dist_env.timeout_minutes, slow_phase=cfg.dist_env.init_timeout_minutes),
        metrics_size=job.run_dir.metrics_size,
        resume_facts=facts | {"config": plain_config(cfg)},
        on_non_finite=cfg.on_non_finite,
        dump_folder=job.run_dir.path,
        is_evaluation_due=is_evaluation_due and bool(evaluators),
    )
    if cfg.checkpoint.enabled and info.is_main:
        warn_of_little_room(job.run_dir.path, expected_bytes(model, build(cfg.optimizer)))
    log_plan(job, loop, num_rows=num_rows, num_parameters=num_parameters)
    if rng is not None:
        set_rng_state(rng)  # last of all, after whatever building drew
    return loop


def train_and_export(job: Job, loop: TrainLoop, *, tokenizer: PreTrainedTokenizerBase) -> None:
    """Run ``loop`` to its end and write ``tokenizer/`` before it, ``model/`` after it; every rank must call it."""
    unsaved: SaveError | None = None

    def write_tokenizer() -> None:  # what a checkpoint is exported with
        tokenizer.save_pretrained(job.run_dir.tokenizer_dir)
        write_generation_settings(unwrap(loop.model), job.run_dir.tokenizer_dir)

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
            minutes = job.cfg.dist_env
            limits = collective_timeout(minutes.init_timeout_minutes, then_minutes=minutes.timeout_minutes)
            with limits, job.autocast():
                export_model(
                    loop.model,
                    tokenizer,
                    folder=job.run_dir.model_dir,
                    device=job.dist_info.device,
                    autocast=job.autocast,
                    load_base=job.load_base,
                    must_verify=job.cfg.export.verify,
                    dtype=job.precision.written,
                )
        if unsaved is not None:
            raise unsaved
    finally:
        loop.sink.close()


def _checkpointer(job: Job) -> Checkpointer | None:
    cfg = job.cfg.checkpoint
    if not cfg.enabled:
        return None
    return Checkpointer(
        job.run_dir.checkpoints_dir,
        retention=Retention(cfg.keep_last, cfg.keep_every, cfg.keep_best),
        is_async=cfg.async_save,
        on_error=cfg.on_error,
        timeout_minutes=job.cfg.dist_env.init_timeout_minutes,
    )


def _tell_new_end(lr_scheduler: LRScheduler, *, steps: StepScheduler, ended_at: int) -> None:
    if steps.total_steps != ended_at:
        log.info(
            "the run now ends at step %d instead of %d; the learning rate follows the schedule of %d steps from here "
            "on: %.3e at step %d",
            steps.total_steps, ended_at, steps.total_steps, lr_scheduler.get_last_lr()[0], steps.step + 1,
        )  # fmt: skip


def _open_loggers(job: Job) -> MetricSink:
    return open_loggers(
        {name: build(section) for name, section in job.cfg.logger.items()},
        job.run_dir,
        run_id=job.run_id,
        config=masked(job.cfg.model_dump()),
        is_main=job.dist_info.is_main,
    )


def _open_run(job: Job, *, model: nn.Module, fingerprint: str, metrics_size: int, resumed_step: int | None) -> None:
    counts = {
        "num_parameters": sum(p.numel() for p in model.parameters()),
        "num_trained_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
    }
    info = job.dist_info

    def write() -> None:
        job.run_dir.write_config(resolved_yaml(job.cfg))
        job.run_dir.start_record(
            run_id=job.run_id,
            **environment_record(),
            world_size=info.world_size,
            device=str(info.device),
            backend=info.backend,
            strategy=job.strategy.name,
            dataset_fingerprints={"train": fingerprint},
            **counts,
            resumed_from_step=resumed_step,
        )
        job.run_dir.cut_metrics(metrics_size)
        add_log_file(job.run_dir.log_path)

    run_on_main(write)
    if hidden := secret_keys(job.cfg):
        log.info("secrets are not written down; config.yaml says how to give them again: %s", ", ".join(hidden))
