"""Compare training on the CPU: this project, a plain PyTorch loop, transformers' Trainer and TRL's SFTTrainer.

    python -m benchmarks.compare [--case small] [--rounds 3] [--steps 10]

Each case trains the same fresh model on the same rows, in the same order, in float32. A peer and this project run one
after the other, each in fresh processes, and take turns in who is first. A ratio compares the two runs of such a pair.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import shlex
import signal
import subprocess
import sys
import tempfile
from dataclasses import asdict
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.cases import CASES, Job, prepare
from benchmarks.contenders import CONTENDERS, NUM_SKIPPED, OURS, ROOT, ContenderError, Measurement, measure

PACKAGES = ("torch", "transformers", "accelerate", "trl")
PEERS = tuple(name for name in CONTENDERS if name not in (OURS, "automodel-packed"))
LOSS_TOLERANCE = 1e-3
"""Relative, for losses of the same rows: a sum in another order is closer, and another row or rate is not."""
BUSY_LOAD = 0.5
"""Processes that ran on average in the last minute; threads that share a core wait for each other many times longer."""

Pair = tuple[Measurement, Measurement]
"""This project's measurement and a peer's."""


def main() -> None:
    """Run the pairs and print a table for each case; exit with status 1 if a contender failed or trained otherwise."""
    args = _arguments()
    signal.signal(signal.SIGTERM, lambda signum, frame: sys.exit(128 + signum))  # so that a contender's job ends too
    record = about() | {"cases": {}}
    if record["load"] > BUSY_LOAD:
        print(f"the machine is busy (load {record['load']:.1f}): ratios will vary widely", file=sys.stderr, flush=True)
    problems: list[str] = []
    for name in args.case:
        with tempfile.TemporaryDirectory(prefix="bench-") as folder:
            job = prepare(CASES[name], args.data, Path(folder), num_steps=args.steps)
            pairs = run_pairs(name, job, args.peers, num_rounds=args.rounds, problems=problems)
        record["cases"][name] = {
            "pairs": {peer: [[asdict(each) for each in pair] for pair in of_peer] for peer, of_peer in pairs.items()},
            "summary": summary(pairs),
        }
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(record, indent=1))
        print(f"\n{CASES[name].title}\n\n{table(record['cases'][name]['summary'])}\n", flush=True)
    print("for benchmarks/README.md:\n" + "\n".join(readme_rows(record)))
    print(f"\nall figures: {args.json}")
    if problems:
        sys.exit("\n".join(problems))


def run_pairs(case: str, job: Job, peers: list[str], *, num_rounds: int, problems: list[str]) -> dict[str, list[Pair]]:
    """Measure every peer next to this project ``num_rounds`` times; what went wrong is appended to ``problems``."""
    pairs: dict[str, list[Pair]] = {peer: [] for peer in peers}
    for index in range(num_rounds):
        for peer in peers:
            order = (OURS, peer) if index % 2 == 0 else (peer, OURS)
            try:
                found = {name: measure(name, CASES[case], job) for name in order}
            except ContenderError as error:
                problems.append(f"{case}, {peer}, round {index + 1}: {error}")
                print(problems[-1], file=sys.stderr, flush=True)
                continue
            pair = found[OURS], found[peer]
            if "packed" not in peer and (difference := differing_work(*pair)):
                problems.append(f"{case}, {peer}, round {index + 1}: not the same training: {difference}")
            pairs[peer].append(pair)
            rates = " and ".join(f"{name} {each.tokens_per_sec:.0f}" for name, each in found.items())
            print(f"{case}, round {index + 1}: {rates} tokens/s", file=sys.stderr, flush=True)
    return pairs


def differing_work(ours: Measurement, theirs: Measurement) -> str | None:
    """Return in what two measurements trained differently, or None."""
    if ours.num_tokens != theirs.num_tokens:
        return f"tokens of the steps {ours.num_tokens} and {theirs.num_tokens}"
    close = [math.isclose(a, b, rel_tol=LOSS_TOLERANCE) for a, b in zip(ours.losses, theirs.losses, strict=True)]
    return None if all(close) else f"losses of the first step and of the others {ours.losses} and {theirs.losses}"


def summary(pairs: dict[str, list[Pair]]) -> dict[str, dict[str, Any]]:
    """Return the medians of each contender that was measured; ``ratios`` are its rates over ours, by pair."""
    measured = {peer: of_peer for peer, of_peer in pairs.items() if of_peer}
    ours = [pair[0] for of_peer in measured.values() for pair in of_peer]
    found = {OURS: _medians(ours)} if ours else {}
    for peer, of_peer in measured.items():
        ratios = [theirs.tokens_per_sec / own.tokens_per_sec for own, theirs in of_peer]
        found[peer] = _medians([theirs for _, theirs in of_peer]) | {"ratios": ratios}
    return found


def _medians(measurements: list[Measurement]) -> dict[str, Any]:
    names = ("tokens_per_sec", "peak_mem_gib", "first_step_sec")
    return {name: median(getattr(each, name) for each in measurements) for name in names} | {
        "num_runs": len(measurements)
    }


def table(found: dict[str, dict[str, Any]]) -> str:
    """Return a summary as a Markdown table."""
    lines = [
        "| contender | tokens/s | over automodel's, same pair (range) | peak memory, GiB | to first step, s | runs |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for name, each in found.items():
        ratios = each.get("ratios")
        ratio = f"{median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})" if ratios else ""
        lines.append(
            f"| {CONTENDERS[name]} | {each['tokens_per_sec']:,.0f} | {ratio} | {each['peak_mem_gib']:.2f} "
            f"| {each['first_step_sec']:.1f} | {each['num_runs']} |"
        )
    return "\n".join(lines)


def readme_rows(record: dict[str, Any]) -> list[str]:
    """Return one row for each case, for the table in ``benchmarks/README.md``; of TRL's two the faster."""
    versions = ", ".join(f"{name} {number}" for name, number in record["versions"].items())
    rows = []
    for case, of_case in record["cases"].items():
        found = of_case["summary"]
        trl = max(
            (name for name in found if name.startswith("trl")), default="trl", key=lambda name: _rate(found, name)
        )
        shown = [found.get(name) for name in (OURS, "plain", "trainer", trl)]
        figures = [
            " / ".join("-" if each is None else f"{each[figure]:,.{digits}f}" for each in shown)
            for figure, digits in (("tokens_per_sec", 0), ("peak_mem_gib", 2), ("first_step_sec", 1))
        ]
        about_run = (record["date"], record["commit"], record["machine"], versions, f"`{record['command']}`")
        packed = " (packed)" if trl == "trl-packed" else ""
        rows.append(f"| {' | '.join((*about_run, case, figures[0] + packed, *figures[1:]))} |")
    return rows


def _rate(found: dict[str, dict[str, Any]], name: str) -> float:
    ratios = found[name]["ratios"]
    return median(ratios)


def about() -> dict[str, Any]:
    """Return when, on what and of what the measurement is made, and its command."""
    arguments = shlex.join(sys.argv[1:])
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "commit": _commit(),
        "machine": f"{_processor()}, {os.cpu_count()} cores",
        "load": os.getloadavg()[0],
        "versions": {"Python": platform.python_version()} | {name: _version(name) for name in PACKAGES},
        "command": f"python -m benchmarks.compare {arguments}".strip(),
    }


def _commit() -> str:
    def git(*argv: str) -> str:
        done = subprocess.run(["git", *argv], cwd=ROOT, capture_output=True, text=True, check=False)
        return done.stdout.strip()

    return (git("rev-parse", "--short", "HEAD") or "?") + ("+changes" if git("status", "--porcelain") else "")


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "-"


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    titles = ", ".join(f"{name} ({case.title})" for name, case in CASES.items())
    parser.add_argument("--case", action="append", choices=CASES, help=f"may be repeated; default: all. {titles}")
    parser.add_argument("--rounds", type=int, default=3, help="pairs for each peer and case; default 3")
    parser.add_argument("--steps", type=int, default=10, help=f"of a run; {NUM_SKIPPED} are not counted; default 10")
    parser.add_argument("--peers", type=lambda text: text.split(","), default=list(PEERS), help="default: all")
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data", help="see benchmarks/README.md")
    now = datetime.now(UTC).strftime("%Y%m%d-%H%M%S")
    parser.add_argument("--json", type=Path, default=ROOT / "outputs" / "benchmarks" / f"{now}.json")
    args = parser.parse_args()
    args.case = args.case or list(CASES)
    if unknown := set(args.peers) - set(CONTENDERS) | ({OURS} & set(args.peers)):
        parser.error(
            f"--peers: {', '.join(sorted(unknown))}; there are: {', '.join(n for n in CONTENDERS if n != OURS)}"
        )
    if args.steps <= NUM_SKIPPED or args.rounds < 1:
        parser.error(f"--steps must be more than {NUM_SKIPPED}, and --rounds at least 1")
    if not args.data.is_dir():
        parser.error(f"--data: {args.data} is no folder; benchmarks/README.md says what it holds")
    if any(name.startswith("trl") for name in args.peers) and find_spec("trl") is None:
        parser.error("trl is not installed: make bench installs it, or pip install -e '.[bench]'")
    return args


if __name__ == "__main__":
    main()
