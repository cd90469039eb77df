"""``python -m automodel.verify_resume``: kill a run again and again, and compare what comes of it with a whole one.

So that anybody can see on their own model, rows and machine that a run which was killed loses nothing but time.
"""

from __future__ import annotations

import fcntl
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import yaml

from automodel.config import Config, has_help, hydra_flags, load_config, sweep_jobs
from automodel.config.command_line import compose_command_line
from automodel.config.names import did_you_mean
from automodel.launch.worker import LAUNCHER_PID, is_worker
from automodel.types import ExitStatus, UserError

USAGE = """python -m automodel.verify_resume [key=value of a run ...] [verify.kills=3] [verify.seed=0]

Runs the configuration to its end, then once more while it is killed at random moments and started again until it is
done, and compares every line of the metrics and the final weights, bit for bit. Nothing is kept of either run.

Keys
  verify.kills=3        how often the second run is killed or stopped
  verify.seed=0         of the kinds and moments of the kills
  verify.num_steps=20   optimizer steps of each run, where step_scheduler.max_steps is not less

Example
  python -m automodel.verify_resume launch.nproc_per_node=2 distributed=fsdp2 step_scheduler.local_batch_size=8

The kinds take turns: KILL of one worker, of the launcher, of all processes, of all in the middle of a save; TERM; INT.
Answers are not generated at validation. On CUDA add rng.deterministic=true. Status 0: the same; 1: not the same, or
a run failed; 2: wrong input. Two runs with their checkpoints go to the temporary folder for a while; TMPDIR chooses
another place. All other keys: python -m automodel.run --help"""

KEYS = {
    "train": ("step", "epoch", "loss", "grad_norm", "lr", "num_tokens", "num_label_tokens"),
    "validation": ("name", "step", "loss", "num_label_tokens"),
}
"""What must be the same in the lines of either kind."""

_DEFAULTS = {"verify.kills": 3, "verify.seed": 0, "verify.num_steps": 20}
_LEAST = {"verify.kills": 1, "verify.seed": 0, "verify.num_steps": 2}
_CKPT_EVERY = 2
_END_SEC = 120.0
"""How long a run may take to end after a kill."""


class VerifyFailed(Exception):
    """A run failed, or did not end as it must."""


@dataclass(frozen=True)
class Kind:
    """One way to end a run."""

    name: str
    signal: signal.Signals
    whom: str
    is_in_save: bool = False


_ONE_PROCESS = (
    Kind("KILL in a save", signal.SIGKILL, "all", is_in_save=True),
    Kind("TERM", signal.SIGTERM, "launcher"),
    Kind("KILL", signal.SIGKILL, "all"),
    Kind("INT", signal.SIGINT, "launcher"),
)
_WORKERS = (
    Kind("KILL of one worker", signal.SIGKILL, "worker"),
    Kind("KILL of all in a save", signal.SIGKILL, "all", is_in_save=True),
    Kind("TERM", signal.SIGTERM, "launcher"),
    Kind("KILL of the launcher", signal.SIGKILL, "launcher"),
    Kind("INT", signal.SIGINT, "launcher"),
    Kind("KILL of all", signal.SIGKILL, "all"),
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
    argv = list(sys.argv[1:] if argv is None else argv)
    if has_help(argv):
        print(USAGE)
        return
    try:
        own, cfg = read_command_line(argv)
        tree, notes = run_config(cfg, num_steps=own["verify.num_steps"])
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that the run in progress is ended too
        with tempfile.TemporaryDirectory(prefix="automodel-verify-") as name:
            status = _verify(tree, notes, own=own, folder=Path(name))
    except UserError as error:
        for problem in error.problems:
            print(f"error: {problem}", file=sys.stderr)
        status = ExitStatus.BAD_INPUT
    except VerifyFailed as error:
        print(f"failed: {error}", file=sys.stderr)
        status = ExitStatus.FAILED
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        status = ExitStatus.FAILED
    sys.exit(status)


def read_command_line(argv: list[str]) -> tuple[dict[str, int], Config]:
    """Return the values of the ``verify.*`` keys and the configuration of the run.

    Raises:
        UserError: with every problem of the whole command line, or because this is one rank of a job.
    """
    if is_worker(os.environ):
        raise UserError(
            "verify_resume starts and kills the processes itself, and this one was started as a rank of a job "
            "(RANK or SLURM_STEP_ID is in the environment): start it once, outside torchrun and srun"
        )
    ours = [arg for arg in argv if arg.lstrip("+~").startswith("verify.")]
    rest = [arg for arg in argv if arg not in ours]
    values, problems = dict(_DEFAULTS), []
    for arg in ours:
        key, _, text = arg.lstrip("+~").partition("=")
        if key not in _DEFAULTS:
            hint = did_you_mean(key, _DEFAULTS) or "; there are: " + ", ".join(_DEFAULTS)
            problems.append(f"{key} is not a known key{hint}")
        elif not text.isdecimal() or int(text) < _LEAST[key]:
            problems.append(f"{key}={text} must be a whole number of at least {_LEAST[key]}")
        else:
            values[key] = int(text)
    if sweep_jobs(rest) is not None or hydra_flags(rest):
        problems.append("verify_resume takes one configuration: leave out -m, --cfg and the like")
        raise UserError(*problems)
    try:
        cfg = load_config(rest)
    except UserError as error:
        raise UserError(*problems, *error.problems) from None
    if problems:
        raise UserError(*problems)
    return values, cfg


def run_config(cfg: Config, *, num_steps: int) -> tuple[dict[str, Any], list[str]]:
    """Return the plain configuration of both runs, and what to tell about it."""
    (ours,) = compose_command_line([]).trees
    tree, notes = cfg.model_dump(by_alias=True), []
    steps = tree["step_scheduler"]
    steps |= {"max_steps": min(num_steps, steps["max_steps"] or num_steps), "log_every_steps": 1}
    if steps["ckpt_every_steps"] is None:
        steps["ckpt_every_steps"] = _CKPT_EVERY
        notes.append(f"step_scheduler.ckpt_every_steps={_CKPT_EVERY} here, since none is set")
    tree["checkpoint"] |= {"enabled": True, "resume": "auto"}
    tree["export"]["enabled"] = True
    tree["logger"] = ours["logger"]
    if "loss" in tree["recipe"]["evaluations"]:
        tree["evaluation"] = None
    return tree, notes


def _verify(tree: dict[str, Any], notes: list[str], *, own: dict[str, int], folder: Path) -> ExitStatus:
    print("\n".join([*notes, "the whole run ..."]), flush=True)
    whole, killed = (Run(tree, folder, name) for name in ("whole", "killed"))
    whole.start()
    whole.wait_to_the_end()
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
    run: Run, tree: dict[str, Any], expected: list[dict[str, Any]], *, num_steps: int, own: dict[str, int]
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
            run.wait_to_the_end()
        else:
            kill = run.end_at(step, kinds[number % len(kinds)], draw)
        if kills:
            _note_how_it_went_on(kills[-1], run, expected)
        if step is not None and kill is not None:
            kills.append(kill)
        elif step is not None:
            break
    return kills


def _note_how_it_went_on(kill: Kill, run: Run, expected: list[dict[str, Any]]) -> None:
    step = json.loads((run.folder / "run.json").read_text())["resumed_from_step"][-1]
    kill.came_back = "the beginning" if step is None else f"step {step}"
    lines = lines_of(run.metrics)
    kill.is_same = first_difference(expected[: len(lines)], lines) is None


class Run:
    """A run of one configuration that is started again and again."""

    def __init__(self, tree: dict[str, Any], folder: Path, name: str) -> None:
        self.folder, self._parent, self._name = folder / name, folder, name
        self.metrics = self.folder / "metrics.jsonl"
        self._output = folder / f"{name}.log"
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(tree | {"output_dir": str(self.folder)}))

    def start(self) -> None:
        """Start it, with its output kept out of sight."""
        # No run id or status folder of a launcher's; by its number, the run dies with this process.
        env = {key: value for key, value in os.environ.items() if not key.startswith("AUTOMODEL_")}
        env[LAUNCHER_PID] = str(os.getpid())
        env["TMPDIR"] = str(self._parent)  # for what a killed launcher leaves behind
        command = ["-m", "automodel.run", "--config-path", str(self._parent), "--config-name", self._name]
        self._started_at = datetime.now(UTC).isoformat()
        with self._output.open("w") as output:
            self._process = subprocess.Popen(
                [sys.executable, *command], env=env, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT,
                process_group=0,  # a Ctrl-C reaches it through this process alone, and so once
            )  # fmt: skip

    def wait_to_the_end(self) -> None:
        """Wait until it is done.

        Raises:
            UserError: its input is wrong.
            VerifyFailed: it ended otherwise.
        """
        status = self._wait(None)
        if status == ExitStatus.BAD_INPUT:
            lines = self._output.read_text(errors="replace").splitlines()
            raise UserError(*[line.removeprefix("error: ") for line in lines if line.startswith("error: ")])
        if status:
            raise VerifyFailed(self._ended(status))

    def end_at(self, step: int, kind: Kind, draw: random.Random) -> Kill | None:
        """End it some time after ``step`` was logged; None where it had ended before.

        Raises:
            VerifyFailed: it failed by itself, or ends otherwise than a signal should make it.
        """
        moment = self._wait_for(step, kind, draw)
        if moment is None:
            self.wait_to_the_end()
            return None
        workers = _workers(self._process.pid)
        whom = {"launcher": [self._process.pid], "worker": [draw.choice(workers)] if workers else []}
        for pid in whom.get(kind.whom, [*workers, self._process.pid]):
            _send(pid, kind.signal)
        status = self._wait(_END_SEC)
        self._wait_for_lock()
        if kind.signal != signal.SIGKILL and status not in (ExitStatus.STOPPED, ExitStatus.DONE):
            raise VerifyFailed(f"after {kind.name}, {self._ended(status)}")
        return Kill(kind, moment, status)

    def _wait_for(self, step: int, kind: Kind, draw: random.Random) -> str | None:
        """Wait for the moment of a kill and return it in words; None where the run ends before."""
        share = draw.random()
        first_seen = None
        while self._process.poll() is None:
            seen = self._num_steps_trained()
            if seen >= step and kind.is_in_save:
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

    def _wait(self, timeout_sec: float | None) -> int:
        try:
            return self._process.wait(timeout_sec)
        except KeyboardInterrupt:
            self._process.terminate()
            self._process.wait()
            raise
        except subprocess.TimeoutExpired:
            self._process.kill()
            raise VerifyFailed(f"the run did not end within {timeout_sec:.0f} seconds after it was killed") from None

    def _wait_for_lock(self) -> None:
        """Wait until the workers are gone too, and with them the lock of the run directory."""
        deadline = time.monotonic() + _END_SEC
        with (self.folder / ".lock").open() as lock:
            while time.monotonic() < deadline:
                try:
                    return fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    time.sleep(0.05)
        raise VerifyFailed(f"a worker of the killed run still lives after {_END_SEC:.0f} seconds")

    def _ended(self, status: int) -> str:
        last = self._output.read_text(errors="replace").splitlines()[-30:]
        return f"the {self._name} run ended with status {status}; its last lines:\n" + "\n".join(f"  {x}" for x in last)


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
