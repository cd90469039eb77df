"""Ten steps of a real model on real rows are the same under every strategy, full and with adapters.

``python -m benchmarks.parity_table`` runs every combination; here is one task a cell, each task of another kind.
"""

from __future__ import annotations

import pytest

from tests.dist.parity import Task, run_layout, run_plain, worst_difference

# float32 sums in another order, over ten steps; of the weights, Adam magnifies what rounding does to small gradients.
TOLERANCE = 1e-5

LAYOUTS = {
    2: ("ddp", "fsdp2", "tp2", "tp2 sequence", "zero1", "zero2", "zero3"),
    4: ("hsdp", "tp2", "hsdp x tp2", "zero1 x 2", "zero3 x 2 outer"),
}
KINDS = (
    # accumulation, defer, task
    (4, True, Task(is_short=True, is_masked=True, optimizer="sgd")),
    (1, True, Task(is_clipped=False, optimizer="adamw")),
    (4, False, Task(is_short=True, is_masked=True, is_lora=True, optimizer="sgd")),
    (4, True, Task(is_lora=True, optimizer="adamw")),
)


@pytest.fixture(scope="module")
def expected(one_rank, shared_data):
    return {task: one_rank.run(run_plain, task)[0] for _, _, task in KINDS}


@pytest.mark.parametrize(("world", "strategy"), [(world, name) for world, names in LAYOUTS.items() for name in names])
def test_ten_steps_equal_a_plain_loop(ranks, expected, world, strategy):
    # Where it takes long (tensor parallel; four ranks, which take turns on two cores) one task with everything uneven
    # and one with adapters, or either.
    kinds = KINDS if world == 2 and "tp" not in strategy else (KINDS[0], KINDS[3])
    if world == 4 and "tp" in strategy:
        kinds = (KINDS[0],) if strategy == "tp2" else (KINDS[3],)
    for accumulation, defer, task in kinds:
        for got in ranks[world].run(run_layout, strategy, accumulation, defer, task):
            assert max(worst_difference(got, expected[task])) < TOLERANCE, (accumulation, defer, task)
