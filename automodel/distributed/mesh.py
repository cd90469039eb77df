"""The device mesh of the data-parallel ranks."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

    from automodel.distributed.dist_info import DistInfo

REPLICATE_AXIS = "dp_replicate"
SHARD_AXIS = "dp_shard"


def build_mesh(dist_info: DistInfo, *, dp_replicate_size: int = 1) -> DeviceMesh:
    """Return a mesh of axes (dp_replicate, dp_shard) over all ranks; every rank must call it.

    Raises:
        ValueError: ``dp_replicate_size`` does not divide the number of ranks.
    """
    from torch.distributed.device_mesh import init_device_mesh

    num_shards, rest = divmod(dist_info.world_size, dp_replicate_size)
    if rest:
        raise ValueError(f"dp_replicate_size {dp_replicate_size} does not divide {dist_info.world_size} ranks")
    shape = (dp_replicate_size, num_shards)
    kind = "cpu" if dist_info.device.type == "mps" else dist_info.device.type  # mps has no collectives of its own
    return init_device_mesh(kind, shape, mesh_dim_names=(REPLICATE_AXIS, SHARD_AXIS))
