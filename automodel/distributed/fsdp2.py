"""Strategy ``fsdp2``: parameters, gradients and optimizer state sharded by torch's ``fully_shard``."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING

from automodel.distributed.layers import decoder_layers, enable_activation_checkpointing
from automodel.distributed.mesh import SHARD_AXIS, build_mesh
from automodel.distributed.precision import MixedPrecision, compute_dtype

if TYPE_CHECKING:
    import torch
    from torch import nn
    from torch.distributed.device_mesh import DeviceMesh

    from automodel.distributed.dist_info import DistInfo


@dataclass(frozen=True)
class FSDP2:
    """What ``distributed=fsdp2`` configures; see ``conf/distributed/fsdp2.yaml``."""

    defer_grad_sync: bool = True
    mixed_precision: MixedPrecision = "auto"
    dp_replicate_size: int = 1
    reshard_after_forward: bool = True
    cpu_offload: bool = False
    activation_checkpointing: bool = False

    name = "fsdp2"
    is_sharded = True

    def build_mesh(self, dist_info: DistInfo) -> DeviceMesh:
        """Return the mesh (replicas, shards); every rank must call it."""
        return build_mesh(dist_info, dp_replicate_size=self.dp_replicate_size)

    def parallelize(self, model: nn.Module, *, dist_info: DistInfo, mesh: DeviceMesh) -> nn.Module:
        """Shard ``model`` in place, a unit for each decoder layer and one for the rest; every rank must call it."""
        import torch
        from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy, fully_shard

        if self.activation_checkpointing:
            enable_activation_checkpointing(model)
        dtype = compute_dtype(self.mixed_precision, dist_info.device)
        precision = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32 if dtype else None)
        has_accelerator = dist_info.device.type != "cpu"
        options = {
            "mesh": mesh if self.dp_replicate_size > 1 else mesh[SHARD_AXIS],
            "mp_policy": precision,
            "offload_policy": CPUOffloadPolicy(pin_memory=has_accelerator) if self.cpu_offload else OffloadPolicy(),
        }
        for layer in decoder_layers(model):
            fully_shard(layer, reshard_after_forward=self.reshard_after_forward, **options)
        return fully_shard(model, **options)

    def autocast(self, device: torch.device) -> AbstractContextManager:
        """Return the context of a forward: none, since the sharded units cast by themselves."""
        return nullcontext()
