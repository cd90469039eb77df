"""Where a recipe runs: the ranks, their mesh, the strategy and the precision."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from torch.distributed.device_mesh import DeviceMesh

from automodel.config import Config
from automodel.distributed.parallel.precision import Precision, resolve_precision
from automodel.distributed.parallel.strategy import DataParallel, Strategy, data_parallel
from automodel.distributed.runtime.agreement import collective_timeout, set_collective_timeout
from automodel.distributed.runtime.dist_info import DistInfo
from automodel.runner.build import build
from automodel.types import UserError


@dataclass
class Job:
    """The ranks that run a configuration; every rank must make one, which forms the groups of the mesh."""

    cfg: Config
    dist_info: DistInfo
    precision: Precision = field(init=False)
    strategy: Strategy = field(init=False)
    mesh: DeviceMesh = field(init=False)
    dp: DataParallel = field(init=False)

    def __post_init__(self) -> None:
        cfg, device = self.cfg, self.dist_info.device
        attention = str(cfg.model.get("attn_implementation"))
        if device.type == "cpu" and attention.startswith("flash_attention"):
            raise UserError(f"model.attn_implementation={attention} needs a GPU, and this run has none; choose sdpa")
        if cfg.peft is not None and cfg.peft.get("quantization") and device.type != "cuda":
            raise UserError(
                f"peft.quantization={cfg.peft['quantization']} (peft=qlora) needs a CUDA device, and this run has "
                f"{device.type} alone; choose peft=lora"
            )
        self.precision = resolve_precision(cfg.model, cfg.distributed, is_frozen=cfg.peft is not None, device=device)
        self.strategy = build(cfg.distributed | self.precision.of_strategy)
        self.mesh = self.strategy.build_mesh(self.dist_info)
        self.dp = data_parallel(self.mesh)
        set_collective_timeout(cfg.dist_env.init_timeout_minutes)  # for the groups of the mesh too

    @property
    def autocast(self) -> Callable[[], AbstractContextManager]:
        """What makes the context of a forward."""
        return partial(self.strategy.autocast, self.dist_info.device)

    @property
    def forward_place(self) -> dict[str, Any]:
        """Where and in what precision a model is evaluated, as keyword arguments."""
        return {"device": self.dist_info.device, "dp_group": self.dp.group, "autocast": self.autocast}

    def slow_phase(self) -> AbstractContextManager:
        """Give collectives the longer time-out of start-up, evaluation and saves in the block."""
        minutes = self.cfg.dist_env
        return collective_timeout(minutes.init_timeout_minutes, then_minutes=minutes.timeout_minutes)
