"""``python -m automodel.verify_resume``: kill a run again and again, and compare what comes of it with a whole one.

So that anybody can see on their own model, rows and machine that a run which was killed loses nothing but time.
"""

from __future__ import annotations

import fcntl
import json
import os
import random
import signal
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from automodel.cli.child_run import ChildRun
from automodel.cli.command_line import (
    VerbFailed,
    load_one_config,
    read_own_keys,
    require_alone,
    run_verb,
    whole_number,
)
from automodel.config import Config
from automodel.config.command_line import compose_command_line
from automodel.types import ExitStatus, UserError

USAGE = """python -m automodel.verify_resume [FILE.yaml] [key=value of a run ...] [verify.kills=3] [verify.seed=0]

Runs the configuration to its end, then once more while it is killed at random moments and started again until it is
done, and compares every line of the metrics and the final weights, bit for bit. Nothing is kept of either run.

Keys
  verify.kills=3        how often the second run is killed or stopped
  verify.seed=0         of the kinds and moments of the kills
  verify.num_steps=20   optimizer steps of each run, where step_scheduler.max_steps is not less

Example
  python -m automodel.verify_resume launch.nproc_per_node=2 distributed=fsdp2 step_scheduler.local_batch_size=8

The kinds take turns: KILL of one worker, of the launcher, of all processes; TERM of one worker, of the launcher; INT.
Every other kill comes in the middle of a save.
Answers are not generated at validation. On CUDA add rng.deterministic=true. Status 0: the same; 1: not the same, or
a run failed; 2: wrong input. Two runs with their checkpoints go to the temporary folder for a while; TMPDIR chooses
another place. All other keys: python -m automodel.run --help"""

KEYS = {
    "train": ("step", "epoch", "loss", "grad_norm", "lr", "num_tokens", "num_label_tokens"),
    "validation": ("name", "step", "loss", "num_label_tokens"),
}
"""What must be the same in the lines of either kind."""

_KEYS = {
    "verify.kills": whole_number(3, least=1),
    "verify.seed": whole_number(0, least=0),
    "verify.num_steps": whole_number(20, least=2),
}
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


def main(argv: Sequence[str] | None = None) -> None:
    """Verify the command line ``argv`` (default: this process's) and leave with the status."""
    run_verb(_work, argv, usage=USAGE)


def _work(argv: list[str]) -> ExitStatus:
    own, cfg = read_command_line(argv)
    tree, notes = run_config(cfg, num_steps=own["verify.num_steps"])
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that the run in progress is ended too
    with tempfile.TemporaryDirectory(prefix="automodel-verify-") as name:
        return _verify(tree, notes, own=own, folder=Path(name))


def read_command_line(argv: list[str]) -> tuple[dict[str, int], Config]:
    """Return the values of the ``verify.*`` keys and the configuration of the run.

    Raises:
        UserError: with every problem of the whole command line, or because this is one rank of a job.
    """
    values, rest, problems = read_own_keys(argv, _KEYS)
    require_alone("verify_resume", rest, problems)
    return values, load_one_config(rest, problems)


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


def _verify(tree: dict[str, Any], notes: list[str], *, own: dict[str, int], folder: Path) -> ExitStatus:
    print("\n".join([*notes, "the whole run ..."]), flush=True)
    whole, killed = (KillableRun(tree, folder, name) for name in ("whole", "killed"))
    whole.start()
    whole.wait_until_done()
    expected = lines_of(whole.metrics)
    num_steps = max(line["step"] for line in expected if line["kind"] == "train")
    if own["verify.kills"] >= num_steps:
        raise UserError(f"verify.kills={own['verify.kills']} must be less than the number of steps, {num_steps}")
    kills = _kill_and_go_on(killed, tree, expected, num_steps=num_steps, own=own)
    got = lines_of(killed.metrics)
    _print_table(kills)
    if len(kills) < own["verify.kills"]:
        print(f"{own['verify.kills'] - len(kills)} of {own['verify.kills']} kills came too late: the run was done")
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


def _kill_and_go_on(
    run: KillableRun, tree: dict[str, Any], expected: list[dict[str, Any]], *, num_steps: int, own: dict[str, int]
) -> list[Kill]:
    """Run to the end, with a kill at each of some random steps; return the kills that hit."""
    draw = random.Random(own["verify.seed"])
    kinds = list(_WORKERS if tree["launch"].get("nproc_per_node", 1) > 1 else _ONE_PROCESS)
    draw.shuffle(kinds)
    moments = sorted(draw.sample(range(1, num_steps), own["verify.kills"]))
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
            _note_how_it_went_on(kills[-1], run, expected)
        if step is not None and kill is not None:
            kills.append(kill)
        elif step is not None:
            break
    return kills


def _note_how_it_went_on(kill: Kill, run: KillableRun, expected: list[dict[str, Any]]) -> None:
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
            VerbFailed: it failed by itself, or ends otherwise than a signal should make it.
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
            raise VerbFailed(f"after {kind.name}, {self.how_it_ended(status)}")
        return Kill(kind, moment, status)

    def _wait_for(self, step: int, draw: random.Random, *, is_in_save: bool) -> str | None:
        """Wait for the moment of a kill and return it in words; None where the run ends before."""
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
        records = [record for record in _records(self.metrics) if record["kind"] == "train"]
        return len(records) if records and records[-1]["timestamp"] > self._started_at else 0

    def _step_sec(self) -> float:
        """Return how long the last step took."""
        return next(each["step_time_sec"] for each in reversed(_records(self.metrics)) if each["kind"] == "train")

    def _wait_for_lock(self) -> None:
        """Wait until the workers are gone too, and with them the lock of the run directory."""
        deadline = time.monotonic() + _END_SEC
        with (self.folder / ".lock").open() as lock:
            while time.monotonic() < deadline:
                try:
                    return fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    time.sleep(0.05)
        raise VerbFailed(f"a worker of the killed run still lives after {_END_SEC:.0f} seconds")


def lines_of(metrics: Path) -> list[dict[str, Any]]:
    """Return what must be the same in every whole line of a metrics file, with its kind."""
    return [{"kind": each["kind"]} | {key: each.get(key) for key in KEYS[each["kind"]]} for each in _records(metrics)]


def _records(metrics: Path) -> list[dict[str, Any]]:
    text = metrics.read_text() if metrics.exists() else ""
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


def first_difference(expected: list[dict[str, Any]], got: list[dict[str, Any]]) -> str | None:
    """Return the first line in which two metrics files differ, in words; None where they are the same."""
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


if __name__ == "__main__":
    main()
