"""Check what no single key can show: the fixed sections together, and the environment that the run starts in.

What an option's keys need is known to its own class or function; see ``config/targets.py``.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from automodel.config.names import did_you_mean
from automodel.config.schema import Config
from automodel.environment import environment_problems

BACKENDS = ("auto", "nccl", "gloo", "xccl", "ccl", "hccl", "mpi")


def cross_checks(cfg: Config, env: Mapping[str, str] = os.environ) -> list[str]:
    """Return every problem with the environment and the fixed sections of ``cfg``, a line each."""
    checks: tuple[Callable[[Config], Iterator[str]], ...] = (
        _check_backend,
        _check_recipe,
        _check_dataloader,
        _check_validation,
        _check_checkpoint,
        _check_keep_best,
    )
    problems = [*environment_problems(env), *_check_batch(cfg, world_size_of(cfg, env))]
    for check in checks:
        problems += check(cfg)
    return problems


def world_size_of(cfg: Config, env: Mapping[str, str]) -> int | None:
    """Return the number of ranks: the environment's, or what ``launch`` starts; None if the environment is wrong."""
    if environment_problems(env):
        return None
    if "RANK" in env:
        return int(env["WORLD_SIZE"])
    if "SLURM_PROCID" in env and "SLURM_STEP_ID" in env:
        return int(env.get("SLURM_NTASKS", "1"))
    num_nodes, ranks = cfg.launch.get("nodes", 1), cfg.launch.get("nproc_per_node", 1)
    return num_nodes * ranks if _is_count(num_nodes) and _is_count(ranks) else 1  # the launcher reports wrong ones


def _check_batch(cfg: Config, world_size: int | None) -> Iterator[str]:
    tp_size, steps = cfg.distributed.get("tp_size", 1), cfg.step_scheduler
    if world_size is None or not _is_count(tp_size) or world_size % tp_size:
        return  # reported by the environment's check, or by the strategy
    dp_size = world_size // tp_size
    unit = steps.local_batch_size * dp_size
    if steps.global_batch_size % unit:
        below = steps.global_batch_size // unit * unit
        choices = " or ".join(str(size) for size in (below, below + unit) if size)
        yield (
            f"step_scheduler.global_batch_size={steps.global_batch_size} is not divisible by local_batch_size "
            f"{steps.local_batch_size} x data-parallel size {dp_size}; use {choices}"
        )


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _check_backend(cfg: Config) -> Iterator[str]:
    backend = cfg.dist_env.backend
    for pair in backend.split(","):
        device, separator, name = pair.rpartition(":")
        if (separator and not device.strip()) or name.strip() not in BACKENDS or (device and name == "auto"):
            known = f"must be one of {', '.join(BACKENDS)}, or several by device such as cpu:gloo,cuda:nccl"
            yield f"dist_env.backend={backend} {known}{did_you_mean(name, BACKENDS)}"
            return


def _check_recipe(cfg: Config) -> Iterator[str]:
    recipe = cfg.recipe
    if cfg.packing.enabled and not recipe.packs:
        yield f"packing.enabled=true does not apply to recipe={recipe.name}"
    if cfg.evaluation and "generation" not in recipe.evaluations:
        offered = ", ".join(recipe.evaluations)
        yield f"evaluation=generation does not apply to recipe={recipe.name}, which offers: {offered}"


def _check_dataloader(cfg: Config) -> Iterator[str]:
    if cfg.dataloader.max_tokens_per_batch is not None and cfg.packing.enabled:
        yield "dataloader.max_tokens_per_batch and packing.enabled=true: choose one; packs already have one length"


def _check_validation(cfg: Config) -> Iterator[str]:
    if not cfg.is_validated and isinstance(cfg.step_scheduler.val_every_steps, int):
        yield "step_scheduler.val_every_steps is set, but there is no validation_dataset"


def _check_checkpoint(cfg: Config) -> Iterator[str]:
    resume = cfg.checkpoint.resume
    has_own = cfg.output_dir is not None and Path(cfg.output_dir, "checkpoints", "latest").exists()
    if resume not in ("auto", "never") and not Path(resume).is_dir() and not has_own:
        yield f"checkpoint.resume={resume} must be auto, never, or the folder of a checkpoint; there is no such folder"
    if cfg.output_dir is not None and Path(cfg.output_dir).exists() and not Path(cfg.output_dir).is_dir():
        yield f"output_dir={cfg.output_dir} is a file, not a folder"


def _check_keep_best(cfg: Config) -> Iterator[str]:
    best = cfg.checkpoint.keep_best
    if best is None:
        return
    direction, _, name = best.partition(":")
    if direction not in ("min", "max") or not name:
        yield f"checkpoint.keep_best={best} must be min:NAME or max:NAME, such as min:loss or max:metric/exact_match"
    if not cfg.is_validated:
        yield f"checkpoint.keep_best={best} needs a validation_dataset"
    save, validate = cfg.step_scheduler.ckpt_every_steps, cfg.step_scheduler.val_every_steps
    if isinstance(save, int) and validate != "auto" and (validate is None or save % validate):
        yield (
            f"checkpoint.keep_best={best} compares checkpoints by their validation: "
            f"step_scheduler.val_every_steps={'null' if validate is None else validate} must divide "
            f"step_scheduler.ckpt_every_steps={save}"
        )
