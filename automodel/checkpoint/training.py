"""Training checkpoints: everything needed to resume, published only once complete."""

from __future__ import annotations

import inspect
import json
import os
import re
import shutil
import threading
import time
from concurrent.futures import Future
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict

from automodel.checkpoint.manifest import damage_seen_by_all, seal, sync
from automodel.checkpoint.retention import Retention, delete
from automodel.checkpoint.room import free_room
from automodel.checkpoint.staging import HostCopy, num_bytes, share_of
from automodel.checkpoint.unpickling import PlainPlanner, PlainReader, hidden_code, plain
from automodel.distributed.parallel.handle import handle_of
from automodel.distributed.runtime.agreement import on_every_rank, run_on_all_ranks, run_on_main
from automodel.distributed.runtime.side_group import _create_gloo_group
from automodel.logs import get_logger, warn_for_all
from automodel.types import RunError, UserError

log = get_logger(__name__)

PROGRESS = "progress.json"
_STEP_FOLDER = re.compile(r"step_(\d{8})")


class SaveError(RunError):
    """A checkpoint could not be written; earlier checkpoints are untouched."""


class NoRoom(OSError):
    """The disk has less free space than the checkpoint takes."""


@dataclass
class TrainState:
    """The objects whose state a checkpoint holds."""

    model: nn.Module
    optimizer: torch.optim.Optimizer


class Checkpointer:
    """Writes ``checkpoints/step_XXXXXXXX`` under a run directory, one at a time, and deletes outdated ones.

    With ``is_async`` a save copies the state to host memory and returns; a thread writes it. The thread uses its own
    process group, since gloo and NCCL take collectives from one thread at a time. Every rank must create one.

    Args:
        on_error: after a failed write, ``stop`` raises; ``continue`` warns and waits for the next save.
        timeout_minutes: how long the ranks may wait for each other while writing.
    """

    def __init__(
        self,
        folder: Path,
        *,
        retention: Retention,
        is_async: bool = False,
        on_error: Literal["stop", "continue"] = "stop",
        timeout_minutes: float = 30,
    ) -> None:
        self.folder = folder
        self.retention = retention
        self.is_async = is_async
        self.on_error = on_error
        self._group = _create_gloo_group(timedelta(minutes=timeout_minutes))
        self._host_copy = HostCopy()
        self._write: Future[None] | None = None
        self.last_save_sec = 0.0  # from the call of save until it was written

    @property
    def must_stop(self) -> bool:
        """Whether the last write failed on this rank and training must stop because of it."""
        write = self._write
        return self.on_error == "stop" and write is not None and write.done() and write.exception() is not None

    def save(self, state: TrainState, *, progress: dict[str, Any], rng: dict[str, Any]) -> None:
        """Write a checkpoint of step ``progress["step"]``, then move ``latest`` to it; every rank must call it.

        It first waits for the previous write. With ``is_async`` it returns as soon as training may change the state.

        Args:
            progress: small JSON values: ``step``, the length of the metrics file, the position in the data.
            rng: the state of this rank's random generators, as JSON values.

        Raises:
            SaveError: on every rank, as ``finish`` does.
        """
        self.finish()
        started = time.monotonic()
        self._write = Future()
        final = self.folder / f"step_{progress['step']:08d}"
        app = _app_state(state)
        size = num_bytes(app)
        self._warn_of_missing_metric(progress.get("metrics", {}))
        try:
            app = run_on_all_ranks(lambda: plain(app))
            run_on_main(lambda: self._make_room(_partial(final), size))
        except Exception as error:
            self._fail(final, error)
            return self.finish()
        rank, world_size = dist.get_rank(), dist.get_world_size()
        app = share_of(app, rank=rank, world_size=world_size) | {f"rng_{rank}": json.dumps(rng)}
        staged = self._staged(app) if self.is_async else None
        if staged is not None:
            waited_sec = time.monotonic() - started
            device = torch.cuda.current_device() if torch.cuda.is_initialized() else None
            arguments = (device, staged, final, progress, waited_sec)
            try:
                threading.Thread(target=self._write_in_thread, args=arguments, name="checkpoint", daemon=True).start()
            except RuntimeError:  # no memory for a thread
                self._write_in_thread(*arguments)
        else:
            self._write_now(app, final, progress, 0.0)
            self.finish()

    def _staged(self, app: dict[str, Any]) -> dict[str, Any] | None:
        """Return a copy of ``app`` in host memory; None on every rank if one of them lacks the memory."""
        staged, reason = None, None
        try:
            staged = self._host_copy.make(app)
        except (MemoryError, RuntimeError) as error:  # torch raises either when memory is short
            reason = _first_words(error)
        reasons = on_every_rank(reason, group=self._group)
        if not any(reasons):
            return staged
        self._host_copy = HostCopy()  # frees the buffers of the old one
        rank, reason = next((rank, each) for rank, each in enumerate(reasons) if each)
        text = "rank %d has no host memory for a copy (%s): training waits for this checkpoint"
        warn_for_all(log, text, rank, reason)
        return None

    def finish(self, *, must_be_saved: bool = False) -> None:
        """Wait until the write in progress is complete on all ranks; every rank must call it.

        Args:
            must_be_saved: raise even if ``on_error`` is ``continue``, because no later save will make up for it.

        Raises:
            SaveError: on every rank, if any rank could not write.
        """
        if self._write is None:
            return
        error = self._write.exception()
        if error is not None and (must_be_saved or self.on_error == "stop"):
            raise error

    def _warn_of_missing_metric(self, metrics: dict[str, float]) -> None:
        name = self.retention.metric
        if name is not None and metrics and name not in metrics and dist.get_rank() == 0:
            log.warning(
                "checkpoint.keep_best=%s keeps nothing: validation does not measure %s; it measures: %s",
                self.retention.keep_best, name, ", ".join(metrics),
            )  # fmt: skip

    def _write_in_thread(self, device: int | None, *arguments: Any) -> None:
        if device is not None:
            torch.cuda.set_device(device)  # a thread starts on device 0, where torch's writer would take memory
        self._write_now(*arguments)

    def _write_now(self, app: dict[str, Any], final: Path, progress: dict[str, Any], waited_sec: float) -> None:
        started, write = time.monotonic(), self._write
        try:
            is_alone = dist.get_world_size() == 1  # collectives give gloo's threads OpenMP pools, which slow training
            dcp.save(app, checkpoint_id=_partial(final), process_group=self._group, no_dist=is_alone)
            run_on_main(lambda: _write_progress(_partial(final), progress), group=self._group)
            seal(_partial(final), group=self._group)
            run_on_main(lambda: self._publish(final, progress["step"]), group=self._group)
        except BaseException as error:  # torch's CheckpointException is no Exception, and finish must not wait forever
            self._fail(final, error)
            return
        took_sec = time.monotonic() - started
        self.last_save_sec = waited_sec + took_sec
        log.info("checkpoint %s; training waited %.2f s, writing took %.2f s", final, waited_sec or took_sec, took_sec)
        write.set_result(None)

    def _fail(self, final: Path, error: BaseException) -> None:
        """End the write with a SaveError."""
        shutil.rmtree(_partial(final), ignore_errors=True)  # it would only fill the disk
        reason = str(error) if isinstance(error, NoRoom) else f"{_first_words(error)}; {free_room(self.folder)}"
        failure = SaveError(
            f"checkpoint {final} could not be written: {reason}; the checkpoints before it are untouched"
        )
        failure.__cause__ = error
        if self.on_error == "continue" and dist.get_rank() == 0:
            log.warning("%s. Training continues (checkpoint.on_error=continue)", failure)
        self._write.set_exception(failure)

    def _make_room(self, partial: Path, size: int) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        for leftover in self.folder.glob(".step_*"):  # from a killed write or deletion
            shutil.rmtree(leftover)
        free = shutil.disk_usage(self.folder).free
        if free < size:
            raise NoRoom(f"it takes about {-(-size // 2**20)} MiB, but only {free // 2**20} MiB are free on its disk")
        partial.mkdir()

    def _publish(self, final: Path, step: int) -> None:
        """Rename the complete folder to its final name, then delete outdated checkpoints."""
        if final.exists():
            delete(final)
        _partial(final).rename(final)
        sync(self.folder)
        _point(self.folder / "latest", final.name)
        self._prune(step)

    def _prune(self, newest: int) -> None:
        folders = {int(_STEP_FOLDER.fullmatch(path.name)[1]): path for path in _step_folders(self.folder)}
        scores = {step: _score(path, self.retention.metric) for step, path in folders.items()}
        for step in self.retention.outdated(scores, newest=newest):
            try:
                delete(folders[step])
            except OSError as error:
                log.warning("%s could not be deleted: %s", folders[step], error)


def newest_checkpoint(folder: Path) -> Path | None:
    """Return the checkpoint that ``folder/latest`` names or, if it is damaged, the newest whole one before it, or None.

    Steps after ``latest`` are skipped: the run resumed from an earlier checkpoint and has saved since. The log says
    what is skipped and why. Every rank must call it and reads a share of each checkpoint.
    """
    named, candidates = run_on_main(lambda: (_named_by_latest(folder), _step_folders(folder)))
    for candidate in reversed(candidates):
        problem = f"{folder / 'latest'} names {named}" if named is not None and candidate.name > named else None
        problem = problem or _problem_seen_by_all(candidate)
        if problem is None:
            return candidate
        if dist.get_rank() == 0:
            log.warning("%s is skipped: %s", candidate, problem)
    return None


def require_whole(folder: Path) -> None:
    """Raise UserError on every rank if a checkpoint is incomplete, damaged or hides code; every rank must call it."""
    if problem := _problem_seen_by_all(folder):
        raise UserError(f"checkpoint.resume={folder}: {problem}")


def _problem_seen_by_all(folder: Path) -> str | None:
    """Return what is wrong with a checkpoint, the same on every rank; each rank reads a share."""
    if problem := damage_seen_by_all(folder):
        return problem
    found = on_every_rank(hidden_code(folder, share=(dist.get_rank(), dist.get_world_size())))
    return next(filter(None, found), None)


def load_checkpoint(folder: Path, state: TrainState) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """Load the complete checkpoint in ``folder`` into ``state``; every rank must call it.

    The optimizer keeps the options it was built with (learning rate, betas, fused, ...): they come from the
    configuration, and an implementation that suits one layout may not run in another.

    Returns:
        (progress as saved, this rank's random state or None if the checkpoint was saved on fewer ranks).

    Raises:
        UserError: the checkpoint belongs to another model.
    """
    progress = read_progress(folder)
    app = _app_state(state)
    options = _take_options(app["optimizer"], state.optimizer)
    own_rng = f"rng_{dist.get_rank()}"
    if dist.get_rank() < progress["world_size"]:
        app[own_rng] = ""
    try:
        dcp.load(app, storage_reader=PlainReader(folder), planner=PlainPlanner())
    except dcp.api.CheckpointException as error:
        first = next(iter(error.failures.values()))[0]
        raise UserError(_misfit(folder, str(first))) from error
    if isinstance(app.get(own_rng), bytes):
        raise UserError(
            f"checkpoint.resume={folder} was written by an older version, with random states in a pickle, which could "
            "run code and is not loaded: continue with that version, or export the model with python -m "
            "automodel.export"
        )
    set_state_dict(
        handle_of(state.model).plain_model,
        state.optimizer,
        model_state_dict=app["model"],
        optim_state_dict=app["optimizer"] | options,
        options=_options(state.model),
    )
    return progress, json.loads(app[own_rng]) if own_rng in app else None


def read_progress(folder: Path) -> dict[str, Any]:
    """Return the ``progress`` that a checkpoint was saved with, and its ``world_size``.

    Raises:
        UserError: it is missing or unreadable, so the checkpoint is not complete.
    """
    try:
        return json.loads((folder / PROGRESS).read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"checkpoint.resume={folder}: not a complete training checkpoint ({error})") from error


def _named_by_latest(folder: Path) -> str | None:
    """Return the name of the checkpoint saved last, which may have been deleted since."""
    link = folder / "latest"
    return os.readlink(link) if link.is_symlink() else None


def _step_folders(folder: Path) -> list[Path]:
    found = folder.iterdir() if folder.is_dir() else ()
    return sorted(path for path in found if _STEP_FOLDER.fullmatch(path.name))


def _app_state(state: TrainState) -> dict[str, Any]:
    handle = handle_of(state.model)
    model, optimizer = get_state_dict(handle.plain_model, state.optimizer, options=_options(state.model))
    for name, parameter in handle.plain_model.named_parameters(remove_duplicate=False):
        if not parameter.requires_grad:
            model.pop(name, None)  # the second name of a tied weight, which torch does not recognise as frozen
    app = {"model": model, "optimizer": optimizer}
    handle.describe_shards(app)
    return app


def _take_options(flat: dict[str, Any], optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Remove the options of the parameter groups from ``flat``, the optimizer's state, and return them.

    Options are the constructor's arguments, a schedule's initial rate and the mark of a group. Everything else in the
    groups, such as the step count of a schedule-free optimizer, is state.
    """
    taken = {*inspect.signature(type(optimizer)).parameters, "initial_lr", "is_hidden"}
    names = [key for key in flat if key.startswith("param_groups.") and key.rpartition(".")[2] in taken]
    return {name: flat.pop(name) for name in names}


def _misfit(folder: Path, error: str) -> str:
    """Explain why a checkpoint does not fit, from torch's message."""
    lacking = re.search(r"optimizer\.state\.(\S+)\.(\w+)", error)
    if lacking:
        return (
            f"checkpoint.resume={folder} has no optimizer state {lacking[2]}: it was saved with another optimizer or "
            "without momentum; restore that setting, or start a new run with another output_dir"
        )
    return f"checkpoint.resume={folder} does not fit this model: {error}"


def _options(model: nn.Module) -> StateDictOptions:
    """Return torch's options for a state dict that leaves out frozen weights."""
    has_frozen = any(not parameter.requires_grad for parameter in model.parameters())
    return StateDictOptions(
        flatten_optimizer_state_dict=True,  # keyed by parameter: other layouts may group them differently
        ignore_frozen_params=has_frozen,
        strict=not has_frozen,
    )


def _write_progress(partial: Path, progress: dict[str, Any]) -> None:
    (partial / PROGRESS).write_text(json.dumps(progress | {"world_size": dist.get_world_size()}, indent=2))


def _partial(final: Path) -> Path:
    return final.with_name(f".{final.name}.partial")


def _score(folder: Path, metric: str | None) -> float | None:
    try:
        return json.loads((folder / PROGRESS).read_text()).get("metrics", {}).get(metric)
    except (OSError, ValueError):  # a damaged checkpoint has no score
        return None


def _first_words(error: BaseException) -> str:
    if isinstance(error, dcp.api.CheckpointException):
        error = next(iter(error.failures.values()))[0]
    return f"{type(error).__name__}: {error}".splitlines()[0]


def _point(link: Path, name: str) -> None:
    """Make ``link`` a symbolic link to its sibling ``name``, atomically."""
    new = link.with_name(".latest.new")
    new.unlink(missing_ok=True)
    new.symlink_to(name)
    new.replace(link)
