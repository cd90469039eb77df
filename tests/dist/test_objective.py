"""An objective's sums are added over micro-batches and ranks and divided once; wrong ones are refused."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
import torch.distributed as dist

from automodel.data.batches.batch import Batch
from automodel.losses.objective import Sums, as_objective
from automodel.train.step import StepConfig, StepResult, train_step
from automodel.types import RunError, UserError
from tests.dist.pool import RankPool


@pytest.fixture(scope="module")
def two_ranks():
    pool = RankPool(2)
    yield pool
    pool.close()


class Halved:
    """Counts half of the labels, and logs two terms."""

    def count(self, batch: Batch) -> int:
        return batch.num_label_tokens // 2

    def __call__(self, model: torch.nn.Module, batch: Batch) -> Sums:
        loss = model(batch["x"]).sum()
        return Sums(loss, {"twice": 2 * loss, "rows": torch.tensor(float(len(batch.labels)))})


def step(objective: object) -> StepResult:
    """Take a step with two micro-batches on each rank: x is 1 and 2 on rank 0, 3 and 4 on rank 1."""
    torch.manual_seed(0)
    model = torch.nn.Linear(1, 1, bias=False)
    torch.nn.init.ones_(model.weight)
    first = 1 + 2 * dist.get_rank()
    batches = [Batch({"x": torch.full((2, 1), float(x))}, torch.zeros(2, dtype=torch.long)) for x in (first, first + 1)]
    config = StepConfig(torch.device("cpu"), dist.group.WORLD, True, None, nullcontext)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    return train_step(model, batches, objective=as_objective(objective), optimizer=optimizer, config=config,
                      is_first=True)  # fmt: skip


def figures() -> tuple[float, dict[str, float], int, int]:
    result = step(Halved())
    return result.loss_sum.item(), {k: v.item() for k, v in result.terms.items()}, result.count, result.num_label_tokens


def test_sums_and_counts_are_those_of_all_micro_batches_on_all_ranks(two_ranks):
    expected = (2 * (1 + 2 + 3 + 4.0), {"rows": 8.0, "twice": 40.0}, 4, 8)
    assert two_ranks.run(figures) == [expected] * 2


def differing_terms() -> str:
    def objective(model: torch.nn.Module, batch: Batch) -> Sums:
        loss = model(batch["x"]).sum()
        return Sums(loss, {"a": loss} if dist.get_rank() else {"b": loss})

    with pytest.raises(RunError) as caught:
        step(objective)
    return str(caught.value)


def test_terms_of_other_names_on_another_rank_are_an_error_on_both(two_ranks):
    one, other = two_ranks.run(differing_terms)
    assert one == other and one.endswith("found: a and b")


@pytest.mark.parametrize(
    ("result", "found"),
    [(torch.ones(3), r"not \[3\]"), (1.5, "not float"), (Sums(torch.ones(()), {"t": [1]}), "not list")],
)
def test_what_is_no_scalar_sum_is_refused(result, found):
    with pytest.raises(UserError, match=f"must be a scalar tensor, the SUM over the supervised examples.*{found}"):
        as_objective(lambda model, batch: result)(None, None)
