"""A rank opens as many files as its system lets it, and few of them for each other rank."""

from __future__ import annotations

import multiprocessing
import resource

import pytest

from automodel.distributed.runtime.open_files import allow_open_files
from benchmarks.open_files import count


def limits_after(soft: int, hard: int, world_size: int, queue) -> None:
    import logging

    told: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: told.append(record.getMessage())
    logging.getLogger("automodel").addHandler(handler)
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    allow_open_files(world_size, is_main=True)
    queue.put((resource.getrlimit(resource.RLIMIT_NOFILE), told))


@pytest.mark.parametrize(("world_size", "is_told"), [(32, False), (200, True)])
def test_the_limit_of_open_files_is_raised_and_told_where_it_is_too_low(world_size, is_told):
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    process = context.Process(target=limits_after, args=(200, 800, world_size, queue))
    process.start()
    limits, told = queue.get(timeout=60)
    process.join()
    assert limits == (800, 800)
    if not is_told:
        assert told == []
        return
    (line,) = told
    assert "rank 0 needs about 1056 open files for 200 ranks, and its system allows 800" in line


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_rank_0_opens_four_files_for_each_further_rank(strategy):
    few, many = (max(files for _, files in count(ranks, strategy, {}).values()) for ranks in (2, 6))
    assert many - few <= 4 * (6 - 2)
