"""Ten steps of a real model on real rows are the same under every strategy, full and with adapters.

``python -m benchmarks.parity_table`` runs every combination; here is one task a cell, each task of another kind.
"""

from __future__ import annotations

from functools import cache

import pytest

from tests.dist.parity import Task, run_layout, run_plain, worst_difference

# float32 sums in another order, over ten steps; of the weights, Adam magnifies what rounding does to small gradients.
TOLERANCE = 1e-5

LAYOUTS = {
    2: ("ddp", "fsdp2", "tp2", "tp2 sequence", "zero1", "zero2", "zero3"),
    4: ("hsdp", "tp2", "hsdp x tp2", "zero1 x 2", "zero3 x 2 outer"),
}
SLOW = ((2, "tp2"), (2, "zero2"), (4, "tp2"), (4, "zero1 x 2"), (4, "zero3 x 2 outer"))
KINDS = (
    # accumulation, defer, task
    (4, True, Task(is_short=True, is_masked=True, optimizer="sgd")),
    (1, True, Task(is_clipped=False, optimizer="adamw")),
    (4, False, Task(is_short=True, is_masked=True, is_lora=True, optimizer="sgd")),
    (4, True, Task(is_lora=True, optimizer="adamw")),
)


@pytest.fixture(scope="module")
def expected(one_rank, shared_data):
    return cache(lambda task: one_rank.run(run_plain, task)[0])


def cells() -> list:
    """Return (ranks, strategy, kinds), of which those that take long or repeat others are marked as slow."""
    found = []
    for world, names in LAYOUTS.items():
        for name in names:
            # four ranks take turns on two cores, and tensor parallelism takes longest: one or two kinds each
            kinds = (KINDS[3:] if name != "tp2" else KINDS[:1]) if world == 4 and "tp" in name else (KINDS[0], KINDS[3])
            is_slow = (world, name) in SLOW
            found.append(pytest.param(world, name, kinds, id=f"{world}-{name}", marks=[pytest.mark.slow] * is_slow))
            if world == 2 and "tp" not in name:
                found.append(pytest.param(world, name, KINDS[1:3], id=f"{world}-{name}, more", marks=pytest.mark.slow))
    return found


@pytest.mark.parametrize(("world", "strategy", "kinds"), cells())
def test_ten_steps_equal_a_plain_loop(ranks, expected, world, strategy, kinds):
    for accumulation, defer, task in kinds:
        for got in ranks[world].run(run_layout, strategy, accumulation, defer, task):
            assert max(worst_difference(got, expected(task))) < TOLERANCE, (accumulation, defer, task)
