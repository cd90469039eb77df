"""Process groups shared by the tests of a module."""

from collections.abc import Iterator

import pytest

from tests.dist.pool import RankPool


def _pool(world_size: int) -> Iterator[RankPool]:
    pool = RankPool(world_size)
    yield pool
    pool.close()


@pytest.fixture(scope="module")
def one_rank() -> Iterator[RankPool]:
    yield from _pool(1)


@pytest.fixture(scope="module")
def two_ranks() -> Iterator[RankPool]:
    yield from _pool(2)


@pytest.fixture(scope="module")
def four_ranks() -> Iterator[RankPool]:
    yield from _pool(4)


@pytest.fixture(scope="module")
def ranks(one_rank: RankPool, two_ranks: RankPool, four_ranks: RankPool) -> dict[int, RankPool]:
    return {1: one_rank, 2: two_ranks, 4: four_ranks}
