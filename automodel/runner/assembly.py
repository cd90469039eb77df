"""Everything that a recipe trains with, built but not started: nothing is written by it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from automodel.data.batches.collate import PackedCollator
from automodel.data.batches.loader import Collate, Loader
from automodel.data.prepare.checks import settle
from automodel.distributed.parallel.handle import unwrap
from automodel.distributed.runtime.agreement import run_on_all_ranks
from automodel.distributed.runtime.first_rank import FirstRankPerNode
from automodel.distributed.runtime.watchdog import set_phase
from automodel.losses.cross_entropy import forward_logits
from automodel.losses.objective import Objective, as_objective
from automodel.models.hf import pad_token_id, stop_at
from automodel.models.isolation import require_isolation
from automodel.optim.optimizers import build_optimizer
from automodel.runner.build import build
from automodel.runner.evaluations import ValidationSet
from automodel.runner.job import Job
from automodel.runner.models import TrainedModel, build_frozen_models, build_model, load_tokenizer
from automodel.runner.recipe import Parts, Recipe
from automodel.runner.training_data import TrainingData, load_data
from automodel.train.step_scheduler import StepScheduler
from automodel.types import UserError


@dataclass
class Assembly:
    """The parts of a run on this rank.

    Attributes:
        source: what the ``model`` section builds.
        validation: None without validation rows.
        facts: what decides the training, compared with those of a checkpoint before it is resumed.
    """

    job: Job
    source: Any
    tokenizer: PreTrainedTokenizerBase
    data: TrainingData
    model: nn.Module
    load_base: Callable[[], PreTrainedModel]
    objective: Objective
    loader: Loader
    validation: ValidationSet | None
    steps: StepScheduler
    optimizer: torch.optim.Optimizer
    lr_scheduler: torch.optim.lr_scheduler.LRScheduler
    facts: dict[str, Any]

    @property
    def begins_with_evaluation(self) -> bool:
        """Whether a fresh run is evaluated before its first step."""
        return self.validation is not None and (bool(self.job.cfg.evaluation) or self.steps.val_every_steps == "auto")


def assemble(job: Job, recipe: Recipe) -> Assembly:
    """Build everything up to the first step, as ``job.cfg`` says; every rank must call it."""
    cfg = job.cfg
    set_phase("loading the rows")
    source = build(cfg.model)
    tokenizer = load_tokenizer(source)
    with FirstRankPerNode():
        data = load_data(cfg, recipe.task, source, tokenizer)
    settle(data.problems(), cfg.data_checks)
    task = data.task
    frozen = build_frozen_models(job, recipe.frozen_models, tokenizer, task=task)
    trained = build_model(job, source, tokenizer, task=task)
    model = trained.module
    if data.stops.ids:
        stop_at(unwrap(model), tokenizer, data.stops.ids)
    objective = as_objective(recipe.objective(Parts(task, tokenizer, model, frozen, build(cfg.loss_fn))))
    collate = task.collator(tokenizer, job.strategy.length_multiple)
    validation = None
    if data.validation is not None:
        validation = ValidationSet(job, model, tokenizer, data=data, objective=objective, collate=collate)
    loader = data.loader(job, collate if data.pack_length is None else _packed_collator(job, model, tokenizer))
    steps = _steps(job, loader, is_validated=validation is not None)
    optimizer = build_optimizer(build(cfg.optimizer), model, lr_ratio=(cfg.peft or {}).get("lr_ratio"))
    job.strategy.prepare_optimizer(optimizer, model)
    return Assembly(
        job=job,
        source=source,
        tokenizer=tokenizer,
        data=data,
        model=model,
        load_base=trained.load_base,
        objective=objective,
        loader=loader,
        validation=validation,
        steps=steps,
        optimizer=optimizer,
        lr_scheduler=build(cfg.lr_scheduler)(optimizer, steps.total_steps),
        facts=_facts(data, trained),
    )


def _steps(job: Job, loader: Loader, *, is_validated: bool) -> StepScheduler:
    cfg = job.cfg
    steps = StepScheduler(
        steps_per_epoch=loader.steps_per_epoch,
        **cfg.step_scheduler.model_dump(exclude={"global_batch_size", "local_batch_size"}),
        keeps_best=cfg.checkpoint.keep_best is not None,
    )
    if not is_validated:
        steps.val_every_steps = None
    return steps


def _facts(data: TrainingData, trained: TrainedModel) -> dict[str, Any]:
    facts = {"dataset fingerprint": data.fingerprint} | data.task.facts()
    if trained.weights_fingerprint is not None:
        facts["base weights"] = trained.weights_fingerprint
    return facts


def _packed_collator(job: Job, model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> Collate:
    """Return the collator for packed rows, once a test has shown that this model keeps their documents apart."""
    set_phase("checking that packed documents do not see each other")
    device, attention = job.dist_info.device, unwrap(model).config._attn_implementation
    collate = PackedCollator(pad_token_id(tokenizer), job.strategy.length_multiple, attention)
    if attention == "flex_attention" and device.type == "cpu":
        raise UserError("model.attn_implementation=flex_attention has no backward on a CPU; choose sdpa")
    run_on_all_ranks(
        lambda: require_isolation(
            model,
            collate=collate,
            forward=forward_logits,
            vocab_size=len(tokenizer),
            device=device,
            autocast=job.autocast,
            attention=attention,
        )
    )
    return collate
