"""Bring the ranks of a job together, and report the ones that did not come.

Rank 0 opens an attempt under a fresh name, every rank signs in there, and rank 0 announces how it ended. A store that
outlives the ranks (an agent's, after a restart) still holds what earlier attempts left: the name of the attempt keeps
that away from this one, and from the process group.
"""

from __future__ import annotations

import json
import os
import socket
import threading
import time
import uuid
from collections import defaultdict
from collections.abc import Iterable, Mapping
from contextlib import suppress
from datetime import timedelta

import torch.distributed as dist

from automodel.distributed.runtime.awake import poll_for
from automodel.environment import uses_agent_store
from automodel.types import RunError, UserError

RESOLVE_SEC = 5.0
"""How long the name of rank 0's node may be unknown; a cluster's name server can lag behind the nodes."""
ASTRAY_SEC = 15.0
"""How long an address that means this machine may refuse on another node than rank 0's; rank 0 may be late where two
nodes are one machine, as in a trial cluster."""
HOST_SEC = 10.0
"""How long rank 0 may need to reach its own store, and any rank at least to be answered by a store that listens."""
FAREWELL_SEC = 2.0
"""How long rank 0 keeps serving after a failure, so the others, which ask twice a second, can read what it was."""

MOST_NAMED = 12
"""The most ranks, or runs of them, and nodes that a message names: about a line of each."""

_ATTEMPT = "start/attempt"

_served: dict[int, dist.TCPStore] = {}
"""By port, the stores that this process serves: until it ends, so that peers can finish, or start once more."""


class StartError(RunError):
    """The ranks of the job did not come together; the message says which are missing."""


def rendezvous(rank: int, world_size: int, timeout_minutes: float) -> dist.Store:
    """Wait for all ranks at MASTER_ADDR and MASTER_PORT, and return a store that is this attempt's alone.

    Every rank must call it. Ctrl-C interrupts it at any time.

    Raises:
        StartError: some ranks did not come in time.
        UserError: the address or the port cannot be the right one.
    """
    store = _open_store(rank, timeout_minutes)
    store.set_timeout(timedelta(minutes=timeout_minutes))
    me = {"id": uuid.uuid4().hex, "host": socket.gethostname()}
    try:
        if rank == 0:
            attempt = _gather(store, me, world_size, timeout_minutes)
        else:
            attempt = _sign_in(store, me, rank, timeout_minutes)
    except dist.DistNetworkError as error:
        raise StartError(
            f"start-up: rank {rank} lost the store at {_address()}: rank 0, or its launcher, has ended. "
            "Its output shows the cause."
        ) from error
    return dist.PrefixStore(attempt, store)


def name_ranks(ranks: Iterable[int]) -> str:
    """Return the names of ranks, three or more in a row as ``3-7``, shortened to a line."""
    ranks = sorted(ranks)
    runs: list[list[int]] = []
    for rank in ranks:
        if runs and rank == runs[-1][-1] + 1:
            runs[-1].append(rank)
        else:
            runs.append([rank])
    parts = [f"{run[0]}-{run[-1]}" if len(run) > 2 else ", ".join(map(str, run)) for run in runs]
    if len(parts) > MOST_NAMED:
        parts[MOST_NAMED:] = [f"... ({len(ranks)} in all)"]
    return f"{'rank' if len(ranks) == 1 else 'ranks'} {', '.join(parts)}"


def _gather(store: dist.Store, me: Mapping, world_size: int, timeout_minutes: float) -> str:
    """Open an attempt on rank 0, wait for the others, and announce how it ended."""
    attempt = f"start/{me['id']}"
    keys = [f"{attempt}/rank/{rank}" for rank in range(world_size)]
    store.set(keys[0], json.dumps(me))
    store.set(_ATTEMPT, attempt)
    for _ in poll_for(60 * timeout_minutes):
        if store.check(keys):  # one request for any number of ranks
            break
    came = {rank: json.loads(store.get(key)) for rank, key in enumerate(keys) if store.check([key])}
    problem = _missing_message(came, world_size, timeout_minutes) if len(came) < world_size else None
    store.set(f"{attempt}/verdict", json.dumps({"ids": [one["id"] for one in came.values()], "problem": problem}))
    if problem is not None:
        time.sleep(FAREWELL_SEC)
        raise StartError(problem)
    return attempt


def _sign_in(store: dist.Store, me: Mapping, rank: int, timeout_minutes: float) -> str:
    """Sign in to the attempt that rank 0 has opened, and wait for its verdict."""
    attempt, verdict = "", None
    # Rank 0 may have come just in time itself, and then waits for the others as long again.
    for passed_sec in poll_for(2 * 60 * timeout_minutes):
        is_open = bool(attempt) and verdict is None
        if passed_sec > 60 * timeout_minutes and not is_open:
            break
        current = store.get(_ATTEMPT).decode() if store.check([_ATTEMPT]) else ""
        if current != attempt:
            attempt, verdict = current, None
            store.set(f"{attempt}/rank/{rank}", json.dumps(me))
        if attempt and verdict is None and store.check([f"{attempt}/verdict"]):
            verdict = json.loads(store.get(f"{attempt}/verdict"))
        # A verdict that does not list this process is from before a restart: rank 0 is yet to open the next attempt.
        if verdict is not None and me["id"] in verdict["ids"]:
            if verdict["problem"]:
                raise StartError(verdict["problem"])
            return attempt
    raise StartError(
        f"start-up: rank 0 did not come within {_minutes(timeout_minutes)} to the store at {_address()}, where rank "
        f"{rank} on {socket.gethostname()} waited. The output of rank 0 may show why."
    )


def _open_store(rank: int, timeout_minutes: float) -> dist.TCPStore:
    """Serve the job's store if this is rank 0 and no agent does, else connect to it."""
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    if rank == 0 and not uses_agent_store(os.environ):
        _resolve(host)
        if port not in _served:
            _served[port] = _serve(host, port)
        return _served[port]
    start = time.monotonic()
    _await_answer(host, port, rank, timeout_minutes)
    return _connect(host, port, 60 * timeout_minutes - (time.monotonic() - start), timeout_minutes)


def _serve(host: str, port: int) -> dist.TCPStore:
    here, limit = socket.gethostname(), timedelta(seconds=HOST_SEC)
    try:
        store = dist.TCPStore(
            "localhost", port, is_master=True, timeout=limit, wait_for_workers=False, multi_tenant=True
        )
    except dist.DistError as error:
        problem = f"rank 0 cannot serve at MASTER_PORT={port} on {here}: {error}"
        if "EADDRINUSE" in str(error):
            problem = (
                f"MASTER_PORT={port} is in use on {here}, perhaps by another job; export another port on every node "
                "(torchrun --standalone and launch.nproc_per_node find a free one themselves)"
            )
        raise UserError(problem) from error
    try:
        socket.create_connection((host, port), timeout=HOST_SEC).close()
    except OSError as error:
        raise UserError(
            f"rank 0 runs on {here} and cannot reach itself at {_address()} ({error.strerror or error}); "
            "give the name or address of that node, and a port that no firewall closes"
        ) from error
    return store


def _connect(host: str, port: int, seconds: float, timeout_minutes: float) -> dist.TCPStore:
    """Connect to the store; in a thread, because torch's own call waits forever for a listener that never speaks."""
    found: list[dist.TCPStore] = []
    limit_sec = max(seconds, HOST_SEC)

    def connect() -> None:
        with suppress(dist.DistError):
            found.append(dist.TCPStore(host, port, timeout=timedelta(seconds=limit_sec), wait_for_workers=False))

    thread = threading.Thread(target=connect, daemon=True)
    thread.start()
    thread.join(limit_sec)
    if not found:
        raise StartError(
            f"start-up: {_address()} answers, but not as the store of a job within {_minutes(timeout_minutes)}: "
            "another program may use the port; choose a free one."
        )
    return found[0]


def _resolve(host: str) -> list[str]:
    """Return the addresses of ``host``."""
    problem: Exception | None = None
    for _ in poll_for(RESOLVE_SEC):
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
    addresses, problem = _resolve(host), None
    node = os.environ.get("GROUP_RANK", os.environ.get("SLURM_NODEID", "0"))
    is_astray = node != "0" and host != socket.gethostname() and all(a.startswith(("127.", "::1")) for a in addresses)
    for passed_sec in poll_for(60 * timeout_minutes):
        try:
            return socket.create_connection((host, port), timeout=2).close()
        except OSError as error:
            problem = error
        if is_astray and passed_sec > ASTRAY_SEC:
            raise UserError(
                f"MASTER_ADDR={host} means {socket.gethostname()} itself here ({addresses[0]}), but this process is on "
                f"node {node} and rank 0 on node 0; give the name of rank 0's node"
            )
    raise StartError(
        f"start-up: rank 0 did not come within {_minutes(timeout_minutes)}: rank {rank} on {socket.gethostname()} got "
        f"no answer at {_address()} ({addresses[0]}: {problem.strerror or problem}). If the output of rank 0 shows "
        "that it waits as well, check that this is its node's address and that no firewall closes the port."
    )


def _address() -> str:
    return f"MASTER_ADDR={os.environ['MASTER_ADDR']} MASTER_PORT={os.environ['MASTER_PORT']}"


def _missing_message(came: Mapping[int, Mapping], world_size: int, timeout_minutes: float) -> str:
    hosts: dict[str, list[int]] = defaultdict(list)
    for rank, one in came.items():
        hosts[one["host"]].append(rank)
    shown = ", ".join([f"{name_ranks(ranks)} ({host})" for host, ranks in hosts.items()][:MOST_NAMED])
    more = f" and those of {len(hosts) - MOST_NAMED} more nodes" if len(hosts) > MOST_NAMED else ""
    missing = name_ranks(set(range(world_size)) - came.keys())
    return (
        f"start-up: {missing} did not come within {_minutes(timeout_minutes)}; {shown}{more} came. The output of the "
        f"missing ones may show why: they ended before, were not started, or cannot reach {_address()}."
    )


def _minutes(minutes: float) -> str:
    return "1 minute" if minutes == 1 else f"{minutes:g} minutes"
