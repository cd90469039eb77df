"""Bring the ranks of a job together, and say which of them did not come.

Rank 0 opens an attempt under a name of its own, every rank signs in there, and rank 0 tells all of them how it ended.
A store that outlives the ranks (an agent's, after a restart) still holds what earlier attempts left: the name of the
attempt keeps that away from this one, and from the process group.
"""

from __future__ import annotations

import json
import os
import socket
import threading
import time
import uuid
from collections import defaultdict
from collections.abc import Collection, Mapping
from contextlib import suppress
from datetime import timedelta

import torch.distributed as dist

from automodel.distributed.runtime.awake import moments
from automodel.environment import is_loopback, other_node, uses_agent_store
from automodel.types import RunError, UserError

RESOLVE_SEC = 5.0
"""How long the name of rank 0's node may be unknown; a cluster's name server can lag behind the nodes."""
REFUSED_SEC = 15.0
"""How long an address that means this node itself may refuse, where rank 0 is on another: two nodes can be one machine,
as in a trial cluster, and rank 0 late."""
HOST_SEC = 10.0
"""How long rank 0 may need to reach its own store, and any rank at least to be heard by one that listens."""
FAREWELL_SEC = 2.0
"""How long rank 0 goes on serving after a failure, for the others to read what it was."""

MOST_NAMED = 12
"""So many ranks, or runs of them, and nodes a message names."""

_ATTEMPT = "start/attempt"

_served: dict[int, dist.TCPStore] = {}
"""By port, the stores that this process serves: until it ends, so that peers can finish, or start once more."""


class StartError(RunError):
    """The ranks of the job did not come together; the message says which are missing."""


def meet(rank: int, world_size: int, timeout_minutes: float) -> dist.Store:
    """Wait for all ranks at MASTER_ADDR and MASTER_PORT, and return a store that is this attempt's alone.

    Every rank must call it. It can be interrupted by Ctrl-C at any time.

    Raises:
        StartError: some ranks did not come in time.
        UserError: the address or the port cannot be the right one.
    """
    store = _open_store(rank, timeout_minutes)
    store.set_timeout(timedelta(minutes=timeout_minutes))
    me = {"id": uuid.uuid4().hex, "host": socket.gethostname(), "pid": os.getpid()}
    try:
        if rank == 0:
            attempt = _gather(store, me, world_size, timeout_minutes)
        else:
            attempt = _sign_in(store, me, rank, timeout_minutes)
    except dist.DistNetworkError as error:
        raise StartError(
            f"start-up: rank {rank} lost the store at {_address()}: rank 0, or its launcher, has ended. "
            "Look at its output for the cause."
        ) from error
    return dist.PrefixStore(attempt, store)


def _gather(store: dist.Store, me: Mapping, world_size: int, timeout_minutes: float) -> str:
    """Open an attempt on rank 0, wait for the others, and tell them how it ended."""
    attempt = f"start/{me['id']}"
    keys = [f"{attempt}/rank/{rank}" for rank in range(world_size)]
    store.set(keys[0], json.dumps(me))
    store.set(_ATTEMPT, attempt)
    problem = None
    for _ in moments(60 * timeout_minutes):
        if store.check(keys):  # one request, however many ranks there are
            came = dict(enumerate(map(json.loads, store.multi_get(keys))))
            break
    else:
        came = {rank: json.loads(store.get(key)) for rank, key in enumerate(keys) if store.check([key])}
        problem = _missing_message(came, world_size, timeout_minutes)
    store.set(f"{attempt}/verdict", json.dumps({"ids": [one["id"] for one in came.values()], "problem": problem}))
    if problem is not None:
        time.sleep(FAREWELL_SEC)
        raise StartError(problem)
    return attempt


def _sign_in(store: dist.Store, me: Mapping, rank: int, timeout_minutes: float) -> str:
    """Sign in to the attempt that rank 0 has opened, and wait for what it says."""
    attempt, verdict = "", None
    # Rank 0 may have come just in time itself, and then waits for the others as long again.
    for passed_sec in moments(2 * 60 * timeout_minutes):
        is_open = bool(attempt) and verdict is None
        if passed_sec > 60 * timeout_minutes and not is_open:
            break
        current = store.get(_ATTEMPT).decode() if store.check([_ATTEMPT]) else ""
        if current != attempt:
            attempt, verdict = current, None
            store.set(f"{attempt}/rank/{rank}", json.dumps(me))
        if attempt and verdict is None and store.check([f"{attempt}/verdict"]):
            verdict = json.loads(store.get(f"{attempt}/verdict"))
        # One that does not know this process was reached before a restart: rank 0 is still to open the next attempt.
        if verdict is not None and me["id"] in verdict["ids"]:
            if verdict["problem"]:
                raise StartError(verdict["problem"])
            return attempt
    raise StartError(_no_rank_0_message(rank, timeout_minutes, verdict))


def _open_store(rank: int, timeout_minutes: float) -> dist.TCPStore:
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    if rank == 0 and not uses_agent_store(os.environ):
        _resolve(host)
        if port not in _served:
            _served[port] = _serve(host, port)
        return _served[port]
    start = time.monotonic()
    _await_answer(host, port, rank, timeout_minutes)
    return _connect(host, port, 60 * timeout_minutes - (time.monotonic() - start), timeout_minutes)


def _connect(host: str, port: int, seconds: float, timeout_minutes: float) -> dist.TCPStore:
    """Connect to the store; in a thread, since a listener that never speaks would hold torch's own call up forever."""
    found: list[dist.TCPStore] = []

    def connect() -> None:
        with suppress(dist.DistError):
            limit = timedelta(seconds=max(seconds, HOST_SEC))
            found.append(dist.TCPStore(host, port, timeout=limit, wait_for_workers=False))

    thread = threading.Thread(target=connect, daemon=True)
    thread.start()
    thread.join(max(seconds, HOST_SEC))
    if not found:
        raise StartError(
            f"start-up: {_address()} answers, but not as the store of a job within {_minutes(timeout_minutes)}: "
            "another program may use the port; choose a free one."
        )
    return found[0]


def _serve(host: str, port: int) -> dist.TCPStore:
    here = socket.gethostname()
    limit = timedelta(seconds=HOST_SEC)
    try:
        store = dist.TCPStore(
            "localhost", port, is_master=True, timeout=limit, wait_for_workers=False, multi_tenant=True
        )
    except dist.DistError as error:
        problem = f"rank 0 cannot serve at MASTER_PORT={port} on {here}: {error}"
        if "EADDRINUSE" in str(error):
            problem = (
                f"MASTER_PORT={port} is in use on {here}, by another job perhaps; export another port on every node "
                "(torchrun --standalone and launch.nproc_per_node find a free one themselves)"
            )
        elif "EACCES" in str(error):
            problem = f"MASTER_PORT={port} may not be used on {here} without more rights; choose one from 1024 up"
        raise UserError(problem) from error
    try:
        socket.create_connection((host, port), timeout=HOST_SEC).close()
    except OSError as error:
        raise UserError(
            f"rank 0 runs on {here} and cannot reach itself at {_address()} ({error.strerror or error}); "
            "give the name or address of that node, and a port that no firewall closes"
        ) from error
    return store


def _resolve(host: str) -> list[str]:
    """Return the addresses of ``host``."""
    problem: Exception | None = None
    for _ in moments(RESOLVE_SEC):
        try:
            return [str(found[4][0]) for found in socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)]
        except (socket.gaierror, UnicodeError) as error:
            problem = error
    raise UserError(
        f"MASTER_ADDR={host} is not known on {socket.gethostname()} ({problem}); "
        "give a name that every node can resolve, or an address"
    )


def _await_answer(host: str, port: int, rank: int, timeout_minutes: float) -> None:
    """Return once something listens there."""
    addresses = _resolve(host)
    where = other_node(os.environ)
    is_astray = where is not None and all(map(is_loopback, addresses)) and host != socket.gethostname()
    problem: OSError | None = None
    for passed_sec in moments(60 * timeout_minutes):
        try:
            socket.create_connection((host, port), timeout=2).close()
            return
        except OSError as error:
            problem = error
        if is_astray and passed_sec > REFUSED_SEC:
            raise UserError(
                f"MASTER_ADDR={host} means {socket.gethostname()} itself here ({addresses[0]}), but this process "
                f"is on another node than rank 0 ({where}); give the name of rank 0's node"
            )
    raise StartError(
        f"start-up: rank 0 did not come within {_minutes(timeout_minutes)}: rank {rank} on {socket.gethostname()} "
        f"got no answer at {_address()} ({problem.strerror or problem}). Look at the output of rank 0; if it waits as "
        "well, see that this is its node's address and that no firewall closes the port."
    )


def _address() -> str:
    return f"MASTER_ADDR={os.environ['MASTER_ADDR']} MASTER_PORT={os.environ['MASTER_PORT']}"


def _missing_message(came: Mapping[int, Mapping], world_size: int, timeout_minutes: float) -> str:
    hosts: dict[str, list[int]] = defaultdict(list)
    for rank, one in came.items():
        hosts[one["host"]].append(rank)
    shown = ", ".join([f"{_ranks(ranks)} ({host})" for host, ranks in hosts.items()][:MOST_NAMED])
    more = f" and those of {len(hosts) - MOST_NAMED} more nodes" if len(hosts) > MOST_NAMED else ""
    missing = set(range(world_size)) - came.keys()
    return (
        f"start-up: {_ranks(missing)} did not come within {_minutes(timeout_minutes)}; {shown}{more} came. "
        "Look at the output of those that did not: they ended before, were not started, or cannot reach "
        f"{_address()}."
    )


def _no_rank_0_message(rank: int, timeout_minutes: float, verdict: dict | None) -> str:
    twin = f", or another process was started with RANK={rank} too" if verdict is not None else ""
    return (
        f"start-up: rank 0 did not come within {_minutes(timeout_minutes)} to the store at {_address()}, where rank "
        f"{rank} on {socket.gethostname()} waited{twin}. Look at the output of rank 0."
    )


def _minutes(minutes: float) -> str:
    return "1 minute" if minutes == 1 else f"{minutes:g} minutes"


def _ranks(ranks: Collection[int]) -> str:
    """Return ranks in words, three and more in a row as ``3-7``, and no more than a line can hold."""
    runs: list[list[int]] = []
    for rank in sorted(ranks):
        if runs and rank == runs[-1][-1] + 1:
            runs[-1].append(rank)
        else:
            runs.append([rank])
    parts = [f"{run[0]}-{run[-1]}" if len(run) > 2 else ", ".join(map(str, run)) for run in runs]
    if len(parts) > MOST_NAMED:
        parts[MOST_NAMED:] = [f"... ({len(ranks)} in all)"]
    return f"{'rank' if len(ranks) == 1 else 'ranks'} {', '.join(parts)}"
