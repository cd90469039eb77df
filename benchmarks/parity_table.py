"""Print how far every layout is from a plain loop over ten steps: the largest difference of each cell.

    python -m benchmarks.parity_table [--all] [LAYOUT ...]

The rows are layouts, the columns what is trained; a figure is the largest relative difference of loss, gradient norm
and trained weights over accumulation (1, 4, 4 with a short last step), deferral, clipping and fully masked
micro-batches: over runs in which every pair of their values occurs, or with --all over every combination.
"""

from __future__ import annotations

import sys
import time
import warnings
from itertools import product

import transformers

from tests.dist.parity import Task, run_layout, run_plain, worst_difference
from tests.dist.pool import RankPool

LAYOUTS = {
    1: ("ddp", "fsdp2", "zero1", "zero2", "zero3"),
    2: ("ddp", "fsdp2", "zero1", "zero2", "zero3", "tp2", "tp2 sequence"),
    4: (
        "ddp", "fsdp2", "hsdp", "zero1", "zero2", "zero3", "zero1 x 2", "zero3 x 2", "zero3 x 2 outer", "tp2",
        "tp2 sequence", "hsdp x tp2",
    ),
}  # fmt: skip
ALWAYS_DEFERS = ("ddp", "zero")


WINDOWS = ((1, False), (4, False), (4, True))
"""Accumulation, and whether the last step is short of rows."""

PAIRS = (
    # window, defer, masked, clipped
    (0, True, True, True), (0, False, False, False),
    (1, True, False, True), (1, False, True, False),
    (2, True, True, False), (2, False, False, True),
)  # fmt: skip


def cells(strategy: str, *, is_lora: bool, optimizer: str, is_all: bool) -> list[tuple[int, bool, Task]]:
    """Return (accumulation, defer, task) of every run of a cell."""
    chosen = product(range(3), (True, False), (True, False), (True, False)) if is_all else PAIRS
    runs = []
    for window, defer, is_masked, is_clipped in chosen:
        accumulation, is_short = WINDOWS[window]
        run = (
            accumulation,
            defer or strategy.startswith(ALWAYS_DEFERS),
            Task(is_short, is_masked, is_clipped, is_lora, optimizer),
        )
        runs += [] if run in runs else [run]
    return runs


def main() -> None:
    warnings.filterwarnings("ignore")
    transformers.utils.logging.disable_progress_bar()
    is_all, chosen = "--all" in sys.argv, [name for name in sys.argv[1:] if not name.startswith("--")]
    kinds = list(product((False, True), ("sgd", "adamw")))
    expected = {}
    reference = RankPool(1)
    print("ranks layout | full sgd | full adamw | lora sgd | lora adamw   (loss / gradient norm / weights)", flush=True)
    for world, strategies in LAYOUTS.items():
        pool = RankPool(world)
        for strategy in strategies:
            if chosen and strategy not in chosen:
                continue
            line, start, num_runs = [], time.perf_counter(), 0
            for is_lora, optimizer in kinds:
                worst = (0.0, 0.0, 0.0)
                for accumulation, defer, task in cells(strategy, is_lora=is_lora, optimizer=optimizer, is_all=is_all):
                    if task not in expected:
                        (expected[task],) = reference.run(run_plain, task)
                    for got in pool.run(run_layout, strategy, accumulation, defer, task):
                        worst = tuple(map(max, worst, worst_difference(got, expected[task])))
                    num_runs += 1
                line.append(" / ".join(f"{figure:.0e}" for figure in worst))
            seconds = time.perf_counter() - start
            print(f"{world} {strategy} | {' | '.join(line)} | {num_runs} runs, {seconds:.0f} s", flush=True)
        pool.close()
    reference.close()


if __name__ == "__main__":
    main()
