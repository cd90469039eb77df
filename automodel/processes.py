"""Which processes can see each other, and whether one of them lives; free of torch."""

from __future__ import annotations

import os
import socket


def process_space() -> str:
    """Return what processes must share for one to see whether the other lives: a host, and a container on it."""
    try:
        return f"{socket.gethostname()}/{os.readlink('/proc/self/ns/pid')}"
    except OSError:  # a system without /proc
        return socket.gethostname()


def is_alive(pid: int) -> bool:
    """Return whether process ``pid`` of this space lives; a stopped one does."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"  # a zombie is dead, only not yet collected
    except OSError:
        return not os.path.isdir("/proc")  # a system without it; else the process went a moment ago
