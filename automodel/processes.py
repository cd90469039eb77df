"""Which processes can see each other, whether one of them lives, and how this one handles signals; free of torch."""

from __future__ import annotations

import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType


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
        return not os.path.isdir("/proc")  # a system without it; else the process ended a moment ago


@contextmanager
def signal_handler(
    handler: Callable[[int, FrameType | None], object] | signal.Handlers, *signals: int
) -> Iterator[None]:
    """Handle ``signals`` by ``handler`` during the block, then restore the previous handlers.

    Outside of the main thread, which alone may set handlers and is the one that signals interrupt, it does nothing.
    """
    if threading.current_thread() is not threading.main_thread():
        signals = ()
    # A handler installed by C code is None here, and could not be restored.
    before = {signum: found for signum in signals if (found := signal.getsignal(signum)) is not None}
    for signum in before:
        signal.signal(signum, handler)
    try:
        yield
    finally:
        for signum, found in before.items():
            signal.signal(signum, found)
