"""The models of a recipe: the trained one and the frozen ones, loaded, adapted, wrapped or sharded."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from automodel.distributed.parallel.precision import convert_weights_
from automodel.distributed.runtime.agreement import run_on_all_ranks, run_on_main
from automodel.distributed.runtime.first_rank import FirstRankPerNode
from automodel.distributed.runtime.watchdog import set_phase
from automodel.logs import get_logger, warn_for_all
from automodel.models.adapters import LoRA, described, merge_problem
from automodel.models.embeddings import new_token_ids
from automodel.models.hf import HFModel, held_in
from automodel.models.sharded_loading import unfilled_model
from automodel.runner.build import build
from automodel.runner.job import Job
from automodel.train.rng import seed_everything

log = get_logger(__name__)


@dataclass(frozen=True)
class TrainedModel:
    """The model that is trained.

    Attributes:
        module: wrapped or sharded, on its device.
        load_base: loads it again as it was before training, without adapters.
        weights_fingerprint: of the pretrained files; None for fresh weights.
    """

    module: nn.Module
    load_base: Callable[[], PreTrainedModel]
    weights_fingerprint: str | None


def load_tokenizer(source: Any) -> PreTrainedTokenizerBase:
    """Download what the ``model`` section names, once per node, and load its tokenizer on every rank."""
    with FirstRankPerNode() as is_first:
        if is_first:
            source.download()
        return source.load_tokenizer()


def build_model(job: Job, source: Any, tokenizer: PreTrainedTokenizerBase, *, task: Any) -> TrainedModel:
    """Load the model of ``source``, add the adapters of ``peft``, and wrap or shard it; every rank must call it.

    With a strategy that shards pretrained weights, each rank reads only its own shards, after sharding; otherwise
    every rank first loads the whole model. Afterwards data-parallel ranks draw random numbers of their own.
    """
    set_phase("loading the model")
    info, adapters = job.dist_info, build(job.cfg.peft)
    source = held_in(source, job.precision.held)
    load_base = partial(source.build, tokenizer, task=task, **_loading_options(adapters))
    fingerprint = run_on_main(source.weights_fingerprint) if isinstance(source, HFModel) else None
    device, unfilled = job.strategy.device_of_shards(info), None
    if device is not None and info.world_size > 1:
        unfilled = unfilled_model(source, tokenizer, task=task, adapters=adapters)
    seed_everything(job.cfg.rng.seed)

    def load() -> nn.Module:
        if unfilled is not None:
            model = unfilled.adapted(adapters, task=task)
        else:
            model = load_base()
            if adapters is not None:
                model = adapters.apply(model, task=task, new_token_ids=new_token_ids(source, tokenizer))
        convert_weights_(model, job.precision.trained, only_trained=True)
        return model

    model = run_on_all_ranks(load)
    if isinstance(adapters, LoRA):
        adapters.start(model)
    if adapters is not None:
        log.info("%s", described(model))
        problem = merge_problem(model)
        if problem is not None:
            warn_for_all(log, "%s", problem)
    model = job.strategy.parallelize(model, dist_info=info, mesh=job.mesh)
    if unfilled is not None:
        run_on_all_ranks(lambda: unfilled.fill(model, device))
    seed_everything(job.cfg.rng.seed, rank=job.dp.rank)
    return TrainedModel(model, load_base, fingerprint)


def _loading_options(adapters: Any) -> dict[str, Any]:
    return adapters.loading_options() if isinstance(adapters, LoRA) else {}


def build_frozen_models(
    job: Job, sections: Mapping[str, Mapping[str, Any] | None], tokenizer: PreTrainedTokenizerBase, *, task: Any
) -> dict[str, nn.Module]:
    """Load the frozen models of a recipe by name; sharded where the strategy shards. Every rank must call it.

    Args:
        sections: as in ``Recipe.frozen_models``.
    """
    return {name: _frozen_model(job, name, section, tokenizer, task) for name, section in sections.items()}


def _frozen_model(
    job: Job, name: str, section: Mapping[str, Any] | None, tokenizer: PreTrainedTokenizerBase, task: Any
) -> nn.Module:
    set_phase(f"loading the frozen model {name}")
    source = held_in(build(job.cfg.model if section is None else section), job.precision.computed)
    with FirstRankPerNode() as is_first:
        if is_first:
            source.download()
    seed_everything(job.cfg.rng.seed)
    model = run_on_all_ranks(lambda: source.build(tokenizer, task=task)).requires_grad_(False)
    if job.strategy.is_sharded:
        return job.strategy.parallelize(model, dist_info=job.dist_info, mesh=job.mesh).eval()
    return model.to(job.dist_info.device).eval()
