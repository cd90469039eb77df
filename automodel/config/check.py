"""Check what no single key can show: combinations, files, and the world the run starts in."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from automodel.capabilities import ABOUT_DATASETS, CHAT_TEMPLATES, ROW_SUFFIXES
from automodel.config.check_launch import check_launch
from automodel.config.check_model import check_model
from automodel.config.names import did_you_mean
from automodel.config.schema import Config
from automodel.environment import environment_problems

BACKENDS = ("auto", "nccl", "gloo", "xccl", "ccl", "hccl", "mpi")


def cross_checks(cfg: Config, env: Mapping[str, str] = os.environ) -> list[str]:
    """Return every problem found with the whole of ``cfg``, a line each."""
    checks: tuple[Callable[[Config], Iterator[str]], ...] = (
        _check_backend,
        _check_strategy,
        _check_precision,
        _check_adapters,
        check_model,
        _check_datasets,
        _check_validation_share,
        _check_training_rows,
        _check_evaluation,
        _check_numbers,
        _check_checkpoint,
        check_launch,
    )
    problems = [*_check_world(cfg, env)]
    for check in checks:
        problems += check(cfg)
    return problems


def world_size_of(cfg: Config, env: Mapping[str, str]) -> int:
    """Return the number of ranks that the run will have: the environment's, or what ``launch`` starts."""
    if "RANK" in env:
        return int(env["WORLD_SIZE"])
    if "SLURM_PROCID" in env and "SLURM_STEP_ID" in env:
        return int(env.get("SLURM_NTASKS", "1"))
    num_nodes, ranks = cfg.launch.get("nodes", 1), cfg.launch.get("nproc_per_node", 1)
    return num_nodes * ranks if _is_count(num_nodes) and _is_count(ranks) else 1  # told with the options of launch


def _check_world(cfg: Config, env: Mapping[str, str]) -> Iterator[str]:
    problems = environment_problems(env)
    if problems:
        yield from problems
        return
    num_ranks = cfg.launch.get("nproc_per_node", 1)
    if isinstance(num_ranks, int) and num_ranks < 1:
        yield f"launch.nproc_per_node={num_ranks} must be at least 1"
        return
    world_size = world_size_of(cfg, env)
    tp_size, replicas = (cfg.distributed.get(key, 1) for key in ("tp_size", "dp_replicate_size"))
    if not (_is_count(tp_size) and _is_count(replicas)):
        return  # told with the options of the strategy
    if world_size % tp_size:
        yield f"distributed.tp_size={tp_size} must divide the number of ranks, {world_size}"
        return
    dp_size = world_size // tp_size
    if dp_size % replicas:
        ranks = "ranks" if tp_size == 1 else f"data-parallel ranks ({world_size} / tp_size {tp_size})"
        yield f"distributed.dp_replicate_size={replicas} must divide the number of {ranks}, {dp_size}"
    steps = cfg.step_scheduler
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


def _check_strategy(cfg: Config) -> Iterator[str]:
    options = cfg.distributed
    for key in ("tp_size", "dp_replicate_size", "num_prefetched_layers"):
        value = options.get(key, 1)
        if isinstance(value, int) and value < 1:
            yield f"distributed.{key}={value} must be at least 1"
    if options.get("sequence_parallel") and options.get("tp_size") == 1:
        yield "distributed.sequence_parallel=true splits what tensor parallel leaves whole: set distributed.tp_size"
    if options.get("shard_optimizer_over_replicas"):
        if options.get("dp_replicate_size") == 1:
            yield "distributed.shard_optimizer_over_replicas=true needs replicas: set distributed.dp_replicate_size"
        if options.get("zero_stage") != 3:
            yield "distributed.shard_optimizer_over_replicas=true needs distributed.zero_stage=3"
    if str(options.get("_target_")).endswith(".MegatronFSDP") and find_spec("megatron_fsdp") is None:
        yield "distributed=megatron_fsdp needs the package megatron-fsdp: pip install 'automodel[megatron]'"


def _check_precision(cfg: Config) -> Iterator[str]:
    precision, dtype = cfg.distributed.get("mixed_precision"), cfg.model.get("dtype")
    if precision == "pure_bf16" and cfg.peft is not None:
        yield "distributed.mixed_precision=pure_bf16: adapters are trained in float32; choose bf16 with peft"
    if precision == "pure_bf16" and dtype == "float32":
        yield "distributed.mixed_precision=pure_bf16 trains bf16 weights, not model.dtype=float32: choose bf16"
    if precision == "float32" and dtype == "bfloat16" and cfg.peft is not None:
        yield (
            "distributed.mixed_precision=float32 cannot compute in float32 with the frozen weights of "
            "model.dtype=bfloat16: leave one of them at auto"
        )


def _check_adapters(cfg: Config) -> Iterator[str]:
    adapters = cfg.peft
    if adapters is None:
        return
    for key in ("rank", "alpha"):
        value = adapters.get(key, 1)
        if isinstance(value, int | float) and value <= 0:
            yield f"peft.{key}={value} must be more than 0"
    dropout = adapters.get("dropout", 0)
    if isinstance(dropout, int | float) and not 0 <= dropout < 1:
        yield f"peft.dropout={dropout} must lie in [0, 1)"
    if adapters.get("use_dora") and cfg.distributed.get("tp_size", 1) != 1:
        yield "peft.use_dora=true needs the norms of whole weights, which distributed.tp_size splits: use peft=lora"
    if str(cfg.model.get("_target_")).endswith((".DemoModel", ".ScratchModel")):
        yield "peft trains adapters on pretrained weights, and this model has fresh ones: choose model=hf, or peft=none"


def _check_backend(cfg: Config) -> Iterator[str]:
    backend = cfg.dist_env.backend
    for pair in backend.split(","):
        device, separator, name = pair.rpartition(":")
        if (separator and not device.strip()) or name.strip() not in BACKENDS or (device and name == "auto"):
            known = f"must be one of {', '.join(BACKENDS)}, or some by device as cpu:gloo,cuda:nccl"
            yield f"dist_env.backend={backend} {known}{did_you_mean(name, BACKENDS)}"
            return


def _check_datasets(cfg: Config) -> Iterator[str]:
    for name in ("dataset", "validation_dataset"):
        section = getattr(cfg, name) or {}
        if str(section.get("_target_")).endswith((".FileDataset", ".JsonlDataset")):
            paths = section.get("path")
            for path in paths if isinstance(paths, list) else [paths]:
                yield from _check_file(f"{name}.path", path)
            if paths == []:
                yield f"{name}.path=[] names no file"
        for key in ("limit", "max_length", "num_proc", "buffer_rows"):
            value = section.get(key)
            if isinstance(value, int) and not isinstance(value, bool) and value < 1:
                yield f"{name}.{key}={value} must be at least 1"
        choice = section.get("chat_template")
        if isinstance(choice, str) and choice not in CHAT_TEMPLATES and not Path(choice).expanduser().is_file():
            yield f"{name}.chat_template={choice} is neither a file nor one of: {', '.join(CHAT_TEMPLATES)}"


def _is_validated(cfg: Config) -> bool:
    return cfg.validation_dataset is not None or cfg.dataset.get("validation_share") is not None


def _check_validation_share(cfg: Config) -> Iterator[str]:
    validation_set = cfg.validation_dataset or {}
    if validation_set.get("validation_share") is not None:
        yield "validation_dataset.validation_share: rows of the training set are set aside by dataset.validation_share"
    for name, keys in _mixed(cfg.dataset.get("sources")):
        if keys.get("validation_share") is not None:
            yield f"dataset.sources.{name}.validation_share: a mixture has none; choose a validation_dataset"
    share = cfg.dataset.get("validation_share")
    if not isinstance(share, int | float) or isinstance(share, bool):
        return
    what = f"dataset.validation_share={share:g}"
    if not 0 < share < 1:
        yield f"{what} must be above 0 and below 1, such as 0.05"
    if validation_set:
        yield f"{what} and a validation_dataset: choose one of them"
    if cfg.dataset.get("streaming"):
        yield f"{what} does not go with dataset.streaming=true, not known ahead; use a validation_dataset"


def _mixed(sources: Any) -> list[tuple[str, dict[str, Any]]]:
    tables = sources.items() if isinstance(sources, dict) else ()
    return [(name, keys) for name, keys in tables if isinstance(keys, dict)]


def _check_file(key: str, path: Any) -> Iterator[str]:
    import glob

    if not isinstance(path, str) or path == "???":
        return
    file = Path(path).expanduser()
    if file.is_dir():
        if not _row_files(file):
            yield f"{key}={path}: {_what_else(file)}"
    elif file.exists():
        if not os.access(file, os.R_OK):
            yield f"{key}={path} cannot be read"
        elif file.is_file() and file.stat().st_size == 0:
            yield f"{key}={path} is empty"
    elif not glob.glob(str(file)):
        yield f"{key}={path}: there is no such file"


def _row_files(folder: Path, pattern: str = "*") -> list[Path]:
    names = (each for each in folder.glob(pattern) if each.name not in ABOUT_DATASETS and not each.name.startswith("."))
    return sorted(each for each in names if each.name.lower().removesuffix(".gz").endswith(ROW_SUFFIXES))


def _what_else(folder: Path) -> str:
    """Say what a folder without rows is, and what to do."""
    if any(folder.glob("*.arrow")) or any(folder.glob("*/*.arrow")):
        return (
            "a folder of Dataset.save_to_disk, whose Arrow files are not read; write it as Parquet: "
            "datasets.load_from_disk(FOLDER).to_parquet(FILE) (of several splits, each by itself)"
        )
    below = _row_files(folder, "**/*")
    if below:
        folders = ", ".join(sorted({str(each.parent.relative_to(folder)) for each in below})[:5])
        return (
            f"the folder has no file of rows itself, but folders below it have ({folders}); name one of them, or all "
            f"by a glob: {folder}/**/*{below[0].suffix}"
        )
    return f"the folder has no file of rows ({', '.join(ROW_SUFFIXES)}; each may have .gz as well)"


def _check_training_rows(cfg: Config) -> Iterator[str]:
    packing, loader, steps = cfg.packing, cfg.dataloader, cfg.step_scheduler
    if packing.enabled and not cfg.recipe.packs:
        yield f"packing.enabled=true does not apply to recipe={cfg.recipe.name}"
    if loader.max_tokens_per_batch is not None and packing.enabled:
        yield "dataloader.max_tokens_per_batch and packing.enabled=true: choose one, packs are of one length already"
    if not cfg.dataset.get("streaming"):
        return
    if steps.max_steps is None:
        yield "dataset.streaming=true needs step_scheduler.max_steps: the end of a stream is not known"
    if cfg.recipe.name == "llm_seq_cls":
        yield "dataset.streaming=true does not apply to recipe=llm_seq_cls, which must know all labels"
    for key in ("length_grouped", "max_tokens_per_batch"):
        if getattr(loader, key):
            yield f"dataloader.{key} does not go with dataset.streaming=true, whose lengths are not known ahead"


def _check_evaluation(cfg: Config) -> Iterator[str]:
    kind = "generation" if cfg.evaluation else "loss"
    if kind not in cfg.recipe.evaluations:
        offered = ", ".join(cfg.recipe.evaluations)
        yield f"evaluation={kind} does not apply to recipe={cfg.recipe.name}; it has: {offered}"
    if not _is_validated(cfg):
        if cfg.evaluation:
            yield "evaluation=generation needs rows to answer: a validation_dataset, or dataset.validation_share"
        if isinstance(cfg.step_scheduler.val_every_steps, int):
            yield "step_scheduler.val_every_steps is set, but there is no validation_dataset"


def _check_numbers(cfg: Config) -> Iterator[str]:
    lr = cfg.optimizer.get("lr")
    if isinstance(lr, int | float) and not isinstance(lr, bool) and lr <= 0:
        yield f"optimizer.lr={lr} must be more than 0"
    betas = cfg.optimizer.get("betas")
    if isinstance(betas, list) and any(isinstance(beta, int | float) and not 0 <= beta < 1 for beta in betas):
        yield f"optimizer.betas={betas} must lie in [0, 1)"
    for key in ("warmup_ratio", "min_lr_ratio"):
        ratio = cfg.lr_scheduler.get(key)
        if isinstance(ratio, int | float) and not 0 <= ratio <= 1:
            yield f"lr_scheduler.{key}={ratio} must lie in [0, 1]"
    warmup_steps = cfg.lr_scheduler.get("warmup_steps")
    if isinstance(warmup_steps, int) and warmup_steps < 0:
        yield f"lr_scheduler.warmup_steps={warmup_steps} must be at least 0"


def _check_checkpoint(cfg: Config) -> Iterator[str]:
    yield from _check_keep_best(cfg)
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
        yield f"checkpoint.keep_best={best} must be min:NAME or max:NAME, as min:loss or max:metric/exact_match"
    if not _is_validated(cfg):
        yield f"checkpoint.keep_best={best} needs a validation_dataset"
    save, validate = cfg.step_scheduler.ckpt_every_steps, cfg.step_scheduler.val_every_steps
    if isinstance(save, int) and validate != "auto" and (validate is None or save % validate):
        yield (
            f"checkpoint.keep_best={best} chooses among checkpoints of steps that are validated: "
            f"step_scheduler.val_every_steps={'null' if validate is None else validate} must divide "
            f"step_scheduler.ckpt_every_steps={save}"
        )
