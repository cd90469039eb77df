"""How many files a rank may hold open: every connection to another rank is one."""

from __future__ import annotations

import resource

from automodel.logs import get_logger

log = get_logger(__name__)

FILES_PER_RANK = 4
"""Rank 0's connections with each other rank: one in the main group, one in a side group (saves, a first rank per node),
and two to the store that it serves (main thread, watchdog); ``python -m benchmarks.open_files`` counts them."""
OWN_FILES = 256
"""For everything else: rows, weights, checkpoints, the loader's workers."""


def allow_open_files(world_size: int, *, is_main: bool) -> None:
    """Raise this process's limit of open files as far as allowed; rank 0 warns if that is too low for the job."""
    limit, highest = resource.getrlimit(resource.RLIMIT_NOFILE)
    if limit != highest:
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (highest, highest))
            limit = highest
        except (ValueError, OSError):  # macOS calls its highest limit infinite and then refuses it
            log.debug("the limit of %d open files stays", limit)
    needed = FILES_PER_RANK * world_size + OWN_FILES
    if is_main and limit != resource.RLIM_INFINITY and limit < needed:
        log.warning(
            "rank 0 needs about %d open files for %d ranks, and its system allows %d (ulimit -Hn). If the start "
            'fails with "Too many open files", raise the limit: LimitNOFILE= of the service that starts the ranks '
            "(slurmd, the container runtime), or /etc/security/limits.conf",
            needed, world_size, limit,
        )  # fmt: skip
