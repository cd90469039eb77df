"""Training checkpoints: all that is needed to go on, visible only once complete."""

from __future__ import annotations

import json
import os
import pickle
import re
import shutil
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict

from automodel.distributed.megatron_fsdp import describe_uneven_shards
from automodel.distributed.ordering import run_on_main
from automodel.distributed.wrappers import is_megatron_fsdp, unwrap
from automodel.logs import get_logger
from automodel.types import UserError

log = get_logger(__name__)

MANIFEST = "manifest.json"
PROGRESS = "progress.json"
_STEP_FOLDER = re.compile(r"step_(\d{8})")


class SaveError(RuntimeError):
    """A checkpoint could not be written; those before it are as they were."""


@dataclass
class TrainState:
    """The objects whose state a checkpoint holds."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    lr_scheduler: torch.optim.lr_scheduler.LRScheduler


class Checkpointer:
    """Writes ``checkpoints/step_XXXXXXXX`` under a run directory and keeps the newest few."""

    def __init__(self, folder: Path, *, keep_last: int | None) -> None:
        self.folder = folder
        self.keep_last = keep_last

    def save(self, state: TrainState, *, progress: dict[str, Any], rng: dict[str, Any]) -> Path:
        """Write a complete checkpoint of step ``progress["step"]``, then move ``latest`` to it.

        Every rank must call it.

        Args:
            progress: small JSON facts: ``step``, the length of the metrics file, what decides the data's order.
            rng: the state of this rank's random generators.

        Raises:
            SaveError: on every rank, where any of them could not write.
        """
        final = self.folder / f"step_{progress['step']:08d}"
        partial = self.folder / f".{final.name}.partial"
        run_on_main(lambda: _make_empty(partial))
        try:
            dcp.save(_app_state(state) | {f"rng_{dist.get_rank()}": pickle.dumps(rng)}, checkpoint_id=partial)
            run_on_main(lambda: self._publish(partial, final, progress))
        except (Exception, dcp.api.CheckpointException) as error:  # the latter is no Exception
            free_mib = shutil.disk_usage(self.folder).free // 2**20
            shutil.rmtree(partial, ignore_errors=True)  # it would only take room
            raise SaveError(
                f"checkpoint {final} could not be written, with {free_mib} MiB free on its disk; "
                "the checkpoints before it are untouched"
            ) from error
        return final

    def _publish(self, partial: Path, final: Path, progress: dict[str, Any]) -> None:
        (partial / PROGRESS).write_text(json.dumps(progress | {"world_size": dist.get_world_size()}, indent=2))
        files = sorted(path for path in partial.rglob("*") if path.is_file())
        manifest = {str(path.relative_to(partial)): _size_and_checksum(path) for path in files}
        (partial / MANIFEST).write_text(json.dumps(manifest, indent=2))
        for path in [*files, partial / MANIFEST, partial]:
            _sync(path)
        if final.exists():
            shutil.rmtree(final)
        partial.rename(final)
        _sync(self.folder)
        _point(self.folder / "latest", final.name)
        self._prune()

    def _prune(self) -> None:
        if self.keep_last is not None:
            for folder in _step_folders(self.folder)[: -self.keep_last]:
                shutil.rmtree(folder)


def newest_checkpoint(folder: Path) -> Path | None:
    """Return the newest complete checkpoint under ``folder``, or None; says why it passes over a newer one.

    Every rank must call it; rank 0 looks.
    """
    return run_on_main(lambda: _newest_complete(folder))


def load_checkpoint(folder: Path, state: TrainState) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """Put the state saved in ``folder`` in place; every rank must call it.

    Returns:
        (progress as saved, this rank's random state or None where it was saved on fewer ranks).

    Raises:
        UserError: the folder is incomplete or damaged, or belongs to another model.
    """
    problem = run_on_main(lambda: damage(folder))
    if problem:
        raise UserError(f"checkpoint.resume={folder}: {problem}")
    progress = read_progress(folder)
    app = _app_state(state)
    own_rng = f"rng_{dist.get_rank()}"
    if dist.get_rank() < progress["world_size"]:
        app[own_rng] = b""
    try:
        dcp.load(app, checkpoint_id=folder)
    except dcp.api.CheckpointException as error:
        first = next(iter(error.failures.values()))[0]
        raise UserError(f"checkpoint.resume={folder} does not fit this model: {first}") from error
    set_state_dict(
        _named_model(state.model),
        state.optimizer,
        model_state_dict=app["model"],
        optim_state_dict=app["optimizer"],
        options=_options(state.model),
    )
    saved = app["lr_scheduler"]
    for key in ("base_lrs", "_last_lr"):  # one for each parameter group, all alike; another layout may cut more groups
        saved[key] = saved[key][:1] * len(state.optimizer.param_groups)
    state.lr_scheduler.load_state_dict(saved)
    return progress, pickle.loads(app[own_rng]) if own_rng in app else None


def read_progress(folder: Path) -> dict[str, Any]:
    """Return the small facts of a checkpoint: ``step``, ``world_size``, ``metrics_size``, what decides the rows.

    Raises:
        UserError: there are none, so that this is no complete checkpoint.
    """
    try:
        return json.loads((folder / PROGRESS).read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"checkpoint.resume={folder}: not a complete training checkpoint ({error})") from error


def damage(folder: Path) -> str | None:
    """Return what is wrong with a checkpoint folder, or None when every file is as it was written."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
    except FileNotFoundError:
        return f"no {MANIFEST}: the save was not finished, or this is no checkpoint of ours"
    except ValueError:
        return f"{MANIFEST} is damaged"
    for name, expected in manifest.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != expected["size"]:
            return f"{name} has {path.stat().st_size} bytes instead of {expected['size']}"
        if _size_and_checksum(path) != expected:
            return f"{name} is damaged: its checksum differs"
    return None


def _step_folders(folder: Path) -> list[Path]:
    found = folder.iterdir() if folder.is_dir() else ()
    return sorted(path for path in found if _STEP_FOLDER.fullmatch(path.name))


def _newest_complete(folder: Path) -> Path | None:
    for candidate in reversed(_step_folders(folder)):
        problem = damage(candidate)
        if problem is None:
            return candidate
        log.warning("%s is passed over: %s", candidate, problem)
    return None


def _app_state(state: TrainState) -> dict[str, Any]:
    model, optimizer = get_state_dict(_named_model(state.model), state.optimizer, options=_options(state.model))
    for name, parameter in unwrap(state.model).named_parameters(remove_duplicate=False):
        if not parameter.requires_grad:
            model.pop(name, None)  # the second name of a tied weight, which torch does not know to be frozen
    app = {"model": model, "optimizer": optimizer, "lr_scheduler": state.lr_scheduler.state_dict()}
    if is_megatron_fsdp(state.model):
        describe_uneven_shards(app)
    return app


def _options(model: nn.Module) -> StateDictOptions:
    """Return what a checkpoint holds: the weights that are trained alone, where others are frozen."""
    has_frozen = any(not parameter.requires_grad for parameter in model.parameters())
    return StateDictOptions(
        flatten_optimizer_state_dict=True,  # by parameter, not by group, which other layouts may cut otherwise
        ignore_frozen_params=has_frozen,
        strict=not has_frozen,
    )


def _named_model(model: nn.Module) -> nn.Module:
    """Return the module that gives every weight the same name whatever the strategy; torch's own are seen through."""
    return model.module if is_megatron_fsdp(model) else model


def _make_empty(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)


def _size_and_checksum(path: Path) -> dict[str, int]:
    checksum = 0
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            checksum = zlib.crc32(block, checksum)
    return {"size": path.stat().st_size, "crc32": checksum}


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _point(link: Path, name: str) -> None:
    """Make ``link`` a symbolic link to its neighbour ``name``, in one step."""
    new = link.with_name(".latest.new")
    new.unlink(missing_ok=True)
    new.symlink_to(name)
    new.replace(link)
