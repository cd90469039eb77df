"""Have the last of two ranks go wrong in every way and phase, and print how long the job took to end, and its words.

python -m benchmarks.failures [WAY ...]
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

WAYS = ("Raises", "Exits", "Killed", "Sleeps", "Stopped")
PHASES = {
    "loading, ddp": ["model._target_=tests.recipes.faulty_models.{way}"],
    "training, ddp": ["loss_fn._target_=tests.recipes.faulty_losses.{way}"],
    "training, fsdp2": ["loss_fn._target_=tests.recipes.faulty_losses.{way}", "distributed=fsdp2"],
}
TIMEOUT_MINUTES = 0.2


def main() -> None:
    print(f"{'phase':17}{'way':9}{'status':8}{'seconds':9}what ended it, in run.json; and the last line", flush=True)
    for phase, overrides in PHASES.items():
        for way in sys.argv[1:] or WAYS:
            with tempfile.TemporaryDirectory() as folder:
                print(f"{phase:17}{way:9}{_outcome(way, overrides, Path(folder))}", flush=True)


def _outcome(way: str, overrides: list[str], folder: Path) -> str:
    argv = [
        "evaluation=loss", "validation_dataset=none", "dataset.limit=200", "step_scheduler.local_batch_size=8",
        "step_scheduler.log_every_steps=1", "launch.nproc_per_node=2", f"dist_env.timeout_minutes={TIMEOUT_MINUTES}",
        f"dist_env.init_timeout_minutes={TIMEOUT_MINUTES}", f"output_dir={folder}/run",
        *(override.format(way=way) for override in overrides),
    ]  # fmt: skip
    start = time.time()
    done = subprocess.run([sys.executable, "-m", "automodel.run", *argv], capture_output=True, text=True, check=False)
    end = time.time()
    metrics = folder / "run" / "metrics.jsonl"
    since, what = (metrics.stat().st_mtime, "last step") if metrics.exists() else (start, "start of the job")
    record = folder / "run" / "run.json"
    ended = json.loads(record.read_text())["ended"]["error"] if record.exists() else "no run.json yet"
    return f"{done.returncode:<8}{end - since:<9.1f}(from the {what}) {ended}; {done.stderr.strip().splitlines()[-1]}"


if __name__ == "__main__":
    main()
