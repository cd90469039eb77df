"""Groups and waits beside the training's own: gloo groups with their own time-out, and waits at the job's store.

A group costs each rank a socket for every other rank, and a connection to the store costs its host one for every rank.
So there is one such group at a time, and a rank that only waits polls the store over the connection that it has: each
request is short and blocks nobody.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from datetime import timedelta

import torch.distributed as dist
from torch.distributed import distributed_c10d

from automodel.distributed.runtime.awake import poll_for
from automodel.distributed.runtime.dist_info import get_store
from automodel.distributed.runtime.watchdog import no_stall_within

TEN_HOURS = timedelta(hours=10)
"""For waits that only a dead job exceeds: a download or a cache of a large data set may take hours."""
NAME_PREFIX = "side/"
"""How the names of these groups begin, by which training's time-out leaves them alone."""

_uses: Counter[str] = Counter()


def _create_gloo_group(timeout: timedelta = TEN_HOURS, ranks: Sequence[int] | None = None) -> dist.ProcessGroup | None:
    """Return a new gloo group of ``ranks`` (all by default) with its own ``timeout``; None without a process group.

    Only the members call it, which is why ``torch.distributed.new_group`` is not used: it either needs all ranks of
    the job, or (``use_local_synchronization``) names the group after the number of groups that a rank has, so that
    members with unequal numbers never find each other, and a name that is used twice finds the old addresses.

    Raises:
        RuntimeError: some members did not come within ``timeout``.
    """
    if not dist.is_initialized():
        return None
    ranks = sorted(ranks) if ranks is not None else list(range(dist.get_world_size()))
    name = NAME_PREFIX + fresh_name("group", ranks)
    # torch's own wait for the others would hold the job's store all the while.
    if not barrier_at_store(dist.PrefixStore(f"{name}/arrived", get_store()), len(ranks), timeout):
        raise RuntimeError(f"not all ranks came within {timeout.total_seconds():g} s")
    group, _ = distributed_c10d._new_process_group_helper(
        len(ranks), ranks.index(dist.get_rank()), ranks, dist.Backend("gloo"), get_store(), name, timeout=timeout
    )
    distributed_c10d._world.pg_group_ranks[group] = {member: index for index, member in enumerate(ranks)}
    return group


def _barrier_with_timeout(timeout: timedelta, group: dist.ProcessGroup | None = None) -> bool:
    """Return whether all ranks of ``group`` (all by default) came within ``timeout``; all get the same answer.

    Each of them must call it. It waits at the job's store and not in a collective, so ``timeout`` applies and not the
    group's own one, and the group can still be used after a False. A rank that comes late gets False at once.
    """
    if not dist.is_initialized():
        return True
    ranks = dist.get_process_group_ranks(group or dist.group.WORLD)
    try:
        return barrier_at_store(dist.PrefixStore(fresh_name("barrier", ranks), get_store()), len(ranks), timeout)
    except RuntimeError:  # the store has gone with its host
        return False


def barrier_at_store(store: dist.Store, num_ranks: int, timeout: timedelta) -> bool:
    """Wait until ``num_ranks`` ranks have called this with the same fresh ``store``; all get False if one was late."""
    if num_ranks == 1:
        return True
    if store.add("num_arrived", 1) == num_ranks:
        store.compare_set("verdict", "", "complete")
    with no_stall_within(timeout):
        for _ in poll_for(timeout.total_seconds()):
            if store.check(["verdict"]):
                break
    return store.compare_set("verdict", "", "late") == b"complete"


def fresh_name(purpose: str, ranks: Sequence[int]) -> str:
    """Return a name that these ranks share and never had before; each must ask for it equally often."""
    key = f"{purpose}/{hashlib.sha256(json.dumps(list(ranks)).encode()).hexdigest()[:16]}"
    _uses[key] += 1
    return f"{key}/{_uses[key]}"
