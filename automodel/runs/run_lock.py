"""The lock of a run directory: a kernel lock where the file system supports it, else a file with a heartbeat."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import platform
import secrets
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO

from automodel.distributed.runtime.awake import poll_for
from automodel.logs import get_logger
from automodel.processes import is_alive, process_space
from automodel.types import ExitStatus, UserError

log = get_logger(__name__)

WAIT_SEC = 180.0
"""How long to wait for a lock whose holder may be dead: after a node goes down, NFS keeps its locks for 90 s, Lustre
for 150 s."""
BEAT_SEC = 5.0
STALE_SEC = 30.0
"""Silence after which the owner of a lock file counts as dead: several heartbeats, since a single one may be late."""

_HELD_BY_ANOTHER = (errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES)
_RESTART_COUNTS = ("SLURM_RESTART_COUNT", "TORCHELASTIC_RESTART_COUNT")


@dataclass(frozen=True)
class Holder:
    """The process that holds a run directory, as it describes itself."""

    pid: int
    host: str
    space: str
    job_id: str | None
    token: str

    @classmethod
    def this_process(cls) -> Holder:
        """Describe this process."""
        token = secrets.token_hex(8)
        return cls(os.getpid(), platform.node(), process_space(), os.environ.get("SLURM_JOB_ID"), token)

    @classmethod
    def read(cls, path: Path) -> Holder | None:
        """Return the holder recorded in ``path``, or None if there is none yet."""
        try:
            return cls(**json.loads(path.read_text().partition("\n")[0]))
        except (OSError, ValueError, TypeError):
            return None

    @property
    def is_dead(self) -> bool:
        """Whether the process was on this node and has ended."""
        return self.space == process_space() and not is_alive(self.pid)

    @property
    def may_be_dead(self) -> bool:
        """Whether to wait for it: yes, unless it is alive on this node and belongs to another job.

        A scheduler may restart a job before the job's first start, or its node, is completely gone.
        """
        is_restart = any(os.environ.get(name, "0") not in ("", "0") for name in _RESTART_COUNTS)
        is_of_our_job = self.job_id is not None and self.job_id == os.environ.get("SLURM_JOB_ID")
        return is_restart or is_of_our_job or self.space != process_space() or self.is_dead

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}" + (f" of job {self.job_id}" if self.job_id else "")


class RunLock:
    """Held from its creation to ``release`` or the end of this process.

    Args:
        path: the file in the run directory that is locked.
        wait_sec: how long to wait for a holder that may be dead already.

    Raises:
        UserError: another process holds it.
        OSError: the file cannot be written.
    """

    def __init__(self, path: Path, *, wait_sec: float = WAIT_SEC) -> None:
        self._me = Holder.this_process()
        self._file: IO[str] | None = path.open("a+")
        self._owner_file = path.with_name(f"{path.name}.owner")
        self._released = threading.Event()
        self._seen: tuple[str, float] = ("", 0.0)
        try:
            self._hold(path, wait_sec)
        except BaseException:
            self._file.close()
            raise
        self._file.truncate(0)
        self._file.write(json.dumps(asdict(self._me)))
        self._file.flush()

    def release(self) -> None:
        """Release the folder; a second call does nothing."""
        if self._file is None:
            return
        self._file.close()
        self._file = None
        self._released.set()
        owner = Holder.read(self._owner_file)
        if owner is not None and owner.token == self._me.token:
            self._owner_file.unlink()

    def _hold(self, path: Path, wait_sec: float) -> None:
        try:
            self._wait_for(path, lambda passed_sec: self._lock(path), wait_sec)
            if not self._owner_file.exists():  # it exists if another node could not lock
                return
        except OSError as error:
            log.warning(
                "output_dir=%s: its file system has no locks (%s); the file %s marks it as in use instead",
                path.parent, error.strerror, self._owner_file.name,
            )  # fmt: skip
        self._wait_for(self._owner_file, self._own, wait_sec)
        threading.Thread(target=self._beat, name="run lock", daemon=True).start()

    def _wait_for(self, path: Path, attempt: Callable[[float], bool], wait_sec: float) -> None:
        """Call ``attempt(passed_sec)`` until it succeeds, for as long as the holder may be dead."""
        holder, is_announced = None, False
        for passed_sec in poll_for(wait_sec):
            if attempt(passed_sec):
                return
            holder = Holder.read(path) or holder
            if holder is not None and not holder.may_be_dead:
                break
            if not is_announced and (holder is not None or passed_sec > 1):  # else its record may come yet
                is_announced = True
                log.warning(
                    "output_dir=%s is held by another run (%s), which may have ended with its node; waiting up to "
                    "%.0f s for it", path.parent, holder or "unknown", wait_sec,
                )  # fmt: skip
        waited = f", still after {passed_sec:.0f} s" if is_announced else ""
        raise UserError(
            f"output_dir={path.parent} is in use by another run ({holder or 'unknown'}){waited}; "
            "wait for it or choose another output_dir"
        )

    def _lock(self, path: Path) -> bool:
        """Try to lock the file and return whether that worked; raises OSError if the file system has no locks."""
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in _HELD_BY_ANOTHER:
                return False
            raise
        if path.exists() and os.path.samestat(os.fstat(self._file.fileno()), path.stat()):
            return True
        self._file.close()  # the previous holder removed it with its folder
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("a+")
        return False

    def _own(self, passed_sec: float) -> bool:
        """Try to create the owner file and return whether that worked; remove the file of a dead owner."""
        try:
            with self._owner_file.open("x") as file:
                file.write(self._signature(0))
            return True
        except FileExistsError:
            pass
        with suppress(FileNotFoundError):
            text = self._owner_file.read_text()
            if text != self._seen[0]:
                self._seen = (text, passed_sec)
            holder = Holder.read(self._owner_file)
            if passed_sec - self._seen[1] > STALE_SEC or (holder is not None and holder.is_dead):
                self._remove_owner(text)
        return False

    def _remove_owner(self, text: str) -> None:
        """Remove the owner file if it still contains ``text``; of two processes, the rename succeeds in only one."""
        old = self._owner_file.with_name(f"{self._owner_file.name}.{self._me.token}")
        self._owner_file.rename(old)
        if old.read_text() != text:  # another process was quicker, and this is its file
            with suppress(FileExistsError):
                os.link(old, self._owner_file)
        old.unlink()

    def _beat(self) -> None:
        """Write a heartbeat every few seconds; end this process if another run has taken over the folder."""
        beats = 0
        while not self._released.wait(BEAT_SEC):
            holder = Holder.read(self._owner_file)
            if holder is not None and holder.token != self._me.token:
                log.error(
                    "output_dir=%s was taken over by another run (%s), because this one sent no heartbeat for %.0f s",
                    self._owner_file.parent, holder, STALE_SEC,
                )  # fmt: skip
                os._exit(ExitStatus.FAILED)
            beats += 1
            with suppress(OSError), self._owner_file.open("r+") as file:
                file.write(self._signature(beats))

    def _signature(self, beats: int) -> str:
        return json.dumps(asdict(self._me)) + f"\n{beats:012d}\n"
