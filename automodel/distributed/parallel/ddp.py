"""Strategy ``ddp``: the whole model on every rank, gradients averaged by torch's DistributedDataParallel."""

from __future__ import annotations

import inspect
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING

from automodel.distributed.parallel.layers import enable_activation_checkpointing
from automodel.distributed.parallel.precision import MixedOrPurePrecision, compute_dtype
from automodel.distributed.parallel.strategy import build_mesh

if TYPE_CHECKING:
    import torch
    from torch import nn
    from torch.distributed.device_mesh import DeviceMesh

    from automodel.distributed.runtime.dist_info import DistInfo


@dataclass(frozen=True)
class DDP:
    """What ``distributed=ddp`` configures; see ``conf/distributed/ddp.yaml``."""

    defer_grad_sync: bool = True
    mixed_precision: MixedOrPurePrecision = "auto"
    activation_checkpointing: bool = False

    name = "ddp"
    is_sharded = False
    length_multiple = 1

    def build_mesh(self, dist_info: DistInfo) -> DeviceMesh:
        """Return the mesh of replicas; every rank must call it."""
        return build_mesh(dist_info, dp_replicate_size=dist_info.world_size)

    def parallelize(self, model: nn.Module, *, dist_info: DistInfo, mesh: DeviceMesh) -> nn.Module:
        """Move ``model`` to the device and wrap it; a single rank has nothing to average and stays plain."""
        from torch.nn.parallel import DistributedDataParallel

        model.to(dist_info.device)
        if self.activation_checkpointing:
            enable_activation_checkpointing(model)
        if dist_info.world_size == 1:
            return model
        device_ids = [dist_info.device.index] if dist_info.device.type == "cuda" else None
        # The models' buffers (rotary frequencies) never change; torch 2.13 gave the option another name.
        options = inspect.signature(DistributedDataParallel).parameters
        sync_buffers = "forward_sync_buffers" if "forward_sync_buffers" in options else "broadcast_buffers"
        return DistributedDataParallel(
            model, device_ids=device_ids, gradient_as_bucket_view=True, **{sync_buffers: False}
        )

    def device_of_shards(self, dist_info: DistInfo) -> torch.device | None:
        """Return None: ``parallelize`` takes a model with its weights alone."""
        return None

    def prepare_optimizer(self, optimizer: torch.optim.Optimizer, model: nn.Module) -> None:
        """Leave ``optimizer`` as it is."""

    def autocast(self, device: torch.device) -> AbstractContextManager:
        """Return the context of a forward: mixed precision with the weights kept as they are."""
        import torch

        dtype = compute_dtype(self.mixed_precision, device)
        return nullcontext() if dtype is None else torch.autocast(device.type, dtype=dtype)
