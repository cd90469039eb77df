"""Kill a run again and again, and compare it with a run that was left alone."""

from __future__ import annotations

import fcntl
import json
import os
import random
import signal
import tempfile
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from automodel.config import Config
from automodel.config.command_line import compose_command_line
from automodel.proofs.child_run import ChildRun
from automodel.runs.records import read_records
from automodel.types import ExitStatus, RunError, UserError

KEYS = {
    "train": ("step", "epoch", "loss", "grad_norm", "lr", "num_tokens", "num_label_tokens"),
    "validation": ("name", "step", "loss", "num_label_tokens"),
}
"""What must be the same in the lines of either kind."""

_CKPT_EVERY = 2
_END_SEC = 120.0
"""How long a run may take to end after a kill."""


@dataclass(frozen=True)
class Kind:
    """One way to end a run."""

    name: str
    signal: signal.Signals
    whom: Literal["worker", "launcher", "all"]


_ONE_PROCESS = (
    Kind("KILL", signal.SIGKILL, "all"),
    Kind("TERM", signal.SIGTERM, "launcher"),
    Kind("INT", signal.SIGINT, "launcher"),
)
_WORKERS = (
    Kind("KILL of one worker", signal.SIGKILL, "worker"),
    Kind("KILL of the launcher", signal.SIGKILL, "launcher"),
    Kind("KILL of all", signal.SIGKILL, "all"),
    Kind("TERM of one worker", signal.SIGTERM, "worker"),
    Kind("TERM of the launcher", signal.SIGTERM, "launcher"),
    Kind("INT of the launcher", signal.SIGINT, "launcher"),
)


@dataclass
class Kill:
    """A line of the table."""

    kind: Kind
    moment: str
    status: int
    came_back: str = ""
    is_same: bool = True


def verify_resume(cfg: Config, *, kills: int, seed: int, num_steps: int) -> ExitStatus:
    """Run ``cfg`` whole and killed, print a line for every kill, and return whether both runs are the same.

    Raises:
        UserError: the configuration cannot be compared, or its input is wrong.
        RunError: a run failed by itself.
    """
    tree, notes = run_config(cfg, num_steps=num_steps)
    with tempfile.TemporaryDirectory(prefix="automodel-resume-") as name:
        return _verify(tree, notes, num_kills=kills, seed=seed, folder=Path(name))


def run_config(cfg: Config, *, num_steps: int) -> tuple[dict[str, Any], list[str]]:
    """Return the plain configuration of both runs, and what to tell about it."""
    (ours,) = compose_command_line([]).trees
    tree, notes = cfg.model_dump(by_alias=True), []
    steps = tree["step_scheduler"]
    steps |= {"max_steps": min(num_steps, steps["max_steps"] or num_steps), "log_every_steps": 1}
    if steps["ckpt_every_steps"] in (None, "auto"):
        steps["ckpt_every_steps"] = _CKPT_EVERY
        notes.append(f"step_scheduler.ckpt_every_steps={_CKPT_EVERY} here, since no number is set")
    tree["checkpoint"] |= {"enabled": True, "resume": "auto"}
    tree["export"]["enabled"] = True
    tree["logger"] = ours["logger"]
    if "loss" in tree["recipe"]["evaluations"]:
        tree["evaluation"] = None
    return tree, notes


def _verify(tree: dict[str, Any], notes: list[str], *, num_kills: int, seed: int, folder: Path) -> ExitStatus:
    print("\n".join([*notes, "the whole run ..."]), flush=True)
    whole, killed = (KillableRun(tree, folder, name) for name in ("whole", "killed"))
    whole.start()
    whole.wait_until_done()
    expected = lines_of(whole.metrics)
    num_steps = max(line["step"] for line in expected if line["kind"] == "train")
    if num_kills >= num_steps:
        raise UserError(f"verify.kills={num_kills} must be less than the number of steps, {num_steps}")
    kills = _run_with_kills(killed, tree, expected, num_steps=num_steps, num_kills=num_kills, seed=seed)
    got = lines_of(killed.metrics)
    _print_table(kills)
    if len(kills) < num_kills:
        print(f"{num_kills - len(kills)} of {num_kills} kills came too late: the run was done")
    problems = [] if all(kill.is_same for kill in kills) else ["a run that was resumed went another way"]
    difference = first_difference(expected, got)
    problems += [f"metrics: {difference}"] if difference else []
    problems += different_files(whole.folder / "model", killed.folder / "model")
    if not problems:
        print(f"\npassed: {len(expected)} lines of metrics and the weights after step {num_steps} are the same")
        return ExitStatus.DONE
    print("\nfailed", *problems, sep="\n  ")
    if not tree["rng"]["deterministic"]:
        print("on CUDA kernels differ from run to run unless rng.deterministic=true", flush=True)
    return ExitStatus.FAILED


def _run_with_kills(
    run: KillableRun,
    tree: dict[str, Any],
    expected: list[dict[str, Any]],
    *,
    num_steps: int,
    num_kills: int,
    seed: int,
) -> list[Kill]:
    """Run to the end, with a kill at each of some random steps; return the kills that hit."""
    draw = random.Random(seed)
    kinds = list(_WORKERS if tree["launch"].get("nproc_per_node", 1) > 1 else _ONE_PROCESS)
    draw.shuffle(kinds)
    moments = sorted(draw.sample(range(1, num_steps), num_kills))
    kills: list[Kill] = []
    for number, step in enumerate([*moments, None]):
        print(f"the run with kills, start {number + 1} ...", flush=True)
        run.start()
        if step is None:
            run.wait_until_done()
        else:
            is_in_save = (number + number // len(kinds)) % 2 == 1
            kill = run.end_at(step, kinds[number % len(kinds)], draw, is_in_save=is_in_save)
        if kills:
            _note_recovery(kills[-1], run, expected)
        if step is not None and kill is not None:
            kills.append(kill)
        elif step is not None:
            break
    return kills


def _note_recovery(kill: Kill, run: KillableRun, expected: list[dict[str, Any]]) -> None:
    step = json.loads((run.folder / "run.json").read_text())["resumed_from_step"][-1]
    kill.came_back = "the beginning" if step is None else f"step {step}"
    lines = lines_of(run.metrics)
    kill.is_same = first_difference(expected[: len(lines)], lines) is None


class KillableRun(ChildRun):
    """A run that is started and ended again and again."""

    @property
    def metrics(self) -> Path:
        return self.folder / "metrics.jsonl"

    def start(self) -> None:
        """Start it, with its output kept out of sight."""
        self._started_at = datetime.now(UTC).isoformat()
        super().start()

    def end_at(self, step: int, kind: Kind, draw: random.Random, *, is_in_save: bool) -> Kill | None:
        """End it some time after ``step`` was logged, or in the next save; None where it had ended before.

        Raises:
            RunError: it failed by itself, or ends otherwise than a signal should make it.
        """
        moment = self._wait_for(step, draw, is_in_save=is_in_save)
        if moment is None:
            self.wait_until_done()
            return None
        workers = _workers(self.pid)
        whom = {"launcher": [self.pid], "worker": [draw.choice(workers)] if workers else []}
        for pid in whom.get(kind.whom, [*workers, self.pid]):
            _send(pid, kind.signal)
        status = self.wait(_END_SEC)
        self._wait_for_lock()
        if kind.signal != signal.SIGKILL and status not in (ExitStatus.STOPPED, ExitStatus.DONE):
            raise RunError(f"after {kind.name}, {self.how_it_ended(status)}")
        return Kill(kind, moment, status)

    def _wait_for(self, step: int, draw: random.Random, *, is_in_save: bool) -> str | None:
        """Wait for the moment of a kill and return its description; None if the run ends first."""
        share = draw.random()
        first_seen = None
        while not self.has_ended:
            seen = self._num_steps_trained()
            if seen >= step and is_in_save:
                partial = next((self.folder / "checkpoints").glob(".step_*.partial"), None)
                if partial is not None:
                    return f"while writing {partial.name[1:].removesuffix('.partial')}"
            elif seen >= step:
                now = time.monotonic()
                first_seen = first_seen or now
                if now - first_seen >= share * min(1.0, self._step_sec()):
                    return f"after step {seen}"
            time.sleep(0.002)
        return None

    def _num_steps_trained(self) -> int:
        """Return how many steps the metrics hold, or 0 while this start of the run has not trained one itself."""
        records = read_records(self.metrics, "train")
        return len(records) if records and records[-1]["timestamp"] > self._started_at else 0

    def _step_sec(self) -> float:
        """Return how long the last step took."""
        return read_records(self.metrics, "train")[-1]["step_time_sec"]

    def _wait_for_lock(self) -> None:
        """Wait until the workers are gone too, and with them the lock of the run directory."""
        deadline = time.monotonic() + _END_SEC
        with (self.folder / ".lock").open() as lock:
            while time.monotonic() < deadline:
                try:
                    return fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    time.sleep(0.05)
        raise RunError(f"a worker of the killed run still lives after {_END_SEC:.0f} seconds")


def lines_of(metrics: Path) -> list[dict[str, Any]]:
    """Return what must be the same in every whole line of a metrics file, with its kind."""
    return [
        {"kind": each["kind"]} | {key: each.get(key) for key in KEYS[each["kind"]]} for each in read_records(metrics)
    ]


def first_difference(expected: list[dict[str, Any]], got: list[dict[str, Any]]) -> str | None:
    """Return a sentence about the first line in which two metrics files differ; None if they are equal."""
    for number, (one, other) in enumerate(zip(expected, got, strict=False), start=1):
        for key in one.keys() | other.keys():
            if one.get(key) != other.get(key):
                return f"line {number}, step {one['step']}: {key} is {other.get(key)!r} instead of {one.get(key)!r}"
    if len(expected) != len(got):
        return f"there are {len(got)} lines instead of {len(expected)}"
    return None


def different_files(expected: Path, got: Path) -> list[str]:
    """Return a line for each file of weights that is not the same, byte by byte, in two folders."""
    names = {path.name for folder in (expected, got) for path in folder.glob("*.safetensors")}
    if not names:
        return ["there are no weights to compare"]
    contents = {name: [_read(folder / name) for folder in (expected, got)] for name in sorted(names)}
    return [f"weights: {name} is not the same" for name, (one, other) in contents.items() if one != other]


def _read(path: Path) -> bytes | None:
    return path.read_bytes() if path.exists() else None


def _workers(launcher: int) -> list[int]:
    """Return the processes that a launcher started as ranks (Linux)."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            is_child = f"PPid:\t{launcher}\n" in (process / "status").read_text()
            if is_child and b"\0RANK=" in (process / "environ").read_bytes():
                found.append(int(process.name))
        except OSError:
            continue
    return sorted(found)


def _send(pid: int, number: signal.Signals) -> None:
    try:
        os.kill(pid, number)
    except ProcessLookupError:  # it went by itself a moment ago
        return


def _print_table(kills: list[Kill]) -> None:
    print(f"\n{'kill':<24}{'moment':<30}{'status':<9}{'came back at':<16}same")
    for kill in kills:
        same = "yes" if kill.is_same else "NO"
        print(f"{kill.kind.name:<24}{kill.moment:<30}{kill.status:<9}{kill.came_back:<16}{same}")
