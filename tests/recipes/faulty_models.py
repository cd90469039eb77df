"""Models whose loading goes wrong on one rank alone; named as a user would name a model of their own."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from typing import Any

import torch.distributed as dist

from automodel.models.demo import DemoModel


def _raise() -> None:
    raise ValueError("this rank went wrong on purpose")


def _on_last_rank(action: Callable[[], Any]) -> type[DemoModel]:
    class Faulty(DemoModel):
        def build(self, *args: Any, **options: Any) -> Any:
            if dist.get_rank() == dist.get_world_size() - 1:
                action()
            return super().build(*args, **options)

    return Faulty


Raises = _on_last_rank(_raise)
Exits = _on_last_rank(lambda: os._exit(0))
Killed = _on_last_rank(lambda: os.kill(os.getpid(), signal.SIGKILL))
Sleeps = _on_last_rank(lambda: time.sleep(600))
Stopped = _on_last_rank(lambda: os.kill(os.getpid(), signal.SIGSTOP))
