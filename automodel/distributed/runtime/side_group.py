"""Groups and waits beside the training's own: gloo groups with a time-out of their own, and waits at the job's store.

Every group costs each rank a socket for each other rank, and every connection to the store costs its host one for each
rank. So there is one such group at a time, and what only waits asks the store again and again over the connection that
is there: such a request is short and holds up nobody.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta

import torch.distributed as dist
from torch.distributed import distributed_c10d

from automodel.distributed.runtime import watchdog
from automodel.distributed.runtime.awake import moments
from automodel.distributed.runtime.dist_info import get_store

TEN_HOURS = timedelta(hours=10)
NAME_PREFIX = "side/"
"""How the names of these groups begin; each has a time-out of its own, that of training does not concern it."""

_uses: Counter[str] = Counter()


def _create_gloo_group(timeout: timedelta = TEN_HOURS, ranks: Sequence[int] | None = None) -> dist.ProcessGroup | None:
    """Return a new gloo group of ``ranks`` (all by default) with its own ``timeout``; None without a process group.

    Only the members call it, which is why ``torch.distributed.new_group`` is not used: it either needs all ranks
    of the job, or (``use_local_synchronization``) names the group after the number of groups that a rank has, so
    that members with unequal numbers never meet, and a name that comes again finds the old addresses in the store.

    Raises:
        RuntimeError: some members did not come within ``timeout``.
    """
    if not dist.is_initialized():
        return None
    rank = dist.get_rank()
    ranks = sorted(ranks) if ranks is not None else list(range(dist.get_world_size()))
    name = NAME_PREFIX + fresh_name("group", ranks)
    # torch's own wait for the others would hold the job's store all the while.
    if not arrive(dist.PrefixStore(f"{name}/arrived", get_store()), len(ranks), timeout):
        raise RuntimeError(f"not all ranks came within {timeout.total_seconds():g} s")
    group, _ = distributed_c10d._new_process_group_helper(
        len(ranks), ranks.index(rank), ranks, dist.Backend("gloo"), get_store(), name, timeout=timeout
    )
    distributed_c10d._world.pg_group_ranks[group] = {member: index for index, member in enumerate(ranks)}
    return group


def _barrier_with_timeout(timeout: timedelta, group: dist.ProcessGroup | None = None) -> bool:
    """Return whether all ranks of ``group`` (all by default) came within ``timeout``: the same answer to all of them.

    Each of them must call it. It waits at the job's store and not in a collective, so that ``timeout`` counts
    whatever the group's own one is, and the group can still be used after a False. A rank that comes late hears
    False at once.
    """
    if not dist.is_initialized():
        return True
    ranks = dist.get_process_group_ranks(group or dist.group.WORLD)
    try:
        return arrive(dist.PrefixStore(fresh_name("barrier", ranks), get_store()), len(ranks), timeout)
    except RuntimeError:  # the store has gone with its host
        return False


def arrive(store: dist.Store, num_ranks: int, timeout: timedelta) -> bool:
    """Wait until so many ranks called it with the same fresh ``store``; False, to all of them, where one was late."""
    if num_ranks == 1:
        return True
    if store.add("num_arrived", 1) == num_ranks:
        store.compare_set("verdict", "", "met")
    with no_stall_within(timeout):
        for _ in moments(timeout.total_seconds()):
            if store.check(["verdict"]):
                break
    return store.compare_set("verdict", "", "late") == b"met"


def fresh_name(purpose: str, ranks: Sequence[int]) -> str:
    """Return a name that these ranks have in common and never had before; each must ask for it equally often."""
    key = f"{purpose}/{hashlib.sha256(json.dumps(list(ranks)).encode()).hexdigest()[:16]}"
    _uses[key] += 1
    return f"{key}/{_uses[key]}"


@contextmanager
def no_stall_within(timeout: timedelta) -> Iterator[None]:
    """Have the watchdog take a wait as long as ``timeout`` for nothing unusual."""
    before = watchdog._limit_sec
    watchdog._limit_sec = max(before, timeout.total_seconds())
    try:
        yield
    finally:
        watchdog._limit_sec = before
