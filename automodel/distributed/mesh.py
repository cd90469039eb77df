"""The device mesh of a run, and the data-parallel ranks that it stands for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    import torch
    import torch.distributed as dist
    from torch import nn
    from torch.distributed.device_mesh import DeviceMesh
    from torch.optim import Optimizer

    from automodel.distributed.dist_info import DistInfo

REPLICATE_AXIS = "dp_replicate"
SHARD_AXIS = "dp_shard"
TP_AXIS = "tp"


class Strategy(Protocol):
    """What every option of ``distributed`` offers; the classes are in a file each.

    Attributes:
        is_sharded: a forward of one rank needs the others.
        length_multiple: what the length of a batch should be a multiple of.
    """

    name: str
    is_sharded: bool
    length_multiple: int
    defer_grad_sync: bool

    def build_mesh(self, dist_info: DistInfo) -> DeviceMesh:
        """Return the mesh of all ranks; every rank must call it."""

    def parallelize(self, model: nn.Module, *, dist_info: DistInfo, mesh: DeviceMesh) -> nn.Module:
        """Move ``model`` to the device and wrap or shard it; every rank must call it."""

    def device_of_shards(self, dist_info: DistInfo) -> torch.device | None:
        """Return where the shards of a model belong that came to ``parallelize`` on the meta device; None: none may."""

    def prepare_optimizer(self, optimizer: Optimizer, model: nn.Module) -> None:
        """Tie ``optimizer`` to what ``parallelize`` returned."""

    def autocast(self, device: torch.device) -> AbstractContextManager:
        """Return the context of a forward."""


@dataclass(frozen=True)
class DataParallel:
    """This rank's place among those that share the rows of a step.

    Attributes:
        rank: which share of the rows is this rank's; the ranks of a tensor-parallel group have the same one.
        size: number of shares.
        group: one rank of every share, this one among them; gradients are averaged and counts summed over it.
    """

    rank: int
    size: int
    group: dist.ProcessGroup


def build_mesh(dist_info: DistInfo, *, dp_replicate_size: int = 1, tp_size: int = 1) -> DeviceMesh:
    """Return a mesh of axes (dp_replicate, dp_shard, tp) over all ranks; every rank must call it.

    Neighbouring ranks, which share a node, form a tensor-parallel group.

    Raises:
        ValueError: ``dp_replicate_size`` x ``tp_size`` does not divide the number of ranks.
    """
    from torch.distributed.device_mesh import init_device_mesh

    num_shards, rest = divmod(dist_info.world_size, dp_replicate_size * tp_size)
    if rest:
        raise ValueError(
            f"dp_replicate_size {dp_replicate_size} x tp_size {tp_size} does not divide {dist_info.world_size} ranks"
        )
    shape = (dp_replicate_size, num_shards, tp_size)
    kind = "cpu" if dist_info.device.type == "mps" else dist_info.device.type  # mps has no collectives of its own
    return init_device_mesh(kind, shape, mesh_dim_names=(REPLICATE_AXIS, SHARD_AXIS, TP_AXIS))


def dp_eval_sample_shard(distributed_config: Strategy, dp_rank: int, dp_size: int) -> tuple[int, int] | None:
    """Return the (index, number) of this rank's own share of the rows of a generated-answer evaluation.

    None where the ranks must not generate on their own: a strategy that shards the model has every rank take
    part in every forward, so that they take the rows in rounds, together; and a single rank has nothing to share.
    """
    return None if distributed_config.is_sharded or dp_size == 1 else (dp_rank, dp_size)


def data_parallel(mesh: DeviceMesh) -> DataParallel:
    """Return this rank's place among the data-parallel ranks of ``mesh``; every rank must call it, once a run."""
    import torch.distributed as dist

    shares = mesh.mesh.reshape(-1, mesh[TP_AXIS].size())
    rank, tp_rank = (shares == dist.get_rank()).nonzero()[0].tolist()
    if shares.shape[1] == 1:
        return DataParallel(rank, shares.shape[0], dist.group.WORLD)
    # Made by ourselves, so that it takes tensors of the host too, as the main group does.
    groups = [dist.new_group(shares[:, column].tolist()) for column in range(shares.shape[1])]
    return DataParallel(rank, shares.shape[0], groups[tp_rank])
